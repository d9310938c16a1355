"""Methods that can be compared: names of the command line, and the recipe fields that each one changes."""

from collections.abc import Mapping, Sequence
from typing import Any

from recontrast.experiments.paper_tables import RD4AD
from recontrast.recipes.validation import is_own_name
from recontrast.registration import import_architecture

# Dinomaly and INP-Former run on a vision transformer only. Both public codes train with these settings.
_TOKENS: dict[str, Any] = {
    "optimiser": "stableadamw", "clip": 0.1, "schedule": "cosine_from_zero", "warmup": 0.01, "lr_end": 0.1,
    "weight_decay": 1e-4, "eps": 1e-10, "amsgrad": True,
}  # fmt: skip

METHODS: Mapping[str, Mapping[str, Any]] = {
    "patchcore": {"architecture": "patchcore"},
    "padim": {"architecture": "padim"},
    "ensemble": {"architecture": "ensemble"},
    "recontrast": {"architecture": "recontrast"},
    "rd4ad": {"architecture": "recontrast", **RD4AD},
    # The public code of UniAD trains with this learning rate and clips gradients.
    "uniad": {"architecture": "uniad", "decoder_lr": 1e-4, "clip": 0.1},
    "dinomaly": {"architecture": "dinomaly", "rule": "hardest", "factor": 0.1, "decoder_lr": 2e-3, **_TOKENS},
    "inp_former": {"architecture": "inp_former", "rule": "power", "decoder_lr": 1e-3, **_TOKENS},
}
"""Recipe fields that a method changes, by the names of ``--methods``."""
DEFAULT_METHODS = tuple(name for name in METHODS if name not in ("dinomaly", "inp_former"))  # with any backbone


def get_changes(name: str) -> Mapping[str, Any]:
    """Return the recipe fields that a method changes; an architecture of a user changes itself alone.

    Args:
        name: Key of `METHODS`, or "MODULE:NAME".
    """
    return METHODS[name] if name in METHODS else {"architecture": name}


def is_method(name: str) -> bool:
    """Return whether a name is that of a method, or has the form of one of a user's architectures."""
    return name in METHODS or is_own_name(name)


def select_methods(names: Sequence[str]) -> list[str]:
    """Check the names of methods.

    Args:
        names: Names, in any order; empty selects `DEFAULT_METHODS`. Architectures "MODULE:NAME" of a user are imported.

    Returns:
        The names without repetitions, in their order.

    Raises:
        ValueError: If a name is unknown, or a module cannot be imported.
    """
    for name in names:
        if not is_method(name):
            known = ", ".join(METHODS)
            raise ValueError(f"--methods: wanted {known} or your own MODULE:NAME, got {name!r}")
        import_architecture(name)
    return list(dict.fromkeys(names or DEFAULT_METHODS))
