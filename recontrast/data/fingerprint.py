"""Fingerprints of decoded images: which images a detector was trained on."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data.sources import Images

_BYTES = 8  # of a fingerprint: among 30,000 images one new image is taken for another once in 6e14


def describe_images(images: Images, block: int = 64) -> dict[str, Any]:
    """What a checkpoint says of the training images.

    Returns:
        "count"; "digest": SHA-256 of all pixels in their order, which tells a resumed run's data from others; "each":
        the `compute_fingerprint` of each file, or of each image where they come from no files, one after the other.
    """
    total = hashlib.sha256()
    first = getattr(images, "offsets", range(len(images) + 1))  # of `ImageCache`: a file may be several tiles
    owner = np.repeat(np.arange(len(first) - 1), np.diff(first)).tolist()
    sums = [hashlib.blake2b(digest_size=_BYTES) for _ in first[1:]]

    def note(start: int, part: NDArray[np.uint8]) -> None:
        for place, one in enumerate(part, start):
            sums[owner[place]].update(one.data)

    with ThreadPoolExecutor(1) as pool:  # both sums let go of the interpreter
        for start in range(0, len(images), block):  # a block at a time: the images may be a memory map
            part = np.ascontiguousarray(images[np.arange(start, min(start + block, len(images)))])
            noted = pool.submit(note, start, part)
            total.update(repr(part.shape[1:]).encode() + part.tobytes())
            noted.result()
    return {"count": len(images), "digest": total.hexdigest(), "each": "".join(one.hexdigest() for one in sums)}


def compute_fingerprint(pixels: NDArray[np.uint8]) -> str:
    """Tells an image from any other: BLAKE2b, 8 bytes in hex, of its pixels as the network is given them.

    Args:
        pixels: (H, W, 3), or (tiles, H, W, 3) of an image that is trained on in tiles.
    """
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=_BYTES).hexdigest()


def read_fingerprints(images: Mapping[str, Any]) -> frozenset[str]:
    """Those in what `describe_images` said; none in what was said before there were any."""
    each = images.get("each", "")
    return frozenset(each[place : place + 2 * _BYTES] for place in range(0, len(each), 2 * _BYTES))
