"""Which kernels run on a device: the first of `ORDER` that is there, or what ``RECONTRAST_BACKEND`` names.

Compiled C++/CUDA (``csrc/``), then Triton (``kernels/``), then the oracle (``reference.py``).
"""

import importlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

# By speed. CPU: benchmarks/README.md. CUDA: as expected, until `benchmarks/gpu.sh` has run on the device.
ORDER = {"cpu": ("native", "torch"), "cuda": ("native", "triton", "torch")}
VARIABLE = "RECONTRAST_BACKEND"  # of the environment; a backend that a device never has leaves that device alone
BACKEND = {"cpu": "torch", "cuda": "torch"}
"""What each device runs, "native", "triton" or "torch"; read only."""
WHY: dict[str, str] = {}
"""Device -> why it does not run the first of its order, or who asked for another; absent where it does."""


def choose(device: str, rooms: Mapping[str, str]) -> None:
    """Register the kernels of ``device``.

    Args:
        device: "cpu" or "cuda".
        rooms: operator -> its file in kernels/.

    Raises:
        ValueError: ``RECONTRAST_BACKEND`` names no backend, or one that is not there.
    """
    asked = os.environ.get(VARIABLE, "")
    known = tuple(dict.fromkeys(name for order in ORDER.values() for name in order))
    if asked and asked not in known:
        raise ValueError(f"{VARIABLE}: wanted one of {', '.join(known)}, got {asked!r}")
    if asked in ORDER[device]:
        if missing := _register(asked, device, rooms):
            raise ValueError(f"{VARIABLE}: wanted {asked} kernels on {device}, but {missing}")
        BACKEND[device], WHY[device] = asked, f"asked for by {VARIABLE}"
        return
    reasons = []
    for name in ORDER[device]:
        missing = _register(name, device, rooms)
        if missing is None:
            BACKEND[device] = name
            break
        reasons.append(missing)
    if reasons:
        WHY[device] = "; ".join(reasons)
        warnings.warn(f"recontrast runs {BACKEND[device]} kernels on {device}: {WHY[device]}", stacklevel=3)


def _register(name: str, device: str, rooms: Mapping[str, str]) -> str | None:
    """Register the kernels of backend ``name``, or say why there are none."""
    if name == "native":
        return _native(device)
    return _triton(device, rooms) if name == "triton" else None


def _native(device: str) -> str | None:
    library = Path(__file__).with_name(f"_{device}.so")
    if not library.exists():
        return f"{library.name} was not built (pip install -e . builds it; CUDA needs nvcc)"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # built for another platform or for a newer torch
        return f"{library.name} does not load: {error.__cause__ or error}"
    return None


def _triton(device: str, rooms: Mapping[str, str]) -> str | None:
    try:
        for name, room in rooms.items():
            kernels = importlib.import_module(f"recontrast.kernels.{room}")
            torch.library.impl(f"recontrast::{name}", device, getattr(kernels, name))
    except ImportError as error:
        return f"no Triton: {error}"
    return None
