"""Methods that can be compared: names of the command line, and the recipe fields that each one changes."""

from collections.abc import Mapping, Sequence
from typing import Any

from recontrast.experiments.paper_tables import RD4AD

METHODS: Mapping[str, Mapping[str, Any]] = {
    "patchcore": {"architecture": "patchcore"},
    "padim": {"architecture": "padim"},
    "ensemble": {"architecture": "ensemble"},
    "recontrast": {"architecture": "recontrast"},
    "rd4ad": {"architecture": "recontrast", **RD4AD},
    # The public code of UniAD trains with this learning rate and clips gradients.
    "uniad": {"architecture": "uniad", "decoder_lr": 1e-4, "clip": 0.1},
}
"""Recipe fields that a method changes, by the names of ``--methods``."""


def select_methods(names: Sequence[str]) -> list[str]:
    """Check the names of methods.

    Args:
        names: Names, in any order; empty selects all methods.

    Returns:
        The names without repetitions, in their order.

    Raises:
        ValueError: If a name is unknown.
    """
    for name in names:
        if name not in METHODS:
            *others, last = METHODS
            raise ValueError(f"--methods: wanted {', '.join(others)} or {last}, got {name!r}")
    return list(dict.fromkeys(names or METHODS))
