"""recontrast.data.atomic: unfinished files and folders never have their final name."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from recontrast.data.atomic import create_folder, replace_file


def list_names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_errors_about_other_files_are_unchanged(tmp_path):
    """Only errors from writing the file itself become the message about the file."""
    with pytest.raises(FileNotFoundError) as error, replace_file(tmp_path / "a", size=3):
        (tmp_path / "elsewhere").read_bytes()
    assert error.value.filename == str(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"^no number$"), replace_file(tmp_path / "a"):
        raise OSError("no number")
    with pytest.raises(OSError, match=f"^cannot write {tmp_path / 'a'}: No space left on device$") as error:
        with replace_file(tmp_path / "a"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert error.value.errno == errno.ENOSPC
    assert list_names(tmp_path) == []


def test_two_writers_can_replace_one_file(tmp_path):
    with replace_file(tmp_path / "a") as first:
        first.write(b"fir")
        with replace_file(tmp_path / "a") as second:
            second.write(b"second")
        first.write(b"st")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert list_names(tmp_path) == ["a"]


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_folder_appears_when_complete(tmp_path, exists):
    path = tmp_path / "parent" / "out"
    if exists:
        path.mkdir(parents=True)
    with create_folder(path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        assert list_names(path) == [".partial"] if exists else not path.exists()
    assert list_names(path) == ["deep"] and list_names(path / "deep") == ["file"] and list_names(path.parent) == ["out"]


def test_working_directory_can_be_filled(tmp_path, monkeypatch):
    """An empty folder is filled in place, because it can be a mount point or open in a shell."""
    before = tmp_path.stat().st_ino
    monkeypatch.chdir(tmp_path)
    with create_folder(".") as folder:
        (folder / "file").write_text("x")
    assert os.listdir() == ["file"] and tmp_path.stat().st_ino == before


def test_failed_move_leaves_nothing(tmp_path, monkeypatch):
    original_replace = os.replace

    def replace(*arguments):
        if len(list_names(tmp_path)) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        original_replace(*arguments)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output error"), create_folder(tmp_path) as folder:
        for name in "abc":
            (folder / name).write_text(name)
    assert list_names(tmp_path) == []


def test_failed_block_leaves_nothing(tmp_path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), create_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("x")
            raise error
    assert list_names(tmp_path) == []


def test_existing_content_is_an_error(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = list_names(tmp_path)
    for name, content in (("full", "one that holds mine"), ("file", "a file"), ("dangling", "a file")):
        message = f"^{tmp_path / name}: wanted a new or an empty folder, got {content}$"
        with pytest.raises(ValueError, match=message), create_folder(tmp_path / name):
            raise AssertionError("the block must not run")
    assert list_names(tmp_path) == before
    with pytest.raises(ValueError, match="got one that holds late"), create_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "late").write_text("x")  # another process, in the meantime
    assert list_names(tmp_path) == sorted([*before, "out"]) and list_names(tmp_path / "out") == ["late"]


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_leftovers_of_a_killed_run_are_removed(tmp_path, exists):
    code = (
        "import os, sys; from recontrast.data.atomic import create_folder\n"
        "with create_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'left' / 'deep').mkdir(parents=True); (folder / 'link').symlink_to('left')\n"
        "    os.kill(os.getpid(), 9)"
    )
    if exists:
        (tmp_path / "out").mkdir()
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")]).returncode == -9
    assert list_names(tmp_path / "out" if exists else tmp_path) == [".partial" if exists else ".out.partial"]
    with create_folder(tmp_path / "out") as folder:
        assert list_names(folder) == []
    assert list_names(tmp_path) == ["out"] and list_names(tmp_path / "out") == []


def test_only_one_process_can_fill_a_folder(tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "theirs").write_text("x")
    other = os.open(partial, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    try:
        with pytest.raises(ValueError, match=r"out: wanted a folder that no other process writes to, got one in use$"):
            with create_folder(tmp_path / "out"):
                raise AssertionError("the block must not run")
        assert list_names(partial) == ["theirs"]
    finally:
        os.close(other)
