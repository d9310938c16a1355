"""ONNX files, checked before ONNX Runtime reads them.

The format is that of onnx.proto (https://github.com/onnx/onnx), in the encoding of Protocol Buffers. Only what the
checks need is decoded here, so that they need no package.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from recontrast.data.regular_file import read_bytes
from recontrast.inference.file_checks import (
    CHECKSUM_KEY,
    KEY,
    ForeignFileError,
    check_checksum,
    parse_description,
)

LARGEST = 2**31  # bytes, the limit of Protocol Buffers
# Metadata entry of the checksum: its key, then the tag and the length (64) of its value.
CHECKSUM_PREFIX = CHECKSUM_KEY.encode() + b"\x12\x40"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
# Numbers of fields in onnx.proto.
_MODEL_GRAPH, _MODEL_OPSET, _MODEL_METADATA, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 8, 14, 20, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_SPARSE = 1, 5, 15
_NODE_ATTRIBUTE, _NODE_DOMAIN = 5, 7
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14


def read_onnx(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Read an ONNX file that `recontrast export` wrote.

    Args:
        path: Path of the file.

    Returns:
        The content of the file, and its description.

    Raises:
        ForeignFileError: If the file has no valid description, refers to other files, or has operators of other
            domains, loops, branches or functions.
        ValueError: If the file is damaged.
        OSError: If the file cannot be read.
    """
    content = read_bytes(path, "an ONNX file", LARGEST)
    whole = memoryview(content)
    text = None
    try:
        for number, value in _iterate_fields(whole):
            if number == _MODEL_METADATA:
                entry = {key: bytes(part).decode() for key, part in _iterate_fields(value)}
                text = entry.get(2) if entry.get(1) == KEY else text
    except (IndexError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise ValueError("the file is cut off or damaged") from error
    description = parse_description(path, text)
    check_checksum(content, CHECKSUM_PREFIX, description)
    try:
        reason = _find_foreign(whole)
    except (IndexError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise ValueError("the file is cut off or damaged") from error
    if reason is not None:
        raise ForeignFileError(f"{path}: wanted a file that recontrast export wrote, got one with {reason}")
    return content, description


def _find_foreign(model: memoryview) -> str | None:
    """Return what a model holds that `recontrast export` never writes; None if there is nothing."""
    for number, value in _iterate_fields(model):
        if number in (_MODEL_TRAINING, _MODEL_FUNCTIONS):
            return "functions"
        if number == _MODEL_OPSET:
            for key, domain in _iterate_fields(value):
                if key == 1 and bytes(domain) not in (b"", b"ai.onnx"):
                    return f"operators of the domain {bytes(domain)[:40]!r}"
        if number == _MODEL_GRAPH:
            for part, item in _iterate_fields(value):
                if part == _GRAPH_SPARSE:
                    return "sparse weights"
                if part == _GRAPH_INITIALIZER and _is_external(item):
                    return "weights in another file"
                if part == _GRAPH_NODE and (reason := _find_foreign_node(item)):
                    return reason
    return None


def _find_foreign_node(node: memoryview) -> str | None:
    for number, value in _iterate_fields(node):
        if number == _NODE_DOMAIN and bytes(value) not in (b"", b"ai.onnx"):
            return f"operators of the domain {bytes(value)[:40]!r}"
        if number == _NODE_ATTRIBUTE:
            for key, item in _iterate_fields(value):
                if key in (_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                    return "loops or branches"
                if key in (_ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS) and _is_external(item):
                    return "weights in another file"
    return None


def _is_external(tensor: memoryview) -> bool:
    """Return whether the values of a tensor are in another file."""
    return any(
        number == _TENSOR_EXTERNAL or (number == _TENSOR_LOCATION and value != 0)
        for number, value in _iterate_fields(tensor)
    )


def _iterate_fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Iterate over the fields of a message: their numbers, and integers or bytes.

    Raises:
        IndexError: If the message is cut off or has an unknown wire type.
    """
    position, end = 0, len(message)
    while position < end:
        tag, position = _read_varint(message, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, position = _read_varint(message, position)
            yield number, value
            continue
        if kind == _BYTES:
            length, position = _read_varint(message, position)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise IndexError(f"wire type {kind}")
        if position + length > end:
            raise IndexError("cut off")
        yield number, message[position : position + length]
        position += length


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return the integer at a position, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise IndexError("a number of more than 10 bytes")
