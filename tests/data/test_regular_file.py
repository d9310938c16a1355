"""Only regular files are opened, and nothing waits."""

import os
import socket

import pytest

from recontrast.data.regular_file import check_regular, is_regular, open_regular, open_to_change, read_bytes


@pytest.fixture
def kinds(tmp_path, monkeypatch):
    """Return the paths of a folder, a named pipe, a socket, a device, and a link to the pipe, by their names."""
    monkeypatch.chdir(tmp_path)  # the path of a socket is limited to 107 bytes
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    return {
        "a folder": tmp_path,
        "a named pipe": tmp_path / "pipe",
        "a socket": tmp_path / "socket",
        "a device": "/dev/zero",
        "a link to a pipe": tmp_path / "link",
    }


@pytest.mark.parametrize("call", [open_regular, check_regular, read_bytes])
def test_other_kinds_are_refused_by_name(kinds, call):
    for name, path in kinds.items():
        kind = "a named pipe" if "link" in name else name
        with pytest.raises(ValueError) as error:
            call(path, "a recipe in YAML")
        assert str(error.value) == f"{path}: wanted a recipe in YAML, got {kind}"
        assert not is_regular(path)


@pytest.mark.parametrize("call", [open_regular, check_regular, read_bytes])
def test_missing_file(tmp_path, call):
    (tmp_path / "file").touch()
    for path in (tmp_path / "none", tmp_path / "file" / "below"):
        with pytest.raises(FileNotFoundError, match=path.name):
            call(path)
        assert not is_regular(path)


def test_null_byte_is_named():
    with pytest.raises(ValueError, match=r"'a\\x00b': wanted the path of a mask, got one with a null byte"):
        open_regular("a\0b", "a mask")
    assert not is_regular("a\0b")


def test_pipe_that_replaces_the_file_after_the_check(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("recontrast.data.regular_file.check_regular", lambda path, wanted: None)
    with pytest.raises(ValueError, match="got a named pipe"):
        open_regular(tmp_path / "pipe")


def test_content_and_links(tmp_path):
    path = tmp_path / os.fsdecode(b"b\xff\n.yaml")
    path.write_bytes(b"abc")
    (tmp_path / "link").symlink_to(path)
    for name in (path, str(path), tmp_path / "link"):
        with open_regular(name) as file:
            assert file.read() == b"abc"
        assert read_bytes(name, largest=3) == b"abc" and is_regular(name)
    with pytest.raises(ValueError, match="wanted a list of at most 2 bytes, got a larger file"):
        read_bytes(path, "a list", 2)


@pytest.mark.parametrize("append", [False, True])
def test_links_and_other_kinds_are_not_changed(tmp_path, kinds, append):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    links = {}
    for name, target in (("to a file", victim), ("to nothing", tmp_path / "none")):
        links[name] = tmp_path / f"link {name}"
        links[name].symlink_to(target)
    for create in (False, True):
        for path in (*kinds.values(), *links.values()):
            kind = next((kind for kind, other in kinds.items() if other == path), "")
            kind = "a symbolic link" if os.path.islink(path) else kind
            with pytest.raises(ValueError) as error:
                open_to_change(path, "a log", append=append, create=create)
            assert str(error.value).startswith(f"{path}: wanted a log, got {kind}")
    assert victim.read_bytes() == b"mine" and not (tmp_path / "none").exists()


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system follows links when it opens a file")
def test_link_that_replaces_the_file_after_the_check(tmp_path, monkeypatch):
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    monkeypatch.setattr(os, "lstat", os.stat)
    with pytest.raises(ValueError, match="wanted a file, got a symbolic link: remove it"):
        open_to_change(tmp_path / "link", append=True)
    assert (tmp_path / "victim").read_bytes() == b"mine"


def test_file_is_continued(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError):
        open_to_change(path)
    for text, options in ((b"abc", {"append": True, "create": True}), (b"de", {"append": True}), (b"X", {})):
        with open_to_change(path, **options) as file:
            file.write(text)
    assert path.read_bytes() == b"Xbcde"
