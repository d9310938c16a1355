"""recontrast.data.atomic: unfinished files and folders never have their final name."""

import errno
import os
import re
import signal

import pytest

from recontrast.data import system, temporary
from recontrast.data.atomic import create_folder, replace_file, replace_files
from recontrast.data.locks import LOCK_NAME, lock_folder


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


def replace_one(folder):
    with replace_file(folder / "a") as file:
        file.write(b"new")


def replace_several(folder):
    with replace_files(folder) as staging:
        (staging / "a").write_bytes(b"new")


@pytest.mark.parametrize("replace", [replace_one, replace_several])
def test_windows_waits_for_a_file_that_is_open(replace, tmp_path, monkeypatch):
    """Windows refuses to replace a file for the moment in which a service reads it; other systems are asked once."""
    original, refusals = os.replace, []

    def refuse(source, target):
        if len(refusals) < refused:
            refusals.append(target)
            raise PermissionError(errno.EACCES, "open in another program", str(target))
        original(source, target)

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(system, "IS_WINDOWS", False)
    refused = 1
    with pytest.raises(OSError, match="open in another program"):
        replace(tmp_path)
    monkeypatch.setattr(system, "IS_WINDOWS", True)
    refusals.clear()
    refused = 3
    replace(tmp_path)
    assert (tmp_path / "a").read_bytes() == b"new" and len(refusals) == 3
    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr(system, "REPLACE_SECONDS", 0.1)
    refused = 1000
    with pytest.raises(OSError, match="open in another program"):
        replace(tmp_path)
    assert (tmp_path / "a").read_bytes() == b"old" and list_names(tmp_path) == ["a"]


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_folder_appears_when_complete(tmp_path, exists):
    path = tmp_path / "parent" / "out"
    if exists:
        path.mkdir(parents=True)
    with create_folder(path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
        assert not path.exists() or (
            exists and all(name == LOCK_NAME or temporary.is_temporary(name) for name in list_names(path))
        )
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
        if (tmp_path / "a").exists():
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
    def fill():
        with create_folder(tmp_path / "out") as folder:
            (folder / "left" / "deep").mkdir(parents=True)
            (folder / "link").symlink_to("left")
            os.kill(os.getpid(), signal.SIGKILL)

    if exists:
        (tmp_path / "out").mkdir()
    kill_during(fill)
    holder = tmp_path / "out" if exists else tmp_path
    assert any(temporary.is_temporary(name) for name in list_names(holder))
    with create_folder(tmp_path / "out") as folder:
        assert list_names(folder) == []
    assert list_names(tmp_path) == ["out"] and list_names(tmp_path / "out") == []


def test_a_move_that_was_killed_is_undone(tmp_path):
    """An empty folder is filled by several renames: the next run starts anew, a reader completes them."""

    def fill(name):
        moves = []

        def replace(source, target):
            if moves:
                os.kill(os.getpid(), signal.SIGKILL)
            moves.append(target)
            os.rename(source, target)

        os.replace = replace
        with create_folder(tmp_path / name) as folder:
            for child in "abc":
                (folder / child).write_text("old")

    for name in ("again", "read"):
        (tmp_path / name).mkdir()
        kill_during(lambda name=name: fill(name))
        assert len(list_names(tmp_path / name)) == 3  # one file, the lock and the temporary folder
    with create_folder(tmp_path / "again") as folder:
        (folder / "d").write_text("new")
    assert list_names(tmp_path / "again") == ["d"]
    temporary.complete_commits(tmp_path / "read")
    assert [name for name in list_names(tmp_path / "read") if name != LOCK_NAME] == ["a", "b", "c"]


def test_several_files_are_replaced_together(tmp_path):
    """Killed at any rename, the files are all old, or all new after the next process came by."""
    for fatal in range(1, 6):
        out = tmp_path / str(fatal)
        out.mkdir()
        for name in ("a", "b", "gone"):
            (out / name).write_text("old")

        def write(fatal=fatal, out=out):
            renames = []

            def rename(source, target, original=os.rename):
                renames.append(target)
                if len(renames) == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                original(source, target)

            os.rename = os.replace = rename
            with replace_files(out, remove=["gone"]) as staging:
                for name in ("a", "b", "c"):
                    (staging / name).write_text("new")
            os._exit(0)

        kill_during(write, may_end=fatal == 5)
        temporary.sweep(out)
        content = {path.name: path.read_text() for path in out.iterdir()}
        new = dict.fromkeys("abc", "new")
        assert content == ({"a": "old", "b": "old", "gone": "old"} if fatal == 1 else new)


def test_a_failed_replacement_keeps_the_old_files(tmp_path):
    (tmp_path / "a").write_text("old")
    with (
        pytest.raises(OSError, match=f"^cannot write {re.escape(str(tmp_path))}: No space left on device$"),
        replace_files(tmp_path),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list_names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_planted_links_are_not_followed(tmp_path):
    (tmp_path / "precious").write_text("mine")
    for name in ("a", "a.partial", LOCK_NAME):
        (tmp_path / name).symlink_to("precious")
    with replace_file(tmp_path / "a", size=3) as file:
        file.write(b"new")
    with pytest.raises(ValueError, match=r"wanted a lock file, got a link: remove it$"), lock_folder(tmp_path):
        raise AssertionError("the block must not run")
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "a").is_symlink()


def test_lock_that_is_a_link_where_the_system_follows_links(tmp_path, monkeypatch):
    """Windows has no O_NOFOLLOW: the lock was tried for ever."""
    monkeypatch.setattr(system, "_NO_FOLLOW", 0)
    (tmp_path / "precious").write_text("mine")
    (tmp_path / LOCK_NAME).symlink_to("precious")
    with pytest.raises(ValueError, match=r"wanted a lock file, got a link: remove it$"), lock_folder(tmp_path):
        raise AssertionError("the block must not run")
    assert (tmp_path / "precious").read_text() == "mine"


def test_only_our_own_leftovers_are_removed(tmp_path):
    """Files of users, files in use and links stay; what a killed process left goes."""
    theirs = [
        ".abc.tmp",
        ".export-settings",
        ".partial",
        "checkpoint.pt.partial",
        ".recontrast-notes.tmp",
        ".mine.partial",
    ]
    for name in theirs:
        (tmp_path / name).write_text("x")
    link = ".recontrast-0123456789abcdef.tmp"
    (tmp_path / link).symlink_to(".abc.tmp")
    recent = [".0123456789ab.tmp"]  # of an earlier version, which may still write them
    for name in recent:
        (tmp_path / name).write_text("x")
    with replace_file(tmp_path / "used") as file:
        used = file.name
        kill_during(lambda: (temporary.create_file(tmp_path), os.kill(os.getpid(), signal.SIGKILL)))
        temporary.sweep(tmp_path)
        assert list_names(tmp_path) == sorted([*theirs, link, *recent, os.path.basename(used)])
    for name in recent:
        os.utime(tmp_path / name, (0, 0))
    temporary.sweep(tmp_path)
    assert list_names(tmp_path) == sorted([*theirs, link, "used"])


@pytest.mark.parametrize(
    "record",
    [
        '{"replace": ["a"], "remove": ["precious"]}',
        '{"replace": ["../precious"], "remove": []}',
        '{"replace": [".."], "remove": []}',
        '{"replace": 3, "remove": []}',
        '{"replace": [3], "remove": []}',
        "[" * 100_000,
        "\0",
        "{}",
    ],
)
def test_a_record_from_somebody_else_removes_nothing(tmp_path, record):
    """A data set may bring a folder with the name of a temporary one."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/precious").write_text("mine")
    (tmp_path / "precious").write_text("mine")
    staging = tmp_path / "data" / ".recontrast-0123456789abcdef.tmp"
    staging.mkdir()
    (staging / temporary.COMMIT).write_text(record)
    with pytest.raises(ValueError, match="wanted a complete folder, got one that a killed command left half replaced"):
        temporary.complete_commits(tmp_path / "data")
    assert (tmp_path / "data/precious").read_text() == (tmp_path / "precious").read_text() == "mine"


def kill_during(action, may_end=False):
    """Run a function in a forked process, which is killed in it."""
    child = os.fork()
    if not child:
        action()
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == -signal.SIGKILL or (may_end and code == 0)
