"""A folder that cannot be written is named before any work is done for it."""

import errno
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import fails
from tiny import tiny_set

from recontrast.app.options import check_writable
from recontrast.data.atomic import replace_file

# There is no checkpoint and there are no images: whoever looks for them first says so in place of the folder.
COMMANDS = {
    "evaluate": ["evaluate", "no.pt", "none", "--out", "{out}"],
    "predict": ["predict", "no.pt", "none", "--out", "{out}"],
    "ray": ["predict", "no.pt", "none", "--engine", "ray", "--out", "{out}"],
    "export": ["export", "no.pt", "--format", "onnx", "--out", "{out}/d.onnx"],
    "report": ["report", "no.pt", "none", "--out", "{out}/r.html"],
    "reproduce": ["reproduce", "mvtec", "--data", "none", "--out", "{out}"],
    "prepare": ["prepare", "visa", "--source", "none", "--out", "{out}"],
    "demo": ["demo", "--out", "{out}"],
    "train": ["train", "{data}", "--out", "{out}"],
    "compare": ["compare", "{data}", "--out", "{out}"],
    "audit": ["audit", "{data}", "--out", "{out}"],
    "watch": ["watch", "none", "no.pt", "--out", "{out}"],
    "list": ["list", "none", "--out", "{out}/l.csv"],
    "benchmark": ["benchmark", "no.pt", "--out", "{out}/b.json"],
}
BESIDE = {  # what they write stands beside the checkpoint, or in it
    "DETECTOR": ["calibrate", "{out}/no.pt", "--good", "{data}", "--false-alarm-rate", "0.5"],
    "RUN": ["export", "{out}/no.pt", "--format", "onnx"],
    "RUN ": ["report", "{out}/no.pt"],
}


@pytest.fixture(scope="module")
def open_folder():
    """A folder that everybody may read, whoever we are: those of pytest are their owner's alone."""
    folder = Path(tempfile.mkdtemp())
    tiny_set(folder / "data", train=2, good=0, defects=0)
    (folder / "ro").mkdir()
    (folder / "ro/no.pt").write_text("no checkpoint")
    for place in (folder, *folder.rglob("*")):
        place.chmod(0o755 if place.is_dir() else 0o644)
    (folder / "ro").chmod(0o555)
    yield folder
    shutil.rmtree(folder)


@contextmanager
def somebody():
    """Without root's rights, to which no permission bit applies."""
    if os.geteuid():
        yield
        return
    try:
        os.seteuid(65534)
    except OSError:  # no such user where root is one of a namespace
        pytest.skip("a root that may not become somebody else")
    try:
        yield
    finally:
        os.seteuid(0)


def said(words, out, data=None):
    return fails(*(word.format(out=out, data=data) for word in words))


def test_every_command_that_writes_is_here():
    from recontrast.app.cli import app

    names = {found.name or found.callback.__name__ for found in app.registered_commands}
    assert names - {"info", "doctor", "serve"} == {words[0] for words in (*COMMANDS.values(), *BESIDE.values())}


@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_said_first(command, open_folder, tmp_path):
    words, wanted = COMMANDS[command], "recontrast: --out: wanted a folder that can be written, got"
    (tmp_path / "file").write_text("mine")
    for out, reason in ((tmp_path / "file", "not a folder"), (tmp_path / "file/a", f"{tmp_path}/file is not a folder")):
        assert said(words, out, open_folder / "data") == f"{wanted} {out} ({reason})"
    assert (tmp_path / "file").read_text() == "mine" and os.listdir(tmp_path) == ["file"]
    assert re.fullmatch(rf"{wanted} /proc/none \([a-z ]+\)", said(words, "/proc/none", open_folder / "data"))
    with somebody():
        for out in (open_folder / "ro", open_folder / "ro/new/run"):
            assert said(words, out, open_folder / "data") == f"{wanted} {out} (permission denied)"
    assert os.listdir(open_folder / "ro") == ["no.pt"]


@pytest.mark.parametrize("option", BESIDE)
def test_nothing_can_be_written_beside_a_checkpoint(option, open_folder):
    place, data = open_folder / "ro", open_folder / "data"
    wanted = f"recontrast: {option.strip()}: wanted a folder that can be written, got"
    with somebody():
        assert said(BESIDE[option], place, data) == f"{wanted} {place} (permission denied)"
    missing = said(BESIDE[option], "/proc/none", data)
    assert "no.pt" in missing and "can be written" not in missing


def test_what_can_be_written_is_left_as_it_is(tmp_path):
    check_writable(tmp_path / "new" / "run")
    check_writable(tmp_path)
    check_writable(Path())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_too(tmp_path, monkeypatch):
    def full(**options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ValueError, match=r"got .*run \(no space left on device\)$"):
        check_writable(tmp_path / "run")


def test_bytes_are_named_where_they_are_the_reason(open_folder):
    with somebody(), pytest.raises(OSError, match=rf"^cannot write {open_folder}/ro/a: Permission denied$"):
        with replace_file(open_folder / "ro" / "a", size=7):
            raise AssertionError("never reached")
    for code, bytes_named in ((errno.EDQUOT, True), (errno.EFBIG, True), (errno.EIO, False)):
        with pytest.raises(OSError, match="a: ") as caught, replace_file(open_folder / "a", size=7):
            raise OSError(code, os.strerror(code))
        assert ("wanted 7 bytes" in str(caught.value)) is bytes_named
