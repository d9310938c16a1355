"""Checkpoints: a single file from which training resumes or prediction starts.

A checkpoint is first written to a temporary file and renamed once it is complete and on disk, so a run that is killed
leaves the last complete checkpoint. No code in the file is executed when it is read, and all of its bytes are checked
against checksums. The reference implementation saves no checkpoints.
"""

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
