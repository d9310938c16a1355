"""recontrast.data.locks: one writer for each folder, and the others are told who it is."""

import errno
import json
import os
import re
import signal
import socket
import threading
import time

import pytest

from recontrast.data import locks, temporary
from recontrast.data.locks import LOCK_NAME, lock_file, lock_folder


@pytest.fixture
def start_holder():
    """Return a function that starts a process which holds a lock until it is killed; the lock is taken on return."""
    children = []

    def start(context, argv=("recontrast", "train", "data")):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            locks.sys.argv = list(argv)
            with context:
                os.write(write, b"x")
                signal.pause()
        children.append(child)
        os.read(read, 1)
        os.close(read)
        os.close(write)
        return child

    yield start
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_the_second_writer_is_told_who_holds_the_folder(tmp_path, start_holder):
    child = start_holder(lock_folder(tmp_path))
    pattern = (
        rf"^{re.escape(str(tmp_path))}: wanted a folder that no other process writes to, got one in use since "
        rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d by process {child} on {re.escape(socket.gethostname())} "
        r"\(recontrast train data\)$"
    )
    before = time.monotonic()
    for _ in range(2):
        with pytest.raises(ValueError, match=pattern), lock_folder(tmp_path):
            raise AssertionError("the block must not run")
    assert time.monotonic() - before < 5


def test_a_stopped_process_still_holds_its_lock(tmp_path, start_holder):
    child = start_holder(lock_file(tmp_path / "page.html"))
    os.kill(child, signal.SIGSTOP)
    with pytest.raises(ValueError, match=r"page.html: wanted a file that no other process writes to, got one in use"):
        with lock_file(tmp_path / "page.html"):
            raise AssertionError("the block must not run")
    with lock_file(tmp_path / "other.html"):
        pass


def test_the_lock_of_a_killed_process_does_not_block(tmp_path):
    child = os.fork()
    if not child:
        with lock_folder(tmp_path / "new" / "out"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.listdir(tmp_path / "new/out") == [LOCK_NAME]
    with lock_folder(tmp_path / "new" / "out"):
        pass
    assert os.listdir(tmp_path / "new/out") == []


def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    with lock_folder(tmp_path):
        child = os.fork()
        if not child:
            signal.pause()
    with lock_folder(tmp_path):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_one_thread_enters_again_and_another_does_not(tmp_path):
    errors = []

    def enter():
        try:
            with lock_folder(tmp_path):
                pass
        except ValueError as error:
            errors.append(str(error))

    with lock_folder(tmp_path):
        with lock_folder(tmp_path / "."):
            pass
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert len(errors) == 1 and f"by process {os.getpid()} on" in errors[0]
    enter()
    assert len(errors) == 1


def test_what_was_not_there_is_gone_after_the_lock(tmp_path):
    with lock_folder(tmp_path / "a" / "b"):
        assert os.listdir(tmp_path / "a/b") == [LOCK_NAME]
    assert os.listdir(tmp_path) == []
    with lock_folder(tmp_path / "a" / "b"):
        (tmp_path / "a/b/result").write_text("x")
    assert os.listdir(tmp_path / "a/b") == ["result"]


def test_a_strange_holder_is_described_in_one_line(tmp_path, start_holder):
    start_holder(lock_folder(tmp_path), ["tool", "line\nbreak\x1b[31m", "x" * 5000, "\udcff"])
    with pytest.raises(ValueError, match="got one in use since") as error, lock_folder(tmp_path):
        raise AssertionError("the block must not run")
    assert str(error.value).isprintable() and len(str(error.value)) < 500


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "hard link"])
def test_a_lock_file_of_another_kind_is_named(tmp_path, kind):
    (tmp_path / "precious").write_text("mine")
    make = {
        "link": lambda path: path.symlink_to("precious"),
        "folder": lambda path: path.mkdir(),
        "pipe": os.mkfifo,
        "hard link": lambda path: path.hardlink_to(tmp_path / "precious"),
    }
    make[kind](tmp_path / LOCK_NAME)
    with pytest.raises(ValueError, match=f"{LOCK_NAME}: wanted a lock file, got a "), lock_folder(tmp_path):
        raise AssertionError("the block must not run")
    assert (tmp_path / "precious").read_text() == "mine"


def test_without_locks_a_running_process_of_this_machine_is_found(tmp_path, monkeypatch):
    """On a file system without locks, the lock file says who holds the folder; the dead do not count."""

    def refuse(handle, *, blocking):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(temporary, "lock_descriptor", refuse)
    child = os.fork()
    if not child:
        signal.pause()
    holder = {"pid": child, "host": socket.gethostname(), "command": "recontrast train", "since": "now"}
    (tmp_path / LOCK_NAME).write_text(json.dumps(holder))
    with pytest.raises(ValueError, match=f"got one in use since now by process {child} on "), lock_folder(tmp_path):
        raise AssertionError("the block must not run")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with lock_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_many_processes_take_turns(tmp_path):
    """Sixteen processes add to a number; each holds the lock once, and none loses what another wrote."""
    (tmp_path / "number").write_text("0")
    children = []
    for _ in range(16):
        child = os.fork()
        if not child:
            while True:
                try:
                    with lock_folder(tmp_path):
                        number = int((tmp_path / "number").read_text())
                        time.sleep(0.002)
                        (tmp_path / "number").write_text(f"{number + 1}")
                    os._exit(0)
                except ValueError:
                    time.sleep(0.001)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 16
    assert (tmp_path / "number").read_text() == "16"
