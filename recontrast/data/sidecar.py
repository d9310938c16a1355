"""SHA-256 of a file in a second file beside it, as ``sha256sum FILE > FILE.sha256`` writes it."""

import hashlib
import os
import re
from pathlib import Path

from recontrast.data.regular_file import open_regular, read_bytes

SUFFIX = ".sha256"
_DIGEST = re.compile(rb"\\?([0-9a-fA-F]{64})(?:\s|$)")  # sha256sum writes a backslash before unusual names
_LARGEST = 2**16


def compute_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file.

    Args:
        path: Path of the file.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sidecar(path: Path) -> bool:
    """Compare a file with the SHA-256 in the file ``FILE.sha256`` beside it, if there is one.

    Args:
        path: Path of the file.

    Returns:
        Whether there is such a file.

    Raises:
        ValueError: If the SHA-256 differs, or the file beside it holds none.
        OSError: If a file cannot be read.
    """
    sidecar = path.with_name(path.name + SUFFIX)
    if not os.path.lexists(sidecar):
        return False
    match = _DIGEST.match(read_bytes(sidecar, "a SHA-256", _LARGEST))
    if match is None:
        raise ValueError(f"{sidecar}: wanted a SHA-256 as sha256sum writes it, got something else")
    digest = compute_sha256(path)
    if digest != match[1].decode().lower():
        raise ValueError(
            f"{path}: wanted the SHA-256 in {sidecar.name}, got {digest}: the file is damaged or another one"
        )
    return True
