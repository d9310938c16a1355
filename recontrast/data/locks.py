"""Locks of folders and files, so that two processes never write the same results.

A lock is a hidden file beside the results that its process holds locked and removes at the end. The lock ends with the
process, however it ends. The file says who holds it.
"""

import errno
import json
import os
import shlex
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from recontrast.data.json_text import parse_json
from recontrast.data.listing import PathLike
from recontrast.data.system import (
    IS_WINDOWS,
    is_running,
    open_no_follow,
    read_start,
    register_after_fork,
    replace_content,
)
from recontrast.data.temporary import is_lockable, sweep, try_lock

LOCK_NAME = ".recontrast.lock"
_COMMAND_LENGTH = 120  # characters of a command in an error message
_HOLDER_BYTES = 4096  # largest description of a holder that is read
_WAIT_SECONDS = 0.5  # until a process that has just taken a lock must have said who it is


class _Held:
    """Lock that this process holds: the open file, the thread, and how often it was entered."""

    def __init__(self, handle: int, path: str) -> None:
        self.handle, self.path = handle, path
        self.thread, self.depth = threading.get_ident(), 1


_held: dict[str, _Held] = {}  # by the real path of the lock file
_registry_lock = threading.Lock()


def _forget_locks() -> None:
    """Give up the locks of the parent in a forked process, which must not outlive it."""
    for held in _held.values():
        with suppress(OSError):
            os.close(held.handle)
    _held.clear()


register_after_fork(_forget_locks)


@contextmanager
def lock_folder(folder: PathLike, clean: Callable[[Path], None] = sweep) -> Iterator[None]:
    """Hold an exclusive lock on a folder for the length of the block.

    The thread that holds the lock can enter it again.

    Args:
        folder: Folder to lock; created if missing, and removed at the end if it was created here and is empty.
        clean: Function that removes leftovers of killed processes from the folder before the block.

    Raises:
        ValueError: If another process or thread holds the lock. The message says which.
        OSError: If the folder cannot be created or written.
    """
    folder = Path(os.path.abspath(folder))
    created = _create_missing(folder)
    try:
        with _hold(folder / LOCK_NAME, folder, "folder"):
            clean(folder)
            yield
    finally:
        for path in created:
            with suppress(OSError):  # holds results
                path.rmdir()


@contextmanager
def lock_file(path: PathLike) -> Iterator[None]:
    """Hold an exclusive lock on a file that is to be written, as `lock_folder` does for all files of a folder.

    Args:
        path: File, which need not exist; its folder is created if missing.

    Raises:
        ValueError: If another process or thread holds the lock. The message says which.
        OSError: If the folder cannot be created or written.
    """
    path = Path(os.path.abspath(path))
    created = _create_missing(path.parent)
    name = f".{path.name}.lock"
    if len(os.fsencode(name)) > 255:
        name = f".{path.name[:60]}.lock"
    try:
        with _hold(path.with_name(name), path, "file"):
            sweep(path.parent)
            yield
    finally:
        for parent in created:
            with suppress(OSError):  # holds results
                parent.rmdir()


def lock_checkpoint(path: PathLike) -> AbstractContextManager[None]:
    """Hold an exclusive lock on a checkpoint that is to be changed.

    Args:
        path: Path of the checkpoint. A file ``checkpoint.pt`` belongs to a run, whose folder is locked.

    Returns:
        The context in which the lock is held; see `lock_folder` for its errors.
    """
    path = Path(os.path.abspath(path))
    return lock_folder(path.parent) if path.name == "checkpoint.pt" else lock_file(path)


def describe_process() -> dict[str, Any]:
    """Describe this process for those that wait for its lock: pid, host, command and time."""
    program = Path(sys.argv[0] if sys.argv else "python")
    name = program.parent.name if program.name == "__main__.py" else program.name  # python -m recontrast
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": shlex.join([name, *sys.argv[1:]])[:1000],
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


