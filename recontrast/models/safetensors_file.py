"""Check of the header of a ``.safetensors`` file: names, types, shapes and positions of its tensors.

The format (https://github.com/huggingface/safetensors) is the length of the header in 8 bytes, the header as JSON, and
the values of all tensors without gaps. It has no checksum: a changed value cannot be noticed.
"""

import json
import math
import os
from typing import Any, BinaryIO

LARGEST_HEADER = 10**8  # bytes, as in the format's own reader
_MOST_DIMENSIONS = 64  # as in PyTorch
_METADATA = "__metadata__"
# Bytes of a value by the name of its type.
DTYPES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}


def check_header(file: BinaryIO) -> None:
    """Check that the header fits the file.

    Args:
        file: File, open for reading; its position changes.

    Raises:
        ValueError: If the file is cut off, the header is not as the format defines it, or the tensors do not fill the
            file exactly.
    """
    file.seek(0)
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    largest = min(LARGEST_HEADER, size - 8)
    if not 2 <= length <= largest:
        raise ValueError(f"header: wanted a length from 2 to {max(largest, 2)} bytes, got {length}")
    spans = []
    for name, entry in _parse_header(file.read(length)).items():
        if name != _METADATA:
            spans.append(_check_tensor(name, entry))
        elif not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
            raise ValueError(f"{_METADATA}: wanted texts by name, got something else")
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            raise ValueError(f"{name}: wanted values from byte {end} on, got {begin}: tensors overlap or leave a gap")
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"values: wanted {end} bytes as the header says, got {size - 8 - length}")


def _parse_header(text: bytes) -> dict[str, Any]:
    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("two entries have the same name")
        return values

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        reason = "too many brackets" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"header: wanted JSON, got something else ({reason})") from error
    if not isinstance(header, dict):
        raise ValueError("header: wanted entries by name, got something else")
    return header


def _check_tensor(name: str, entry: Any) -> tuple[int, int, str]:
    """Return the first byte of a tensor, the byte after its last one, and its name."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name}: wanted dtype, shape and data_offsets, got something else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name}: dtype: wanted one of {', '.join(DTYPES)}, got {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(map(_is_count, shape)):
        raise ValueError(f"{name}: shape: wanted whole numbers of at least 0, got something else")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"{name}: data_offsets: wanted two whole numbers of at least 0, got something else")
    begin, end = offsets
    if end - begin != DTYPES[dtype] * math.prod(shape):
        raise ValueError(f"{name}: data_offsets: wanted {DTYPES[dtype] * math.prod(shape)} bytes, got {end - begin}")
    return begin, end, name


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63
