"""Atomic writes: a file or folder appears under its final name when it is complete, or not at all."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from recontrast.data.listing import PathLike
from recontrast.data.locks import LOCK_NAME, lock_file, lock_folder
from recontrast.data.system import IS_WINDOWS, replace_path, sync_file, sync_folder
from recontrast.data.temporary import (
    apply_commit,
    create_file,
    is_temporary,
    list_content,
    move_folder,
    sweep,
    temporary_folder,
    undo_commit,
    undo_commits,
    write_commit,
)

_SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # for these, the message states the sizes in bytes
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
    path: PathLike, size: int | None = None, *, describe_error: ErrorText = describe_write_error
) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces ``path`` when the block ends, and is deleted if the block fails.

    The temporary file has a unique name, so several processes can write the same file; the last one wins. A link at
    ``path`` is replaced, not followed. Temporary files that killed processes left in the folder are removed.

    Args:
        path: File to create or replace. Missing parent folders are created.
        size: Expected size in bytes. If given, the space is checked first, and the data is synced to disk before the
            file gets its name. None skips both, for files that are cheap to write again.
        describe_error: Function that returns the error message.

    Yields:
        The temporary file, open for binary writing.

    Raises:
        OSError: If the file cannot be written. The message names the path and the reason; an existing file is kept.
    """
    path = Path(path)
    partial: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, once=size is None)  # cheap files are many
        if size is not None and size > shutil.disk_usage(path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial, file = create_file(path.parent)
        with file:  # open, and therefore locked, until it has its name
            try:
                yield file
                file.flush()
                if size is not None:
                    os.fsync(file.fileno())
                os.close(os.dup(file.fileno()))  # network file systems report write errors on closing
                if IS_WINDOWS:  # replaces no open file
                    file.close()
                replace_path(partial, path)
            except BaseException:  # includes Ctrl-C
                if IS_WINDOWS:
                    file.close()
                with suppress(OSError):
                    partial.unlink()
                raise
        if size is not None:
            sync_folder(path.parent)  # makes the rename durable
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
def replace_files(folder: PathLike, *, remove: Sequence[str] = ()) -> Iterator[Path]:
    """Replace several files of a folder together: after a crash at any point, all of them are old or all are new.

    The files are written to a temporary folder. A list of them is the commit: a process that is killed before leaves
    the old files, and what a process killed after it has not moved yet is moved by the next process that writes there
    (`recontrast.data.temporary.sweep`) or reads there (`recontrast.data.temporary.complete_commits`).

    Args:
        folder: Folder of the files; created if missing.
        remove: Names of files in ``folder`` to remove with the replacement.

    Yields:
        The temporary folder. Files written there replace those of the same name.

    Raises:
        OSError: If a file cannot be written. The message names the folder and the reason.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        with temporary_folder(folder) as staging:
            yield staging
            names = list_content(staging)
            for name in names:
                sync_file(staging / name)
            write_commit(staging, names, remove)
            apply_commit(staging)
            sync_folder(folder)
    except OSError as error:
        if error.errno is None or not _concerns(error.filename, None, folder / "file"):
            raise
        failure = OSError(f"cannot write {folder}: {error.strerror or error}")
        failure.errno = error.errno
        raise failure from error


@contextmanager
def create_folder(path: PathLike) -> Iterator[Path]:
    """Create a temporary folder whose content moves to ``path`` when the block ends, and is deleted if it fails.

    The temporary folder is beside ``path``, or inside if ``path`` is an existing empty folder, which may be a mount
    point or the working directory. What a killed run left there is removed.

    Args:
        path: Folder that does not exist or is empty. Missing parent folders are created.

    Yields:
        The temporary folder.

    Raises:
        ValueError: If ``path`` is a file or a folder with content, or if another process is filling it.
    """
    path = Path(os.path.abspath(path))
    with ExitStack() as stack:
        inside = path.is_dir()
        if inside:
            stack.enter_context(lock_folder(path, undo_commits))
        elif os.path.lexists(path):
            check_new_or_empty(path)
        else:
            stack.enter_context(lock_file(path))
        check_new_or_empty(path)
        with temporary_folder(path if inside else path.parent) as staging:
            yield staging
            check_new_or_empty(path)  # another process may have written there in the meantime
            if inside:
                _move_content(staging)
            else:
                move_folder(staging, path)


def _move_content(staging: Path) -> None:
    """Move everything in a temporary folder to its parent; if one move fails, remove what was moved."""
    write_commit(staging, list_content(staging), [])
    try:
        apply_commit(staging)
    except BaseException:  # includes Ctrl-C
        undo_commit(staging)
        raise


def check_new_or_empty(path: Path) -> None:
    """Raise ValueError if ``path`` is a file or a folder with content; locks and temporary folders do not count."""
    if path.is_dir():
        first = min(
            (child.name for child in path.iterdir() if child.name != LOCK_NAME and not is_temporary(child.name)),
            default=None,
        )
        if first is not None:
            raise ValueError(f"{path}: wanted a new or an empty folder, got one that holds {first}")
    elif os.path.lexists(path):
        raise ValueError(f"{path}: wanted a new or an empty folder, got a file")


def _concerns(filename: PathLike | int | None, partial: Path | None, path: Path) -> bool:
    """Return whether an error with this file name is about writing ``path``; errors of open files have no name."""
    if not isinstance(filename, (str, os.PathLike)):
        return True
    return Path(filename) in (partial, path, *path.parents) or any(map(is_temporary, Path(filename).parts[-2:]))
