"""recontrast.checkpoint.unpickle: what torch.save writes is read without running code; everything else is refused."""

import io
import os
import pickle
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch

from recontrast.checkpoint.unpickle import ForeignPickleError, unpickle
from recontrast.data.archive import Archive, DamagedArchiveError


def open_saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return Archive(io.BytesIO(file.getvalue()))


def open_program(program, **members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for name, content in {"data.pkl": program, **members}.items():
            target.writestr(f"archive/{name}", content)
    return Archive(io.BytesIO(file.getvalue()))


def open_without_program():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        target.writestr("archive/version", "3")
    return Archive(io.BytesIO(file.getvalue()))


def test_values_and_tensors_as_torch_reads_them():
    base = torch.arange(24, dtype=torch.float32)
    content = {
        "text": "grün \udcff", "numbers": [1, -70000, 2**70, 0.5, True, None], "tuple": (1, (), (2, 3, 4, 5)),
        "ordered": OrderedDict(a=base.view(4, 6), b=base[6:12], c=base.view(4, 6).T), "empty": torch.empty(0, 3),
        **{f"{dtype}": torch.ones(3, dtype=dtype)
           for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int8, torch.int16,
                         torch.int32, torch.int64, torch.bool)},
    }  # fmt: skip
    read, sources = unpickle(open_saved(content))
    assert list(read) == list(content) and type(read["ordered"]) is OrderedDict
    for name in ("text", "numbers", "tuple"):
        assert read[name] == content[name]
    for name, tensor in {**content["ordered"], **{k: v for k, v in content.items() if k.startswith("torch")}}.items():
        loaded = read["ordered"][name] if name in content["ordered"] else read[name]
        assert torch.equal(loaded, tensor) and loaded.dtype == tensor.dtype and loaded.stride() == tensor.stride()
    assert read["empty"].shape == (0, 3)
    shared = {sources[id(tensor)] for tensor in read["ordered"].values()}
    assert len(shared) == 1  # views of one storage
    read["ordered"]["a"][1, 0] = -1
    assert read["ordered"]["b"][0] == -1


class Runs:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "value", [Runs(os.system, "touch marker"), Runs(eval, "1"), Runs(print), Runs(getattr, "", "join"), {1}, b"raw",
              complex(1), bytearray(b"a"), range(3), torch.Size([1]), torch.device("cpu"), torch.float32]
)  # fmt: skip
def test_other_classes_are_refused_before_they_run(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ForeignPickleError, match=r"^(class|operation) "):
        unpickle(open_saved({"value": value}))
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"", "not a pickle"), (b"garbage", "data.pkl"), (pickle.dumps({"a": 1}, 2)[:-1], "data.pkl"),
        (b"\x80\x02r\xff\xff\xff\x7f.", "index 2147483647"), (b"\x80\x02cos\nsystem\n.", "class os system"),
        (b"\x80\x02.", "data.pkl"), (b"\x80\x02]a.", "data.pkl"), (b"\x80\x02}Q.", "data.pkl"),
    ],
)  # fmt: skip
def test_damaged_programs_are_refused(program, message):
    with pytest.raises(ForeignPickleError, match=message):
        unpickle(open_program(program))


def test_an_archive_without_a_program_or_of_another_byte_order():
    with pytest.raises(ForeignPickleError, match=r"^the archive has no data\.pkl$"):
        unpickle(open_without_program())
    other = b"big" if sys.byteorder == "little" else b"little"
    with pytest.raises(DamagedArchiveError, match=f"^the byte order is not {sys.byteorder}$"):
        unpickle(open_program(pickle.dumps({}, 2), byteorder=other))


def rewrite(change):
    """Return the archive of a tensor of six numbers after a change of its program."""
    file = io.BytesIO()
    torch.save({"t": torch.arange(6.0).view(2, 3)}, file)
    with zipfile.ZipFile(file) as source:
        folder = source.namelist()[0].split("/")[0]
        members = {name.removeprefix(f"{folder}/"): source.read(name) for name in source.namelist()}
    program = change(members.pop("data.pkl"))
    return open_program(program, **members)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"K\x06t", b"K\x07t", "another size or type"),  # number of elements of the storage
        (b"FloatStorage", b"DoubleStorage", "another size or type"),
        (b"K\x02K\x03\x86", b"K\x02K\x04\x86", "shorter than its tensor"),  # shape (2, 4)
        (b"K\x02K\x03\x86", b"K\xffK\x03\x86", "shorter than its tensor"),
        (b"K\x03K\x01\x86", b"K\x00K\x00\x86", None),  # strides of 0 inside the storage
        (b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x009", "data/9 is missing"),
    ],
)
def test_tensors_that_do_not_fit_their_storage_are_refused(old, new, message):
    def change(program):
        assert program.count(old) >= 1
        return program.replace(old, new)

    if message is None:
        assert unpickle(rewrite(change))[0]["t"].tolist() == [[0, 0, 0], [0, 0, 0]]
    else:
        with pytest.raises(DamagedArchiveError, match=message):
            unpickle(rewrite(change))
