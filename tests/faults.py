"""Faults at the file operations of a command that runs in a forked process: killed, or refused by the system."""

import contextlib
import gc
import io
import json
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from command_line import call

from recontrast.data.locks import LOCK_NAME
from recontrast.data.temporary import complete_commits, is_temporary

_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(folder, strike, number):
    """Call ``strike`` before the file operation ``number`` below a folder; return a list with the operations so far.

    Operations are renames, links, removals, new folders, files opened for writing, and syncs.
    """
    root, operations = os.path.realpath(folder) + os.sep, []

    def record(event, path=""):
        operations.append((event, os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""))
        if len(operations) == number:
            strike()

    def hook(event, arguments):
        if event == "open":
            path, _, flags = arguments
            is_ours = isinstance(flags, int) and flags & _WRITING
        else:
            path, is_ours = (arguments[0] if arguments else ""), event in _EVENTS
        if is_ours and isinstance(path, (str, bytes)) and os.path.realpath(os.fsdecode(path)).startswith(root):
            record(event, path)

    os.fsync = lambda handle: record("os.fsync")  # a killed process loses nothing that it has written
    sys.addaudithook(hook)
    return operations


def kill():
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(code):
    """Return a function that raises the error of the operating system with this number."""

    def strike():
        raise OSError(code, os.strerror(code))

    return strike


def start(action, report):
    """Run a function in a forked process, which writes what it returns to the file ``report``; return its id."""
    child = os.fork()
    if child:
        return child
    gc.freeze()  # the processes share the objects of all modules
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            content = action()
    except BaseException:
        content = {"code": 70, "text": traceback.format_exc()}
    import resource  # which Windows lacks

    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
    Path(report).write_text(json.dumps(content))
    os._exit(0)


def read_delay(process):
    """Return the seconds for which a process was ready to run while others had the CPU; 0 if the system does not tell.

    A busy machine is no hang: a campaign at low priority gets a hundredth of a CPU for minutes.
    """
    try:
        files = Path(f"/proc/{process}/task").glob("*/schedstat")
        return max((int(file.read_text().split()[1]) for file in files), default=0) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def wait(child, report, seconds=120):
    """Return what a process of `start` reported; {"code": -9} if it was killed."""
    started = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        elapsed = time.monotonic() - started
        if elapsed > seconds and elapsed - read_delay(child) > seconds:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"code": "hangs", "text": ""}
        time.sleep(0.005)
    if os.WIFSIGNALED(status):
        return {"code": -os.WTERMSIG(status), "text": ""}
    return json.loads(Path(report).read_text())


def run_command(arguments, folder=None, strike=None, number=0, setup=None):
    """Return a function that runs a command and returns its exit status, output and file operations below a folder."""

    def action():
        if setup is not None:
            setup()
        operations = watch(folder, strike, number) if folder is not None else []
        result = call(*arguments)
        text = result.output
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            text += "".join(traceback.format_exception(result.exception))
        return {"code": result.exit_code, "text": text, "operations": operations}

    return action


def read_folder(folder, normalise):
    """Return the content of all files that are not hidden, as a reader finds them, by name."""
    try:
        complete_commits(folder)
    except ValueError as error:
        return {"unfinished-replacement": str(error)}
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: normalise(name, (folder / name).read_bytes()) for name in names if "/." not in f"/{name}"}


def list_hidden(folder):
    """List locks and temporary files below a folder."""
    found = [path for path in folder.rglob("*") if path.name == LOCK_NAME or is_temporary(path.name)]
    return [str(path.relative_to(folder)) for path in found]


def copy(former, folder):
    """Replace ``folder`` by a copy of ``former``; None leaves nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    if former is not None:
        shutil.copytree(former, folder)
