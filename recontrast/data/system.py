"""What differs between operating systems: processors, flags of open files, and what Windows refuses to do.

Windows neither replaces nor removes a file that is open, and opens no folders.
"""

import ctypes
import errno
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

IS_WINDOWS = os.name == "nt"
REPLACE_SECONDS = 3.0  # for which a file that another program has open is waited for
_STILL_ACTIVE = 259  # exit code of a running process in Windows
_QUERY = 0x1000  # PROCESS_QUERY_LIMITED_INFORMATION


def _get_flag(name: str) -> int:
    return getattr(os, name, 0)


_NO_FOLLOW = _get_flag("O_NOFOLLOW")
NO_WAIT = (
    _get_flag("O_NONBLOCK") | _get_flag("O_NOCTTY") | _get_flag("O_CLOEXEC") | _get_flag("O_BINARY")
    | _get_flag("O_NOINHERIT")
)  # fmt: skip
"""Flags of `os.open` for files that a user names: never wait, pass nothing on to other programs, change no bytes."""


def open_no_follow(path: str | os.PathLike[str], flags: int) -> int:
    """Open a file without following a symbolic link, and without blocking.

    Args:
        path: Path of the file.
        flags: Flags of `os.open`.

    Returns:
        The file descriptor.

    Raises:
        OSError: With the number `errno.ELOOP` if the path is that of a symbolic link.
    """
    if not _NO_FOLLOW and os.path.islink(path):  # Windows has no such flag
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    return os.open(path, flags | _NO_FOLLOW | NO_WAIT, 0o666)


def count_cpus() -> int:
    """Return the number of processors that this process may use: its affinity, and the limit of its container."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        count = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    quota = read_cpu_quota()
    return count if quota is None else max(min(count, math.ceil(quota)), 1)


class ProcessorUse:
    """Measures how many processors other programs have used since it was built.

    Args:
        root: Root of the file system, with ``proc``.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._path = root / "proc/stat"
        self._started = self._read()

    def measure_others(self) -> float | None:
        """Return the processors' worth of time that other programs have used; None where it is not known.

        It is known on Linux, after the twentieth of a second that the counters of the system need.
        """
        now = self._read()
        if self._started is None or now is None or now[0] - self._started[0] < 0.05:
            return None
        seconds, own, used = (after - before for after, before in zip(now, self._started, strict=True))
        return max(used - own, 0.0) / seconds

    def _read(self) -> tuple[float, float, float] | None:
        """Return the time, the processor time of this process and that of all programs, in seconds."""
        try:
            first = self._path.read_text().split("\n", 1)[0].split()
            # user, nice, system, idle, waiting for disks, interrupts (two kinds), taken by other virtual machines
            ticks = [int(value) for value in first[1:9]]
            return time.perf_counter(), time.process_time(), (sum(ticks) - sum(ticks[3:5])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, AttributeError):
            return None


def read_cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the processors' worth of time that the control groups of this process allow it.

    Args:
        root: Root of the file system, with ``proc`` and ``sys``.

    Returns:
        Processors, such as 1.5; None without a limit, or without control groups (Linux has them).
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    quotas = []
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")  # version 1 has a folder for each controller
        folder = mount / path.lstrip("/")
        for group in (folder, *folder.parents):  # a container may see its own group at the mount alone
            quotas.append(_read_quota_file(group))
            if group == mount:
                break
    return min((quota for quota in quotas if quota is not None), default=None)


def _read_quota_file(group: Path) -> float | None:
    """Return the limit of one control group, of version 2 or 1."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = (int(word) for name in names for word in (group / name).read_text().split())
        except (OSError, ValueError):  # "max": no limit
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None


def replace_path(source: Path, target: Path) -> None:
    """Move a file over another one, as `os.replace`.

    Windows refuses it while another program, such as a service that loads the file or a virus scanner, has the target
    open. It is therefore tried again there, for at most `REPLACE_SECONDS`.

    Args:
        source: File to move.
        target: File that is replaced, or a new name.

    Raises:
        OSError: If the file cannot be moved.
    """
    end = time.monotonic() + REPLACE_SECONDS
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if not IS_WINDOWS or time.monotonic() > end:
                raise
        time.sleep(0.05)


def sync_file(path: Path) -> None:
    """Write the content of a file to the disk.

    Args:
        path: File that this process may write.

    Raises:
        OSError: If the file cannot be written.
    """
    _sync(path, os.O_RDWR if IS_WINDOWS else os.O_RDONLY)


def sync_folder(path: Path) -> None:
    """Write the names in a folder to the disk; do nothing on Windows, which has no such call.

    Args:
        path: Folder.

    Raises:
        OSError: If the folder cannot be written.
    """
    if not IS_WINDOWS:
        _sync(path, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_start(handle: int, size: int) -> bytes:
    """Read the first bytes of an open file.

    Args:
        handle: File descriptor.
        size: Largest number of bytes.

    Returns:
        At most ``size`` bytes.
    """
    os.lseek(handle, 0, os.SEEK_SET)
    return os.read(handle, size)


def replace_content(handle: int, content: bytes) -> None:
    """Replace the content of an open file.

    Args:
        handle: File descriptor.
        content: New content.
    """
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, content)


def is_running(pid: int) -> bool:
    """Return whether a process of this machine runs.

    Args:
        pid: Number of the process, at least 1.
    """
    if IS_WINDOWS:  # os.kill would end the process
        return _is_running_on_windows(pid)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def _is_running_on_windows(pid: int) -> bool:
    kernel: Any = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]  # of Windows alone
    process = kernel.OpenProcess(_QUERY, False, pid)
    if not process:
        return False
    code = ctypes.c_ulong()
    is_known = kernel.GetExitCodeProcess(process, ctypes.byref(code))
    kernel.CloseHandle(process)
    return bool(is_known) and code.value == _STILL_ACTIVE


def register_after_fork(function: Callable[[], None]) -> None:
    """Call a function in each forked process, on systems that fork.

    Args:
        function: Function without arguments.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)
