"""Warnings about image files: one for each kind and process, with the name of the first file."""

import threading
import warnings

from recontrast.data.encoded_image import ImageSource


class ImageWarning(UserWarning):
    """A file was read, but not all of it was used, or not as its author may expect."""


_LOCK = threading.Lock()
_WARNED: set[str] = set()  # kinds


def warn_once(kind: str, path: ImageSource, text: str) -> None:
    """Warn about a file, unless this process has already warned about a file for the same reason.

    Args:
        kind: Kind of the warning.
        path: File or image to name.
        text: Rest of the sentence.
    """
    with _LOCK:
        if kind in _WARNED:
            return
        _WARNED.add(kind)
    warnings.warn(f"{path}: {text}", ImageWarning, stacklevel=2)


def forget_warnings() -> None:
    """Warn again about every kind, as at the start of the process."""
    with _LOCK:
        _WARNED.clear()