@contextmanager
def _hold(path: Path, reported: Path, kind: str) -> Iterator[None]:
    """Hold the lock file ``path``; errors name ``reported``."""
    key = os.path.realpath(path.parent) + os.sep + path.name
    with _registry_lock:
        held = _held.get(key)
        if held is not None and held.thread == threading.get_ident():
            held.depth += 1
        elif held is not None:
            raise _describe_conflict(reported, kind, describe_process())
        else:
            held = _held[key] = _Held(_acquire(path, reported, kind), key)
    try:
        yield
    finally:
        with _registry_lock:
            held.depth -= 1
            if not held.depth and _held.pop(key, None) is held:
                _release(held.handle, key)


def _release(handle: int, path: str) -> None:
    """Remove a lock file and end the lock."""
    with suppress(OSError):
        if not IS_WINDOWS:  # whoever opened the file before finds it gone
            os.unlink(path)
    with suppress(OSError):
        os.close(handle)
    with suppress(OSError):
        if IS_WINDOWS:  # refused while another process has the file open
            os.unlink(path)


def _acquire(path: Path, reported: Path, kind: str) -> int:
    """Open and lock a lock file, and write into it who holds it; return its descriptor."""
    give_up = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            handle, is_writable = _open(path)
        except OSError as error:
            if error.errno == errno.ENOENT and path.parent.is_dir():  # removed by its holder just now
                continue
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        try:
            if try_lock(handle) and not _is_held_without_lock(handle):
                if _is_current(path, handle):
                    if is_writable:
                        _write_holder(handle)
                        return handle
                    os.unlink(path)  # of another user, left by a killed process
            else:
                holder = _read_holder(handle)
                if holder is not None or time.monotonic() > give_up:
                    raise _describe_conflict(reported, kind, holder)
                time.sleep(0.02)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _open(path: Path) -> tuple[int, bool]:
    """Open a lock file without following a link; return its descriptor and whether it can be written."""
    is_writable = True
    try:
        handle = open_no_follow(path, os.O_RDWR | os.O_CREAT)
    except PermissionError:
        handle, is_writable = open_no_follow(path, os.O_RDONLY), False
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
        kind = "a link" if error.errno == errno.ELOOP else "a folder"
        raise ValueError(f"{path}: wanted a lock file, got {kind}: remove it") from error
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:  # another name may be that of a file to keep
        os.close(handle)
        kind = "a file with several names" if stat.S_ISREG(status.st_mode) else "a special file"
        raise ValueError(f"{path}: wanted a lock file, got {kind}: remove it")
    return handle, is_writable


def _is_current(path: Path, handle: int) -> bool:
    """Return whether an open file still has its name; the holder removes the file before it ends the lock."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(handle))
    except FileNotFoundError:
        return False


def _is_held_without_lock(handle: int) -> bool:
    """Return whether another running process of this machine is named as the holder of a file that we locked.

    That happens only on file systems without locks, or if the holder has died and its number was given again.
    """
    if is_lockable(handle):
        return False
    holder = _read_holder(handle) or {}
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or pid < 1 or pid == os.getpid():
        return False
    return is_running(pid)


def _write_holder(handle: int) -> None:
    """Write who holds the lock. A full disk does not prevent it."""
    with suppress(OSError):
        replace_content(handle, json.dumps(describe_process()).encode()[:_HOLDER_BYTES])


def _read_holder(handle: int) -> dict[str, Any] | None:
    """Read who holds a lock; None if it is not written yet."""
    try:
        holder = parse_json(read_start(handle, _HOLDER_BYTES))
    except (OSError, ValueError):
        return None
    return holder if isinstance(holder, dict) else None


def _describe_conflict(reported: Path, kind: str, holder: dict[str, Any] | None) -> ValueError:
    """Return the error that says who holds a lock."""
    got = "one in use"
    if holder is not None:
        pid, host, command, since = (
            "".join(character if character.isprintable() else "?" for character in str(holder.get(name, "unknown")))
            for name in ("pid", "host", "command", "since")
        )
        if len(command) > _COMMAND_LENGTH:
            command = command[: _COMMAND_LENGTH - 3] + "..."
        got += f" since {since[:40]} by process {pid[:20]} on {host[:80]} ({command})"
    return ValueError(f"{reported}: wanted a {kind} that no other process writes to, got {got}")


def _create_missing(folder: Path) -> list[Path]:
    """Create a folder and its parents; return those that were missing, the deepest first."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    return missing
