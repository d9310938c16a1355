"""Checks shared by all formats of exported detectors: the stored description, and the checksum of the file."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recontrast.checkpoint.fields import is_finite, is_images, parse_calibration, parse_recipe
from recontrast.data.json_text import parse_json
from recontrast.data.sidecar import compute_sha256
from recontrast.recipes.describe import describe_value

__all__ = ["ForeignFileError", "check_checksum", "compute_sha256", "parse_description", "write_checksum"]
FORMAT = 1  # increased when inputs, outputs or the description change their meaning
KEY = "recontrast"  # metadata key of the description
CHECKSUM_KEY = "recontrast_sha256"  # metadata key of the SHA-256 of the file, computed with zeros in its place
NO_CHECKSUM = "0" * 64
PRECISIONS = ("float32", "float16", "bfloat16", "int8")  # of a file, in its description; older files have float32
_LARGEST_DESCRIPTION = 2**26  # characters; the scores and appearances of a million calibration images


class ForeignFileError(ValueError):
    """A file that `recontrast export` did not write, or did not write like this."""


def parse_description(path: Path, text: str | None) -> dict[str, Any]:
    """Parse and check the description in an exported file.

    Args:
        path: Path of the file, for error messages.
        text: Description as JSON; None if the file has none.

    Returns:
        The description, with the recipe and the calibration as they are stored.

    Raises:
        ForeignFileError: If there is no description, it is damaged, has another format version, or a field is invalid.
    """
    if text is None:
        raise ForeignFileError(f"{path}: wanted a file that recontrast export wrote, got one of another origin")
    try:
        if len(text) > _LARGEST_DESCRIPTION:
            raise ValueError(f"more than {_LARGEST_DESCRIPTION:,} characters")
        description = parse_json(text)
        file_format, version = description["format"], description["recontrast"]
    except (ValueError, TypeError, LookupError) as error:
        raise ForeignFileError(
            f"{path}: wanted a file that recontrast export wrote, got one with a damaged description"
        ) from error
    if type(file_format) is not int or file_format != FORMAT:
        raise ForeignFileError(
            f"{path}: wanted an exported detector of format {FORMAT}, got format {describe_value(file_format)}, "
            f"written by recontrast {describe_value(version).strip(chr(39))}: export it again"
        )
    if missing := [key for key in ("recipe", "calibration", "category", "top") if key not in description]:
        raise ForeignFileError(f"{path}: the description of the exported detector lacks {', '.join(missing)}")
    try:
        tile = parse_recipe(description["recipe"]).tile
        parse_calibration(description["calibration"])
    except ValueError as error:
        raise ForeignFileError(f"{path}: {error}") from error
    category, top, images = description["category"], description["top"], description.get("images")
    if images is not None and not is_images(images):
        raise ForeignFileError(f"{path}: images: wanted a description of images, got {describe_value(images)}")
    precision = description.get("precision", "float32")
    if precision not in PRECISIONS:
        raise ForeignFileError(f"{path}: precision: wanted {', '.join(PRECISIONS)}, got {describe_value(precision)}")
    overlap = description.get("overlap")
    if tile is not None and not (type(overlap) is int and 0 <= overlap < tile):
        raise ForeignFileError(
            f"{path}: overlap: wanted from 0 to {tile - 1} px (tiles of {tile} px), got {describe_value(overlap)}"
        )
    _check_input(path, description)
    if not isinstance(category, str):
        raise ForeignFileError(f"{path}: category: wanted a name, got {describe_value(category)}")
    if not is_finite(top) or top <= 0:
        raise ForeignFileError(f"{path}: top: wanted a number above 0, got {describe_value(top)}")
    return dict(description)


def _check_input(path: Path, description: Mapping[str, Any]) -> None:
    """Raise an error unless the lengths of the input that a file fixes are numbers above 0."""
    size, batch = description.get("input_size"), description.get("input_batch")
    lengths: list[Any] = size if isinstance(size, list) and len(size) == 2 else [None]
    for name, value, numbers in (("input_size", size, lengths), ("input_batch", batch, [batch])):
        if value is not None and not all(type(number) is int and 0 < number < 2**31 for number in numbers):
            wanted = "height and width" if name == "input_size" else "a number of images"
            raise ForeignFileError(f"{path}: {name}: wanted {wanted}, got {describe_value(value)}")


def write_checksum(path: Path, prefix: bytes) -> None:
    """Replace the zeros behind ``prefix`` in a file by the SHA-256 of the file.

    Args:
        path: Path of the file, changed in place.
        prefix: Bytes before the 64 zeros, once in the file.

    Raises:
        ValueError: If the file does not hold the prefix and the zeros.
    """
    content = bytearray(path.read_bytes())
    start = content.rfind(prefix + NO_CHECKSUM.encode()) + len(prefix)
    if start < len(prefix):
        raise ValueError(f"{path}: wanted 64 zeros to replace by the checksum, got none")
    content[start : start + len(NO_CHECKSUM)] = hashlib.sha256(content).hexdigest().encode()
    path.write_bytes(content)


def check_checksum(content: bytes, prefix: bytes, description: Mapping[str, Any]) -> None:
    """Raise an error if a file differs from the checksum in it; files of older versions have none.

    Args:
        content: Bytes of the file.
        prefix: Bytes before the 64 hexadecimal digits of the checksum.
        description: Description in the file, which says whether there is a checksum.

    Raises:
        ValueError: If the checksum is missing or differs.
    """
    start = content.rfind(prefix) + len(prefix)
    if start < len(prefix):
        if description.get("checksum") is None:
            return
        raise ValueError("the file is damaged: its checksum is missing")
    end = start + len(NO_CHECKSUM)
    digest, whole = hashlib.sha256(), memoryview(content)
    for part in (whole[:start], NO_CHECKSUM.encode(), whole[end:]):
        digest.update(part)
    if content[start:end] != digest.hexdigest().encode():
        raise ValueError("the file is damaged: it differs from its checksum")
