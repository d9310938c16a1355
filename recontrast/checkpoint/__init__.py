"""Checkpoints: a single file from which training resumes or prediction starts.

A checkpoint is first written to a temporary file and renamed once it is complete and on disk, so a run that is killed
leaves the last complete checkpoint. No code in the file is executed when it is read, and all of its bytes are checked
against checksums. The reference implementation saves no checkpoints.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recontrast.checkpoint.checksums import SCORE_FIELDS, digest
    from recontrast.checkpoint.file import FORMAT, Checkpoint, load, read, save, write
    from recontrast.checkpoint.model import build, check_calibration, load_model, restore, write_calibration

__all__ = [
    "FORMAT",
    "SCORE_FIELDS",
    "Checkpoint",
    "build",
    "check_calibration",
    "digest",
    "load",
    "load_model",
    "read",
    "restore",
    "save",
    "write",
    "write_calibration",
]

_MODULES = {
    "checksums": ("SCORE_FIELDS", "digest"),
    "file": ("FORMAT", "Checkpoint", "load", "read", "save", "write"),
    "model": ("build", "check_calibration", "load_model", "restore", "write_calibration"),
}


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` when it is used: the checks of fields also serve exported files, without PyTorch."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
