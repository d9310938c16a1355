"""Open files that a user names: only regular files, so that a pipe or a device can neither hang nor harm a command.

Opening a named pipe waits for its writer, and reading a device may never end. Every path given by a user, or found in
a folder of the user, is therefore opened with the functions below. New files are written by `recontrast.data.atomic`.
"""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from recontrast.data.listing import PathLike
from recontrast.data.system import NO_WAIT, open_no_follow

LARGEST_TEXT = 2**26  # bytes; the largest recipes, lists and logs are far smaller
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: PathLike, wanted: str = "a file") -> BinaryIO:
    """Open a regular file for reading; the function never waits.

    Args:
        path: Path of the file. Symbolic links are followed.
        wanted: What the file should be, for error messages, such as "a recipe in YAML".

    Returns:
        The file, opened for reading bytes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the path is that of a folder, a pipe, a socket or a device, or contains a null byte.
        OSError: If the file cannot be opened.
    """
    check_regular(path, wanted)  # opening a device can already change its state
    # Without O_NONBLOCK, opening a pipe would wait if it replaced the file after the check.
    handle = os.open(path, os.O_RDONLY | NO_WAIT)
    try:
        _check_mode(path, os.fstat(handle).st_mode, wanted)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def open_to_change(
    path: PathLike, wanted: str = "a file", *, append: bool = False, create: bool = False, buffering: int = -1
) -> BinaryIO:
    """Open a file of this package to write more into it. A symbolic link is refused: it would lead to another file.

    Args:
        path: Path of the file.
        wanted: What the file should be, for error messages.
        append: Whether everything is written at the end of the file, which then cannot be read.
        create: Whether to create the file if there is none.
        buffering: As in `open`.

    Returns:
        The file, opened for writing bytes at its start, or at its end with ``append``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the path is that of a link, a folder, a pipe, a socket or a device.
        OSError: If the file cannot be opened.
    """
    flags = os.O_WRONLY | os.O_APPEND if append else os.O_RDWR
    flags |= os.O_CREAT if create else 0
    if not create or os.path.lexists(path):
        mode = os.lstat(path).st_mode
        if stat.S_ISLNK(mode):
            raise ValueError(f"{path}: wanted {wanted}, got a symbolic link: remove it")
        _check_mode(path, mode, wanted)  # opening a device can already change its state
    try:
        handle = open_no_follow(path, flags)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{path}: wanted {wanted}, got a symbolic link: remove it") from error
    try:
        _check_mode(path, os.fstat(handle).st_mode, wanted)
        return cast(BinaryIO, os.fdopen(handle, "ab" if append else "r+b", buffering))
    except BaseException:
        os.close(handle)
        raise


def check_regular(path: PathLike, wanted: str = "a file") -> None:
    """Raise an error if a path is not that of a regular file. Use `open_regular` where the file is opened here.

    Args:
        path: Path of the file. Symbolic links are followed.
        wanted: What the file should be, for error messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the path is that of a folder, a pipe, a socket or a device, or contains a null byte.
        OSError: If the path cannot be looked up.
    """
    if "\0" in os.fsdecode(path):
        raise ValueError(f"{os.fsdecode(path)!r}: wanted the path of {wanted}, got one with a null byte")
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: wanted {wanted}, got no such file") from None
    _check_mode(path, mode, wanted)


def read_bytes(path: PathLike, wanted: str = "a file", largest: int = LARGEST_TEXT) -> bytes:
    """Read a regular file of limited size.

    Args:
        path: Path of the file.
        wanted: What the file should be, for error messages.
        largest: Largest size of the file in bytes.

    Returns:
        The content of the file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a regular file or is larger than ``largest``.
        OSError: If the file cannot be read.
    """
    with open_regular(path, wanted) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{path}: wanted {wanted} of at most {largest:,} bytes, got a larger file")
    return content


def is_regular(path: PathLike) -> bool:
    """Return whether a path is that of a regular file, or of a link to one; False if it cannot be looked up."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _check_mode(path: PathLike, mode: int, wanted: str) -> None:
    """Raise ValueError unless ``mode`` is that of a regular file."""
    if not stat.S_ISREG(mode):
        kind = next((kind for is_kind, kind in _KINDS if is_kind(mode)), "a file of another kind")
        raise ValueError(f"{path}: wanted {wanted}, got {kind}")
