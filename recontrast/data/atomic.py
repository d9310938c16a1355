"""Atomic writes: a file or folder appears under its final name when it is complete, or not at all."""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from recontrast.data.listing import PathLike

_SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # for these, the message states the sizes in bytes
_PARTIAL = ".partial"  # suffix of an unfinished file or folder
ErrorText = Callable[[Path, str, int | None, int | None], str]
"""Function that returns an error message for a path, the reason, the bytes needed and the bytes free."""


def describe_write_error(path: Path, reason: str, size: int | None, free: int | None) -> str:
    """Return the error message for a file that could not be written.

    Args:
        path: File to write.
        reason: Reason given by the operating system.
        size: Bytes needed; None unless space is the reason.
        free: Bytes free on the disk; None if unknown.

    Returns:
        One sentence.
    """
    if size is None:
        return f"cannot write {path}: {reason}"
    available = "" if free is None else f", {free:,} are free"
    return f"{path}: could not be written ({reason}): wanted {size:,} bytes{available}"


@contextmanager
def replace_file(
    path: PathLike,
    size: int | None = None,
    *,
    temporary_name: str | None = None,
    describe_error: ErrorText = describe_write_error,
) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` when the block ends, and is deleted if the block fails.

    Args:
        path: File to create or replace. Missing parent folders are created.
        size: Expected size in bytes. If given, the space is checked first, and the data is synced to disk before the
            file gets its name. None skips both, for files that are cheap to write again.
        temporary_name: Name of the temporary file, in the same folder. Default: the name of the file and ".partial" if
            ``size`` is given, so that the next run overwrites the leftover of a killed run; otherwise a unique name, so
            that several processes can write at once.
        describe_error: Function that returns the error message.

    Yields:
        The temporary file, open for binary writing.

    Raises:
        OSError: If the file cannot be written. The message names the path and the reason; an existing file is kept.
    """
    path = Path(path)
    unique = temporary_name is not None or size is None
    partial = path.with_name(temporary_name or (f".{uuid.uuid4().hex[:12]}.tmp" if unique else path.name + _PARTIAL))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if size is not None and size > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            with partial.open("xb" if unique else "wb") as file:
                yield file
                if size is not None:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:  # includes Ctrl-C
            with suppress(OSError):  # the file may not exist yet
                partial.unlink()
            raise
        if size is not None:
            _sync_folder(path.parent)  # makes the rename durable
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps the file's error
        # Errors without a number, and errors about other files, come from the caller's block: raise them unchanged.
        if not isinstance(cause, OSError) or cause.errno is None or not _concerns(cause.filename, partial, path):
            raise
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else None
        if cause.errno not in _SPACE_ERRORS:
            size = free = None
        failure = OSError(describe_error(path, cause.strerror or str(cause), size, free))
        failure.errno = cause.errno
        raise failure from cause


@contextmanager
def create_folder(path: PathLike) -> Iterator[Path]:
    """Create a temporary folder whose content moves to ``path`` when the block ends, and is deleted if it fails.

    The temporary folder is ``.NAME.partial`` beside ``path``. If ``path`` is an existing empty folder, which may be a
    mount point or the working directory, it is ``.partial`` inside ``path``. It is locked while in use, and content
    left by a killed run is removed.

    Args:
        path: Folder that does not exist or is empty. Missing parent folders are created.

    Yields:
        The temporary folder.

    Raises:
        ValueError: If ``path`` is a file or a folder with content, or if another process is filling it.
    """
    path = Path(os.path.abspath(path))
    _check_new_or_empty(path)
    inside = path.is_dir()
    partial = path / _PARTIAL if inside else path.with_name(f".{path.name}{_PARTIAL}")
    with lock_folder(partial, path):
        try:
            for leftover in partial.iterdir():
                _remove(leftover)
            yield partial
            _check_new_or_empty(path)  # another process may have written there in the meantime
            if inside:
                _move_content(partial, path)
            else:
                os.replace(partial, path)
        except BaseException:  # includes Ctrl-C
            _remove(partial)
            raise


@contextmanager
def lock_folder(folder: Path, reported_path: PathLike | None = None) -> Iterator[None]:
    """Hold an exclusive lock on a folder for the length of the block.

    Args:
        folder: Folder to lock; created if missing.
        reported_path: Path to name in the error message. Default: ``folder``.

    Raises:
        ValueError: If another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{reported_path or folder}: wanted a folder that no other process writes to, got one in use"
            ) from None
        yield
    finally:
        os.close(lock)


def _move_content(source: Path, target: Path) -> None:
    """Move everything in ``source`` to ``target``; if one move fails, remove what was moved."""
    moved = []
    try:
        for child in sorted(source.iterdir()):
            moved.append(target / child.name)
            os.replace(child, moved[-1])
        source.rmdir()
    except BaseException:
        for child in moved:
            _remove(child)
        raise


def _remove(path: Path) -> None:
    """Remove a file or folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _check_new_or_empty(path: Path) -> None:
    """Raise ValueError if ``path`` is a file or a folder with content; a leftover ``.partial`` does not count."""
    if path.is_dir():
        first = min((child.name for child in path.iterdir() if child.name != _PARTIAL), default=None)
        if first is not None:
            raise ValueError(f"{path}: wanted a new or an empty folder, got one that holds {first}")
    elif os.path.lexists(path):
        raise ValueError(f"{path}: wanted a new or an empty folder, got a file")


def _concerns(filename: PathLike | int | None, partial: Path, path: Path) -> bool:
    """Return whether an error with this file name is about writing ``path``; errors of open files have no name."""
    return not isinstance(filename, (str, os.PathLike)) or Path(filename) in (partial, path, *path.parents)


def _sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
