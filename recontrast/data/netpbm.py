"""Read Netpbm files: bitmaps, grey and colour (PBM, PGM, PPM), plain and binary, up to 16 bits.

Pillow scales samples of other maxima than 255 and 65535 one by one in Python, which takes seconds for a photograph, and
rounds them twice.
"""

from dataclasses import dataclass
from typing import IO

import numpy as np
from PIL import Image

from recontrast.data.exact_read import read_exactly
from recontrast.data.samples import FULL_SCALE_KEY, LARGEST_KEY, scale_to_eight_bits

_SPACE = b" \t\n\v\f\r"
_MAX_HEADER_BYTES = 1 << 16  # comments may be long
_PLAIN_BYTES_PER_SAMPLE = 16  # longest text of one plain sample, with spaces and comments


@dataclass(frozen=True)
class NetpbmHeader:
    """Header of a Netpbm file.

    Attributes:
        kind: Digit after the P: 1 and 4 bitmap, 2 and 5 grey, 3 and 6 colour; from 4 on binary.
        width: Width in pixels.
        height: Height in pixels.
        full: Value of the brightest sample.
        start: Offset of the first sample, in bytes.
    """

    kind: int
    width: int
    height: int
    full: int
    start: int


def read_header(file: IO[bytes]) -> NetpbmHeader:
    """Read the header.

    Args:
        file: Netpbm file, at its start.

    Returns:
        The header.

    Raises:
        ValueError: If the header is incomplete or a number is out of range.
    """
    head = file.read(_MAX_HEADER_BYTES)
    kind = int(head[1:2])
    numbers: list[int] = []
    at = 2
    while len(numbers) < (2 if kind in (1, 4) else 3):
        while at < len(head) and head[at] in _SPACE:
            at += 1
        if head[at : at + 1] == b"#":
            at = head.find(b"\n", at)
            if at < 0:
                raise ValueError("an endless comment")
            continue
        end = at
        while end < len(head) and 48 <= head[end] <= 57 and end - at < 10:
            end += 1
        if end == at or end >= len(head):
            raise ValueError("an incomplete header")
        numbers.append(int(head[at:end]))
        at = end
    full = 1 if kind in (1, 4) else numbers[2]
    if min(numbers[:2]) < 1 or not 1 <= full <= 65535:
        raise ValueError(f"the header {' '.join(map(str, numbers))}")
    if kind >= 4:
        if head[at] not in _SPACE:
            raise ValueError("an incomplete header")
        at += 1  # exactly one space before binary samples
    return NetpbmHeader(kind, numbers[0], numbers[1], full, at)


def read_picture(file: IO[bytes], header: NetpbmHeader, full: int | None = None) -> Image.Image:
    """Decode the image.

    Args:
        file: Netpbm file.
        header: Its header.
        full: Sample value that becomes white in colour files of 16 bits; None is 65535.

    Returns:
        Image of mode "L", "RGB", or "I;16" with its full scale in ``info``.

    Raises:
        ValueError: If samples are missing or above the maximum that the header states.
    """
    channels = 3 if header.kind in (3, 6) else 1
    values = _read_values(file, header, channels)
    if header.kind in (1, 4):
        return Image.fromarray((values ^ 1) * np.uint8(255))  # 1 is black
    scale = full if full is not None and header.full == 65535 else header.full
    if channels == 1 and header.full > 255:
        image = Image.fromarray(values.astype(np.uint16, copy=False))
        image.info[FULL_SCALE_KEY] = header.full
        return image
    if header.full == 65535 and full is None:
        levels = (values >> 8).astype(np.uint8)  # as 16-bit colour in PNG and TIFF
    else:
        levels = scale_to_eight_bits(values, scale)
    image = Image.fromarray(levels.reshape(header.height, header.width, 3) if channels == 3 else levels)
    if header.full == 65535:
        image.info[LARGEST_KEY] = int(values.max())
    return image


def read_samples(file: IO[bytes], header: NetpbmHeader) -> np.ndarray:
    """Read the samples as they are.

    Args:
        file: Netpbm file.
        header: Its header.

    Returns:
        (H, W) for grey, (H, W, 3) for RGB; uint16, or uint8 for a maximum of at most 255.

    Raises:
        ValueError: If samples are missing or above the maximum that the header states.
    """
    channels = 3 if header.kind in (3, 6) else 1
    values = _read_values(file, header, channels)
    return values.reshape(header.height, header.width, 3) if channels == 3 else values


def _read_values(file: IO[bytes], header: NetpbmHeader, channels: int) -> np.ndarray:
    """Read and check the samples: (rows, samples of a row)."""
    file.seek(header.start)
    read = _read_binary if header.kind >= 4 else _read_plain
    values = read(file, header, (header.height, header.width * channels))
    if header.kind not in (1, 4) and header.full not in (255, 65535) and values.max() > header.full:
        raise ValueError(f"a sample of {values.max()} above the maximum {header.full}")
    return values


def _read_binary(file: IO[bytes], header: NetpbmHeader, shape: tuple[int, int]) -> np.ndarray:
    """Read binary samples: (rows, samples of a row)."""
    height, count = shape
    if header.kind == 4:
        row_bytes = (count + 7) // 8
        packed = np.frombuffer(read_exactly(file, height * row_bytes), np.uint8).reshape(height, row_bytes)
        return np.unpackbits(packed, axis=1, count=count)
    dtype = np.dtype(">u2" if header.full > 255 else "u1")
    values = np.frombuffer(read_exactly(file, height * count * dtype.itemsize), dtype).reshape(shape)
    return values.astype(dtype.newbyteorder("="), copy=False)


def _read_plain(file: IO[bytes], header: NetpbmHeader, shape: tuple[int, int]) -> np.ndarray:
    """Read samples written as decimal numbers: (rows, samples of a row)."""
    count = shape[0] * shape[1]
    text = file.read(count * _PLAIN_BYTES_PER_SAMPLE + _MAX_HEADER_BYTES)
    if b"#" in text:
        text = b"\n".join(line.partition(b"#")[0] for line in text.split(b"\n"))
    if header.kind == 1:  # digits need no space between them
        digits = np.frombuffer(text.translate(None, _SPACE)[:count], np.uint8)
        values = digits.astype(np.int64) - 48
    else:
        if text.translate(None, b"0123456789" + _SPACE):
            raise ValueError("samples that are not decimal numbers")
        values = np.fromstring(text, np.int64, sep=" ")[:count]  # given a count, NumPy leaves missing numbers undefined
    if len(values) < count:
        raise ValueError(f"{len(values)} samples instead of {count}")
    if values.min() < 0 or values.max() > header.full:
        raise ValueError(f"samples of {values.min()} to {values.max()}, where the maximum is {header.full}")
    return values.astype(np.uint16 if header.full > 255 else np.uint8).reshape(shape)
