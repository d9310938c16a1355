"""Files and folders that appear under their name whole, or not at all."""

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

_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # reasons that have to do with bytes
_PARTIAL = ".partial"  # ends the name of what is not finished
Sentence = Callable[[Path, str, int | None, int | None], str]  # path, reason, bytes wanted, bytes free


def unwritable(path: Path, reason: str, wanted: int | None, free: int | None) -> str:
    """What is said of a file that cannot be written; ``wanted`` and ``free`` are bytes, where they are the reason."""
    if wanted is None:
        return f"cannot write {path}: {reason}"
    room = "" if free is None else f", {free:,} are free"
    return f"{path}: could not be written ({reason}): wanted {wanted:,} bytes{room}"


@contextmanager
def replace_file(
    path: PathLike, wanted: int | None = None, *, temporary: str | None = None, sentence: Sentence = unwritable
) -> Iterator[BinaryIO]:
    """A file open for writing that takes the place of ``path`` when the block ends, and vanishes when it fails.

    Args:
        path: file to write or to replace; folders above it are made.
        wanted: bytes that will be written, as far as is known: they must be free before anything is, and are on the
            disk before the name is. None, for what can be made again in a moment: neither is asked for.
        temporary: name of the file until then, in the same folder. Default: with ``wanted`` the name of the file and
            ".partial", so that the next run overwrites what a killed one left; without, a new one each time, so that
            several processes may write at once.
        sentence: how a failure is said.

    Raises:
        OSError: one sentence with the path and the reason; a former file stays.
    """
    path = Path(path)
    shared = temporary is not None or wanted is None
    partial = path.with_name(temporary or (f".{uuid.uuid4().hex[:12]}.tmp" if shared else path.name + _PARTIAL))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if wanted is not None and wanted > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            with partial.open("xb" if shared else "wb") as file:
                yield file
                if wanted is not None:
                    file.flush()
                    os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:  # Ctrl-C too
            with suppress(OSError):  # it was never made
                partial.unlink()
            raise
        if wanted is not None:
            _sync(path.parent)  # the rename itself
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps what the file raised
        # An error without a number, or one that names another file, is not of writing this one.
        if not isinstance(cause, OSError) or cause.errno is None or not _of(cause.filename, partial, path):
            raise
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else None
        if cause.errno not in _ROOM:
            wanted = free = None
        failure = OSError(sentence(path, cause.strerror or str(cause), wanted, free))
        failure.errno = cause.errno
        raise failure from cause


@contextmanager
def create_folder(path: PathLike) -> Iterator[Path]:
    """A folder to fill whose content is at ``path`` when the block ends, and vanishes when it fails.

    Until then it is ``.NAME.partial`` beside ``path``, or, where that is an empty folder (perhaps a mount, or the one
    we are in), ``.partial`` within; it is locked, and what a killed run left there is emptied.

    Args:
        path: a folder that is not there or is empty; those above it are made.

    Raises:
        ValueError: there is something at ``path``, or another process is filling it.
    """
    path = Path(os.path.abspath(path))
    _refuse_full(path)
    within = path.is_dir()
    partial = path / _PARTIAL if within else path.with_name(f".{path.name}{_PARTIAL}")
    with lock_folder(partial, path):
        try:
            for left in partial.iterdir():
                _remove(left)
            yield partial
            _refuse_full(path)  # something may have come meanwhile
            if within:
                _move_up(partial, path)
            else:
                os.replace(partial, path)
        except BaseException:  # Ctrl-C too
            _remove(partial)
            raise


@contextmanager
def lock_folder(folder: Path, named: PathLike | None = None) -> Iterator[None]:
    """Only one process at a time is in this block with ``folder``, which is made; ``named`` says it in the error.

    Raises:
        ValueError: another one is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{named or folder}: wanted a folder for this run alone, got another that fills it"
            ) from None
        yield
    finally:
        os.close(lock)


def _move_up(partial: Path, path: Path) -> None:
    """Move what is in ``partial`` to ``path``, all or nothing."""
    moved = []
    try:
        for child in sorted(partial.iterdir()):
            moved.append(path / child.name)
            os.replace(child, moved[-1])
        partial.rmdir()
    except BaseException:
        for child in moved:
            _remove(child)
        raise


def _remove(path: Path) -> None:
    """Remove a file or folder that may not be there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _refuse_full(path: Path) -> None:
    """Refuse a file, and a folder that holds anything but what a killed run left."""
    if path.is_dir():
        inside = min((child.name for child in path.iterdir() if child.name != _PARTIAL), default=None)
        if inside is not None:
            raise ValueError(f"{path}: wanted a new or an empty folder, got one that holds {inside}")
    elif os.path.lexists(path):
        raise ValueError(f"{path}: wanted a new or an empty folder, got a file")


def _of(filename: PathLike | int | None, partial: Path, path: Path) -> bool:
    """Whether an error with this file name comes from writing ``path``; one of an open file has none."""
    return not isinstance(filename, (str, os.PathLike)) or Path(filename) in (partial, path, *path.parents)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
