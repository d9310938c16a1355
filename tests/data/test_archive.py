"""recontrast.data.archive: archives as PyTorch writes them, and those that differ in one byte or one field."""

import io
import struct
import zipfile

import numpy as np
import pytest
import torch

from recontrast.data import archive as module
from recontrast.data.archive import Archive, DamagedArchiveError


def save(**content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def write_zip(members, compression=zipfile.ZIP_STORED, comment=b""):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as target:
        for name, content in members:
            target.writestr(name, content)
        target.comment = comment
    return file.getvalue()


def test_members_of_an_archive(tmp_path):
    values = torch.arange(1000, dtype=torch.float32)
    content = save(values=values)
    opened = Archive(io.BytesIO(content))
    assert {"data.pkl", "data/0", "version"} <= set(opened.members)
    assert opened.read("data/0").tobytes() == values.numpy().tobytes()
    assert opened.read_small("data.pkl").startswith(b"\x80\x02")
    opened.verify(opened.members)
    path = tmp_path / "values.pt"
    path.write_bytes(content)
    with open(path, "rb") as file:
        mapped = Archive(file, mapped=True)
    read = mapped.read("data/0")  # after the file is closed
    assert read.tobytes() == values.numpy().tobytes()
    read[0] = 7  # private to this process
    assert path.read_bytes() == content
    mapped.verify(["data.pkl", "version"])


@pytest.mark.parametrize("mapped", [False, True])
def test_one_changed_byte_is_found(tmp_path, mapped):
    content = bytearray(save(values=torch.zeros(1000)))
    member = Archive(io.BytesIO(content)).members["data/0"]
    content[member.start + 1234] ^= 1
    path = tmp_path / "values.pt"
    path.write_bytes(content)
    with open(path, "rb") as file:
        opened = Archive(file, mapped=mapped)
        assert opened.read("data/0", verify=False)[1234] == 1
        for read in (opened.read, lambda name: opened.verify([name]), opened.read_small):
            with pytest.raises(DamagedArchiveError, match=r"^data/0 differs from its checksum$"):
                read("data/0")
        with pytest.raises(DamagedArchiveError, match=r"^data/1 is missing$"):
            opened.read("data/1")


def test_small_members_have_a_limit(monkeypatch):
    opened = Archive(io.BytesIO(save(values=torch.zeros(1000))))
    monkeypatch.setattr(module, "LARGEST_SMALL_MEMBER", 3999)
    with pytest.raises(DamagedArchiveError, match=r"^data/0 has more than 3,999 bytes$"):
        opened.read_small("data/0")


def test_every_cut_is_refused():
    content = save(values=torch.arange(50.0))
    for length in range(0, len(content), 37):
        with pytest.raises(DamagedArchiveError, match=r"its end is missing|its directory cannot be read"):
            Archive(io.BytesIO(content[:length]))


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    path = tmp_path / "values.pt"
    path.write_bytes(save(values=torch.zeros(100_000)))
    with open(path, "r+b") as file:
        opened = Archive(file)
        file.truncate(2000)
        with pytest.raises(DamagedArchiveError, match=r"^data/0 is cut off$"):
            opened.read("data/0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (write_zip([("a/x", b"1" * 99)], zipfile.ZIP_DEFLATED), "x is compressed or encrypted"),
        (write_zip([("a/x", b"1"), ("b/y", b"2")]), "its members lie in 2 folders"),
        (write_zip([]), "its members lie in 0 folders"),
        (write_zip([("a/x", b"1")], comment=b"more"), "its end is missing"),
        (write_zip([("a/../x", b"1")]), "an invalid name"),
        (write_zip([("a", b"1")]), "an invalid name"),
        (b"not a zip archive", "its end is missing"),
        (b"", "its end is missing"),
    ],
)
def test_archives_of_other_programs_are_refused(content, message):
    with pytest.raises(DamagedArchiveError, match=message):
        Archive(io.BytesIO(content))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_with_one_name_are_refused():
    with pytest.raises(DamagedArchiveError, match="two members have one name"):
        Archive(io.BytesIO(write_zip([("a/x", b"1"), ("a/x", b"2")])))


def test_overlapping_members_are_refused():
    content = bytearray(write_zip([("a/x", b"12345678"), ("a/y", b"87654321")]))
    directory = content.index(b"PK\1\2")
    second = content.index(b"PK\1\2", directory + 4)
    content[second + 42 : second + 46] = bytes(4)  # the second entry points to the first member
    with pytest.raises(DamagedArchiveError, match="y is not where the directory says"):
        Archive(io.BytesIO(content))


def test_a_member_longer_than_the_file_is_refused():
    content = bytearray(write_zip([("a/x", np.arange(64, dtype=np.uint8).tobytes())]))
    entry = content.index(b"PK\1\2")
    content[entry + 20 : entry + 28] = struct.pack("<LL", 640, 640)
    with pytest.raises(DamagedArchiveError, match="a member is longer than the file"):
        Archive(io.BytesIO(content))
