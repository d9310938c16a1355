"""Choice of the kernels for each device: the first available backend in `ORDER`, or that of ``RECONTRAST_BACKEND``.

The backends are "native" (compiled C++ and CUDA, ``csrc/``), "triton" (``kernels/``) and "torch" (``reference.py``).
"""

import importlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import recontrast

# Fastest first. CPU: measured, benchmarks/README.md. CUDA: expected, to be measured by `benchmarks/gpu.sh`.
ORDER = {"cpu": ("native", "torch"), "cuda": ("native", "triton", "torch")}
VARIABLE = "RECONTRAST_BACKEND"  # environment variable; ignored for a device that does not have this backend
BACKEND = {"cpu": "torch", "cuda": "torch"}
"""Backend of each device: "native", "triton" or "torch"; read only."""
OLDEST_TORCH = (2, 11)  # with the stable ABI that the native kernels use
RECORD = "_build.json"  # written by setup.py: what was not built, and why
# Medians of benchmarks/without_kernels.py; see benchmarks/README.md, "Without compiled kernels".
COST = "the loss takes 9 times as long, maps 4 times, pixel metrics 5 times, and a training step as long as with them"
WHY: dict[str, str] = {}
"""Device -> why it runs another backend than the first in `ORDER`, or who chose its backend; absent otherwise."""


class KernelWarning(UserWarning):
    """A device runs slower kernels than the fastest that this package has for it."""


def choose(device: str, modules: Mapping[str, str]) -> None:
    """Choose a backend for ``device`` and register its kernels.

    Args:
        device: "cpu" or "cuda".
        modules: operator -> the module of ``recontrast.kernels`` that implements it.

    Raises:
        ValueError: If ``RECONTRAST_BACKEND`` is not the name of a backend, or that backend is not available.
    """
    requested = os.environ.get(VARIABLE, "")
    names = tuple(dict.fromkeys(name for order in ORDER.values() for name in order))
    if requested and requested not in names:
        raise ValueError(f"{VARIABLE}: wanted one of {', '.join(names)}, got {requested!r}")
    if requested in ORDER[device]:
        if reason := _register(requested, device, modules):
            raise ValueError(f"{VARIABLE}: wanted {requested} kernels on {device}, but {reason}")
        BACKEND[device], WHY[device] = requested, f"chosen by {VARIABLE}"
        return
    reasons = []
    for name in ORDER[device]:
        reason = _register(name, device, modules)
        if reason is None:
            BACKEND[device] = name
            break
        reasons.append(reason)
    if reasons:
        WHY[device] = "; ".join(reasons)
        if read_build().get("mode") != "python":  # else it was chosen
            cost = f"; {COST}" if device == "cpu" else ""
            text = f"recontrast runs {BACKEND[device]} kernels on {device}: {WHY[device]}{cost}"
            warnings.warn(text, KernelWarning, stacklevel=3)


def read_build() -> dict[str, Any]:
    """Return what ``setup.py`` noted about the build of this package: "version", "mode" and "missing".

    "missing" maps the names of libraries to the reason why they were not built.
    """
    try:
        record = json.loads(Path(__file__).with_name(RECORD).read_text())
    except (OSError, ValueError):  # a checkout that was built with CMake by hand
        return {}
    return record if isinstance(record, dict) else {}


def explain_missing(library: str) -> str:
    """Return why a library of this package is not there, and what brings it.

    Args:
        library: "_cpu", "_cuda" or "_metrics".

    Returns:
        A clause for a message.
    """
    missing = read_build().get("missing")
    reason = missing.get(library) if isinstance(missing, dict) else None
    if isinstance(reason, str):
        return f"{library} was not built: {reason}"
    return f"{library} was not built (pip install -e . builds it; CUDA needs nvcc)"


def _register(name: str, device: str, modules: Mapping[str, str]) -> str | None:
    """Register the kernels of backend ``name``; return None, or the reason why that is not possible."""
    if name == "native":
        return _native(device)
    return _triton(device, modules) if name == "triton" else None


def _native(device: str) -> str | None:
    library = Path(__file__).with_name(f"_{device}.so")
    if not library.exists():
        return explain_missing(library.stem)
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        return f"{library.name} needs torch >= {'.'.join(map(str, OLDEST_TORCH))}, got {torch.__version__}"
    built = read_build().get("version", recontrast.__version__)
    if built != recontrast.__version__:
        return f"{library.name} is of version {built}, not {recontrast.__version__}: install recontrast again"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # built for another platform or for a newer torch
        return f"{library.name} does not load: {error.__cause__ or error}"
    return None


def _triton(device: str, modules: Mapping[str, str]) -> str | None:
    try:
        for operator, module in modules.items():
            kernels = importlib.import_module(f"recontrast.kernels.{module}")
            torch.library.impl(f"recontrast::{operator}", device, getattr(kernels, operator))
    except ImportError as error:
        if error.name == "recontrast.kernels":
            return "recontrast.kernels is not installed (pip install -e . in the checkout installs it)"
        return f"no Triton: {error}"
    return None
