"""Temporary files and folders with names of this package, and the removal of those that killed processes left.

The process that creates one holds a lock on it for as long as it exists. The lock ends with the process, so a temporary
file without a lock was left by a killed process, and the next process that writes to the folder removes it.
"""

import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

from filelock import lock_descriptor

from recontrast.data.json_text import parse_json
from recontrast.data.regular_file import read_bytes
from recontrast.data.system import IS_WINDOWS, open_no_follow, replace_path

_LOCKED_NAME = re.compile(r"\.recontrast-[0-9a-f]{16}\.tmp")
_OLD_NAME = re.compile(r"\.([0-9a-f]{12}|images-[0-9a-f]{32}\.u8\.[0-9a-f]{32})\.tmp")  # files of earlier versions
_OLD_SECONDS = 3600  # earlier versions held no locks: what they wrote to in the last hour may be in use
# Windows replaces no open file: between closing and replacing it, a file of a running process has no lock.
_CLOSED_SECONDS = 60 if IS_WINDOWS else -1
FOLDER_LOCK = ".recontrast-folder.lock"  # on Windows, which opens no folders, in each temporary folder
COMMIT = "commit.json"  # list of the replacements that a temporary folder is ready for; see `apply_commit`
_folder_locks: dict[Path, int] = {}  # descriptors that lock the temporary folders of this process
_swept: set[tuple[int, str]] = set()  # process and folder of each `sweep`


def is_temporary(name: str) -> bool:
    """Return whether a name is that of a temporary file or folder of this package, of this version or an earlier one.

    Args:
        name: Name without its folder.
    """
    return (_LOCKED_NAME.fullmatch(name) or _OLD_NAME.fullmatch(name)) is not None


def create_file(folder: Path) -> tuple[Path, BinaryIO]:
    """Create a temporary file and lock it. Links are not followed.

    Args:
        folder: Existing folder.

    Returns:
        Path of the file, and the file, open for writing. Closing it releases the lock.

    Raises:
        OSError: If the file cannot be created.
    """
    while True:
        path = folder / f".recontrast-{uuid.uuid4().hex[:16]}.tmp"
        file = cast(BinaryIO, path.open("xb"))
        if try_lock(file.fileno()) and os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # removed as a leftover before it was locked


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary folder, lock it, and remove it when the block ends.

    Args:
        folder: Existing folder in which the temporary one is created.

    Yields:
        Path of the temporary folder.

    Raises:
        OSError: If the folder cannot be created.
    """
    path, handle = _create_locked_folder(folder)
    _folder_locks[path] = handle
    try:
        yield path
    finally:
        try:
            if IS_WINDOWS:  # removes no folder with an open file
                unlock_folder(path)
            if not (path / COMMIT).exists():  # a failed commit is completed by the next process
                remove(path)
        finally:
            unlock_folder(path)


def unlock_folder(path: Path) -> None:
    """End the lock of a temporary folder, if it is locked.

    Args:
        path: Folder of `temporary_folder`.
    """
    handle = _folder_locks.pop(path, None)
    if handle is not None:
        os.close(handle)
        if IS_WINDOWS:
            (path / FOLDER_LOCK).unlink(missing_ok=True)


def move_folder(path: Path, target: Path) -> None:
    """Move a complete temporary folder to its final path. Windows moves no folder with an open file.

    Args:
        path: Folder of `temporary_folder`.
        target: New path, at which there is nothing or an empty folder.

    Raises:
        OSError: If the folder cannot be moved.
    """
    if IS_WINDOWS:
        unlock_folder(path)
    os.replace(path, target)


def list_content(path: Path) -> list[str]:
    """List the names in a temporary folder, in order, without that of its lock.

    Args:
        path: Folder of `temporary_folder`.
    """
    return sorted(child.name for child in path.iterdir() if child.name != FOLDER_LOCK)


def sweep(folder: Path, *, once: bool = False, keep: Collection[Path] = ()) -> None:
    """Remove temporary files and folders that killed processes left in a folder, and complete their commits.

    Files that another process still uses, and files with other names, are kept. Subfolders are not searched.

    Args:
        folder: Folder to search; it need not exist.
        once: Whether a folder that this process has searched before is not searched again.
        keep: Temporary folders that are left as they are.

    Raises:
        OSError: If a commit cannot be completed.
    """
    key = (os.getpid(), str(folder))
    if once and key in _swept:
        return
    _swept.add(key)
    try:
        with os.scandir(folder) as entries:
            leftovers = [folder / entry.name for entry in entries if is_temporary(entry.name)]
    except OSError:  # no such folder, or one that cannot be read
        return
    for path in set(leftovers).difference(keep):
        try:
            handle = open_no_follow(_get_lock(path), os.O_RDONLY)
        except OSError:  # a link, which is never one of ours, or removed by another process
            continue
        try:
            is_unused = _is_unused(path, handle)
            if is_unused and not IS_WINDOWS:  # while it is locked
                _remove_unused(path)
        finally:
            os.close(handle)
        if is_unused and IS_WINDOWS:
            _remove_unused(path)


def write_commit(staging: Path, names: Sequence[str], removed: Sequence[str]) -> None:
    """Record that the files of a temporary folder are complete; from here on `apply_commit` must follow.

    Args:
        staging: Temporary folder, in the folder whose files are replaced.
        names: Names of the files in ``staging`` that replace those of the same name.
        removed: Names of files to remove.

    Raises:
        OSError: If the record cannot be written.
    """
    content = json.dumps({"replace": list(names), "remove": [name for name in removed if name not in names]}).encode()
    draft = staging / f"{COMMIT}.draft"
    with draft.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(draft, staging / COMMIT)


def apply_commit(staging: Path) -> None:
    """Make the replacements that `write_commit` recorded; a second call makes those that the first one did not.

    Args:
        staging: Temporary folder with a record.

    Raises:
        OSError: If a file cannot be replaced. If it is the first one, the record is withdrawn.
    """
    names, removed = _read_commit(staging) or ([], [])
    waiting = [name for name in names if os.path.lexists(staging / name)]
    try:
        for name in waiting:
            replace_path(staging / name, staging.parent / name)
    except OSError:
        if names and len(waiting) == len(names) and os.path.lexists(staging / names[0]):
            (staging / COMMIT).unlink()
        raise
    for name in removed:
        (staging.parent / name).unlink(missing_ok=True)
    (staging / COMMIT).unlink()


def complete_commits(folder: Path) -> None:
    """Complete the commits that killed processes left in a folder that is about to be read.

    A commit that would remove files is left to the next process that writes there: reading a folder, which may come
    from somebody else, removes nothing.

    Args:
        folder: Folder to read.

    Raises:
        ValueError: If a commit is under way or cannot be completed.
    """
    commits = {staging: _read_commit(staging) for staging in _find_commits(folder)}
    if any(commit is not None and not commit[1] for commit in commits.values()):
        with suppress(OSError):
            sweep(folder, keep=[staging for staging, commit in commits.items() if commit is None or commit[1]])
    for staging in _find_commits(folder):
        raise ValueError(f"{folder}: wanted a complete folder, got one that a killed command left half replaced "
                         f"({staging.name}): run the command again")  # fmt: skip


def undo_commits(folder: Path) -> None:
    """Remove what killed processes left in a folder that was empty before, including the files of their commits.

    Args:
        folder: Folder that the caller has locked.
    """
    for staging in _find_commits(folder):
        undo_commit(staging)
    sweep(folder)


def undo_commit(staging: Path) -> None:
    """Remove the files of a commit that were new, whether they were moved yet or not.

    Args:
        staging: Temporary folder with a record of `write_commit`.
    """
    names, _ = _read_commit(staging) or ([], [])
    for name in names:
        if not os.path.lexists(staging / name):
            remove(staging.parent / name)
    (staging / COMMIT).unlink()


def _read_commit(staging: Path) -> tuple[list[str], list[str]] | None:
    """Return the names to replace and to remove; None if the record is not one that `write_commit` wrote."""
    try:
        commit = parse_json(read_bytes(staging / COMMIT))
        names, removed = commit["replace"], commit["remove"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(names, list) or not isinstance(removed, list):
        return None
    is_valid = all(isinstance(name, str) and name not in ("", "..") and Path(name).name == name and "\0" not in name
                   for name in [*names, *removed])  # fmt: skip
    return (names, removed) if is_valid else None


def _find_commits(folder: Path) -> list[Path]:
    """Return the temporary folders in ``folder`` with a commit."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if _LOCKED_NAME.fullmatch(entry.name) and entry.is_dir(
                follow_symlinks=False)]  # fmt: skip
    except OSError:
        return []
    return [folder / name for name in names if (folder / name / COMMIT).is_file()]


