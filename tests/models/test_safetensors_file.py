"""Headers of .safetensors files are checked; a SHA-256 beside a file of weights is compared with it."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from recontrast.models.safetensors_file import DTYPES
from recontrast.models.weights import read_weights

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b.weight": torch.ones(3, dtype=torch.float16),
    "c": torch.tensor(5),
    "none": torch.zeros(0, 4),
    "flags": torch.tensor([True, False, True]),
}


@pytest.fixture
def path(tmp_path):
    save_file(TENSORS, tmp_path / "w.safetensors", metadata={"format": "pt"})
    return tmp_path / "w.safetensors"


def split(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join(path, header, values, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + values)


def refuses(path, message):
    with pytest.raises(ValueError, match=r"wanted a file of tensors, got .*, which cannot be read: ") as error:
        read_weights(path)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700


def test_whole_file_is_read(path):
    tensors = read_weights(path)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], value) for name, value in TENSORS.items())


def test_every_type_of_pytorch_is_known(tmp_path):
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64 " \
            "float8_e4m3fn float8_e5m2"  # fmt: skip
    save_file({name: torch.zeros(2, dtype=getattr(torch, name)) for name in names.split()}, tmp_path / "t.safetensors")
    header, _ = split(tmp_path / "t.safetensors")
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} <= set(DTYPES)
    assert len(read_weights(tmp_path / "t.safetensors")) == len(names.split())


@pytest.mark.parametrize("cut", [0, 3, 8, 9, 100, -1])
def test_cut_file_is_refused(path, cut):
    path.write_bytes(path.read_bytes()[:cut])
    refuses(path, "wanted")


def test_lengths_that_do_not_fit_are_refused(path):
    header, values = split(path)
    for length in (0, 1, 2**40, 2**63, 2**64 - 1):
        join(path, header, values, length)
        refuses(path, "header: wanted a length from 2 to")
    join(path, header, values + b"\0")
    refuses(path, "values: wanted")
    join(path, header, values[:-1])
    refuses(path, "values: wanted")


WRONG = [
    ("dtype", "F128", "a: dtype: wanted one of"),
    ("dtype", 4, "a: dtype: wanted one of"),
    ("dtype", "F64", "a: data_offsets: wanted 48 bytes, got 24"),
    ("shape", [2, 4], "a: data_offsets: wanted 32 bytes, got 24"),
    ("shape", [-2, -3], "a: shape: wanted whole numbers of at least 0"),
    ("shape", [2.0, 3], "a: shape: wanted whole numbers of at least 0"),
    ("shape", [True, 6], "a: shape: wanted whole numbers of at least 0"),
    ("shape", "23", "a: shape: wanted whole numbers of at least 0"),
    ("shape", [1] * 1000, "a: shape: wanted whole numbers of at least 0"),
    ("shape", [2**62, 2**62], "a: data_offsets: wanted"),
    ("data_offsets", [0], "a: data_offsets: wanted two whole numbers"),
    ("data_offsets", [-8, 16], "a: data_offsets: wanted two whole numbers"),
    ("data_offsets", [24, 0], "a: data_offsets: wanted 24 bytes, got -24"),
    ("data_offsets", [2**40, 2**40 + 24], "tensors overlap or leave a gap"),
    ("data_offsets", [4, 28], "tensors overlap or leave a gap"),
    ("more", 1, "a: wanted dtype, shape and data_offsets"),
]


@pytest.mark.parametrize("field, value, message", WRONG)
def test_wrong_entry_is_refused_by_name(path, field, value, message):
    header, values = split(path)
    header["a"][field] = value
    join(path, header, values)
    refuses(path, message)


def test_other_headers_are_refused(path):
    header, values = split(path)
    for text in (b"[]", b"3", b"{" * 50, b"[" * 100_000, b'{"a": 1}', b'{"a": {}}', b"\xff\xfe"):
        join(path, text, values)
        refuses(path, "wanted")
    join(path, json.dumps(header).encode().replace(b'"c"', b'"a"'), values)
    refuses(path, "two entries have the same name")
    for metadata in ([], {"a": 1}, "text"):
        join(path, header | {"__metadata__": metadata}, values)
        refuses(path, "__metadata__: wanted texts by name")


def test_one_flipped_bit_anywhere_in_the_header(path):
    """A flipped bit in a header is refused, or changes a name or a type, but never where the values are read."""
    content, size = path.read_bytes(), sum(value.numel() * value.element_size() for value in TENSORS.values())
    length = 8 + int.from_bytes(content[:8], "little")
    for position in range(length):
        for bit in (1, 16):
            damaged = bytearray(content)
            damaged[position] ^= bit
            path.write_bytes(damaged)
            try:
                tensors = read_weights(path)
            except ValueError as error:
                assert str(error).startswith("weights: wanted") and "\n" not in str(error)
                continue
            assert sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) == size


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_sha256_beside_the_file(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    if suffix == ".pth":
        torch.save(TENSORS, path)
    else:
        save_file(TENSORS, path)
    content = path.read_bytes()
    sidecar = tmp_path / f"w{suffix}.sha256"
    sidecar.write_text(f"{hashlib.sha256(content).hexdigest()}  w{suffix}\n")
    assert read_weights(path).keys() == TENSORS.keys()
    for position in (0, len(content) // 2, len(content) - 1):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=rf"w{suffix}: wanted the SHA-256 in w{suffix}.sha256, got .*: the file is"
        ):
            read_weights(path)
    path.write_bytes(content)
    for text in ("", "no digest", "0" * 63):
        sidecar.write_text(text)
        with pytest.raises(ValueError, match=r"sha256: wanted a SHA-256 as sha256sum writes it, got something else"):
            read_weights(path)
