"""Find out how many bits a camera uses of the 16-bit samples in its files."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from recontrast.data import images
from recontrast.data.decode import decode, read_bits
from recontrast.data.encoded_image import ImagePage
from recontrast.data.samples import LARGEST_KEY, read_deep
from recontrast.data.system import count_cpus

_CAMERAS = (8, 10, 12, 14)  # bits of usual cameras below 16
_PROBES = 64  # files whose headers are read, to save the time for large sets of 8-bit images


def detect_bits(items: Sequence[Any]) -> int | None:
    """Return the bits of the camera that took a set of images.

    These are the fewest of 8, 10, 12 and 14 bits that hold the samples of all 16-bit images. Only the headers of some
    files are read unless one of them has 16 bits.

    Args:
        items: Image files and PIL images; anything else counts as an image of 8 bits.

    Returns:
        The bits; None if there are no 16-bit images, or their samples need 16 bits.

    Raises:
        OSError: If a file does not exist or cannot be opened.
        ValueError: If a file is not a complete image.
    """
    if not has_deep(items):
        return None
    with ThreadPoolExecutor(count_cpus()) as pool:
        largest = max(pool.map(_read_largest_sample, items), default=0)
    if not largest:
        return None
    return next((bits for bits in _CAMERAS if largest < 1 << bits), None)


def has_deep(items: Sequence[Any]) -> bool:
    """Return whether some of the ``items``, as in `detect_bits`, have 16 bits."""
    return any(_read_bits(item) == 16 for item in items[:: max(len(items) // _PROBES, 1)])


def _read_bits(item: Any) -> int:
    """Return 16 for an image of 16 bits, else 8."""
    if isinstance(item, Image.Image):
        return 16 if item.mode.startswith("I") else 8
    return read_bits(item, images.MAX_PIXELS) if isinstance(item, str | os.PathLike | ImagePage) else 8


def _read_largest_sample(item: Any) -> int:
    """Return the largest sample of a 16-bit image; 0 for other images."""
    if _read_bits(item) < 16:
        return 0
    picture = item if isinstance(item, Image.Image) else decode(item, images.MAX_PIXELS, 65535)
    if LARGEST_KEY in picture.info:
        return int(picture.info[LARGEST_KEY])
    deep = read_deep("image", picture)
    if deep is not None and deep[1] < 65535:  # the file states its range
        return 0
    return int(deep[0].max()) if deep is not None else 0
