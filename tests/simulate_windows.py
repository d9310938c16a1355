"""Makes this Python refuse what Windows refuses, as far as the package meets it; run before the package is imported.

    python tests/simulate_windows.py COMMAND ...             # the command line of recontrast
    PYTHONPATH=tests pytest -p no:xdist -p simulate_windows tests/data   # tests

Windows has no SIGHUP, no fork, no named pipes and no scheduling calls, opens no folders, and neither replaces nor
removes a file or a folder that this process has open or mapped. Signal 0 ends a process there. Names and paths are
those of this system.
"""

import errno
import os
import signal
import sys
from pathlib import Path

import pytest

ABSENT = ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "sched_getaffinity", "process_cpu_count",
          "register_at_fork", "pread", "pwrite", "fork", "mkfifo", "chown", "killpg", "setsid", "getpgid",
          "getloadavg")  # fmt: skip
ABSENT_MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "termios")


def _list_open() -> set[str]:
    """Return the paths that this process has open or mapped."""
    paths = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            paths.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:  # the descriptor of this listing
            continue
    for line in Path("/proc/self/maps").read_text().splitlines():
        _, _, path = line.partition("/")
        if path:
            paths.add(f"/{path}")
    return paths


def _refuse_open(path) -> None:
    path = os.path.realpath(os.path.dirname(os.path.abspath(os.fsdecode(path)))) + os.sep + os.path.basename(
        os.fsdecode(path))  # fmt: skip
    for name in _list_open():
        if name == path or name.startswith(path + os.sep):
            raise PermissionError(errno.EACCES, f"simulated Windows: {name} is open", path)


def simulate() -> None:
    """Change the modules os and signal of this process."""
    import filelock  # noqa: F401  # it has another lock for Windows
    import timm  # noqa: F401  # with torch: what they do at import is not tested

    real = {name: getattr(os, name) for name in ("open", "replace", "rename", "unlink", "remove", "rmdir", "kill")}

    def open_file(path, flags, *rest, **options):
        if not isinstance(path, int) and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "simulated Windows: a folder", os.fsdecode(path))
        return real["open"](path, flags, *rest, **options)

    def replace(source, target, **options):
        _refuse_open(source)
        _refuse_open(target)
        if os.path.isdir(target):
            raise PermissionError(errno.EACCES, "simulated Windows: the target is a folder", os.fsdecode(target))
        return real["replace"](source, target, **options)

    def rename(source, target, **options):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "simulated Windows: the target exists", os.fsdecode(target))
        return replace(source, target, **options)

    def remove(path, **options):
        is_temporary_file = sys._getframe(1).f_globals.get("__name__") == "tempfile"  # which Windows removes itself
        if options.get("dir_fd") is None and not is_temporary_file:
            _refuse_open(path)
        return real["unlink"](path, **options)

    def kill(pid, number):
        if number == 0:
            raise AssertionError("simulated Windows: os.kill(pid, 0) ends the process")
        return real["kill"](pid, number)

    os.open, os.replace, os.rename, os.unlink, os.remove, os.kill = open_file, replace, rename, remove, remove, kill
    for name in ABSENT:
        if hasattr(os, name):
            delattr(os, name)
    for name in ("SIGHUP", "SIGUSR1", "SIGKILL"):
        delattr(signal, name)
    for name in ABSENT_MODULES:
        sys.modules[name] = None  # type: ignore[assignment]  # an import is refused
    import multiprocessing
    import shutil
    import subprocess

    subprocess.Popen.kill = lambda process: process.send_signal(9)  # needs no signal there
    multiprocessing.set_start_method("spawn")
    shutil._use_fd_functions = False  # as in a Python without the functions for folder descriptors
    import recontrast.data.system

    recontrast.data.system.IS_WINDOWS = True  # before the modules that import the name


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests():
    """As a plugin of pytest: before a conftest.py imports the package."""
    simulate()


if __name__ == "__main__":
    simulate()
    from recontrast.app.cli import main

    sys.argv[0] = "recontrast"
    main()