def try_lock(handle: int) -> bool:
    """Lock an open file or folder, without waiting.

    Args:
        handle: File descriptor. Closing it, or the end of the process, ends the lock.

    Returns:
        Whether the lock was obtained; also True on a file system without locks.
    """
    try:
        return lock_descriptor(handle, blocking=False)
    except OSError:
        return True


def is_lockable(handle: int) -> bool:
    """Return whether the file system of an open file has locks.

    Args:
        handle: File descriptor that this process has locked, if it can be.
    """
    try:
        lock_descriptor(handle, blocking=False)  # again: the lock belongs to the open file
    except OSError:
        return False
    return True


def remove(path: Path) -> None:
    """Remove a file or folder if it exists.

    Args:
        path: Path of the file or folder; a link is removed, not followed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _create_locked_folder(folder: Path) -> tuple[Path, int]:
    """Create a temporary folder; return its path and the descriptor that locks it."""
    while True:
        path = folder / f".recontrast-{uuid.uuid4().hex[:16]}.tmp"
        path.mkdir()
        with suppress(FileNotFoundError):  # removed as a leftover before it was locked
            handle = os.open(_get_lock(path), os.O_RDWR | os.O_CREAT if IS_WINDOWS else os.O_RDONLY)
            if try_lock(handle) and os.fstat(handle).st_nlink:
                return path, handle
            os.close(handle)


def _get_lock(path: Path) -> Path:
    """Return what is locked for a temporary file or folder: itself, or on Windows a file in the folder."""
    return path / FOLDER_LOCK if IS_WINDOWS and path.is_dir() else path


def _is_unused(path: Path, handle: int) -> bool:
    """Return whether an opened temporary file or folder was left by a killed process; it is locked then."""
    status = os.fstat(handle)
    is_ours = bool(_LOCKED_NAME.fullmatch(path.name))
    if not (stat.S_ISREG(status.st_mode) or (stat.S_ISDIR(status.st_mode) and is_ours)):
        return False
    age = time.time() - status.st_mtime
    if age <= (_CLOSED_SECONDS if is_ours else _OLD_SECONDS):
        return False
    try:
        return lock_descriptor(handle, blocking=False)
    except OSError:  # no locks on this file system: only age tells
        return age > _OLD_SECONDS


def _remove_unused(path: Path) -> None:
    """Remove a temporary file or folder that a killed process left, after its commit."""
    if path.is_dir() and (path / COMMIT).is_file():
        apply_commit(path)
    with suppress(OSError):
        remove(path)
