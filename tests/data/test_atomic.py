"""recontrast.data.atomic: what is not finished never carries the name."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from recontrast.data.atomic import create_folder, replace_file


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_errors_of_other_files_stay_theirs(tmp_path):
    """Only what writing this file raised is said to be about this file."""
    with pytest.raises(FileNotFoundError) as error, replace_file(tmp_path / "a", size=3):
        (tmp_path / "elsewhere").read_bytes()
    assert error.value.filename == str(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"^no number$"), replace_file(tmp_path / "a"):
        raise OSError("no number")
    with pytest.raises(OSError, match=f"^cannot write {tmp_path / 'a'}: No space left on device$") as error:
        with replace_file(tmp_path / "a"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert error.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_two_may_write_one_small_file(tmp_path):
    with replace_file(tmp_path / "a") as one:
        one.write(b"on")
        with replace_file(tmp_path / "a") as other:
            other.write(b"other")
        one.write(b"e")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_folder_comes_whole(tmp_path, there):
    path = tmp_path / "above" / "out"
    if there:
        path.mkdir(parents=True)
    with create_folder(path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        assert names(path) == [".partial"] if there else not path.exists()
    assert names(path) == ["deep"] and names(path / "deep") == ["file"] and names(path.parent) == ["out"]


def test_folder_that_we_are_in(tmp_path, monkeypatch):
    """An empty folder stays the same one: it may be a mount, or open in a shell."""
    before = tmp_path.stat().st_ino
    monkeypatch.chdir(tmp_path)
    with create_folder(".") as folder:
        (folder / "file").write_text("x")
    assert os.listdir() == ["file"] and tmp_path.stat().st_ino == before


def test_folder_whose_moving_fails(tmp_path, monkeypatch):
    def replace(*arguments):
        if len(names(tmp_path)) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(*arguments)

    real = os.replace
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output error"), create_folder(tmp_path) as folder:
        for name in "abc":
            (folder / name).write_text(name)
    assert names(tmp_path) == []


def test_folder_vanishes_on_failure(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), create_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            raise error
    assert names(tmp_path) == []


def test_folder_refuses_what_is_there(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = names(tmp_path)
    for name, got in (("full", "one that holds mine"), ("file", "a file"), ("dangling", "a file")):
        wanted = f"^{tmp_path / name}: wanted a new or an empty folder, got {got}$"
        with pytest.raises(ValueError, match=wanted), create_folder(tmp_path / name):
            raise AssertionError("never reached")
    assert names(tmp_path) == before
    with pytest.raises(ValueError, match="got one that holds late"), create_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "late").write_text("x")  # by someone else, meanwhile
    assert names(tmp_path) == sorted([*before, "out"]) and names(tmp_path / "out") == ["late"]


@pytest.mark.parametrize("there", [False, True], ids=["new", "empty"])
def test_folder_of_a_killed_run_is_emptied(tmp_path, there):
    code = (
        "import os, sys; from recontrast.data.atomic import create_folder\n"
        "with create_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'left' / 'deep').mkdir(parents=True); (folder / 'link').symlink_to('left')\n"
        "    os.kill(os.getpid(), 9)"
    )
    if there:
        (tmp_path / "out").mkdir()
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")]).returncode == -9
    assert names(tmp_path / "out" if there else tmp_path) == [".partial" if there else ".out.partial"]
    with create_folder(tmp_path / "out") as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == []


def test_folder_is_filled_by_one_process(tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "theirs").write_text("x")
    other = os.open(partial, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        with pytest.raises(ValueError, match=r"out: wanted a folder that no other process writes to, got one in use$"):
            with create_folder(tmp_path / "out"):
                raise AssertionError("never reached")
        assert names(partial) == ["theirs"]
    finally:
        os.close(other)
