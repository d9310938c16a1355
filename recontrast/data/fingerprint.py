"""Fingerprints of decoded images, which identify the training images of a detector."""

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data.sources import FileImages, Images

_BYTES = 8  # length of a fingerprint: a new image matches one of 30,000 by chance once in 6e14


def describe_images(images: Images, block: int = 64) -> dict[str, Any]:
    """Describe the training images for a checkpoint.

    Args:
        images: Images, n of (H, W, 3), uint8, or float32 in [0, 1] with a window.
        block: Number of images to read at a time; the images can be a memory map larger than the memory.

    Returns:
        "count": the number of images. "digest": SHA-256 of all pixels in order, by which a resumed run checks that its
        images are the same. "each": the concatenated fingerprints (`compute_fingerprint`) of all files, or of all
        images if they do not come from files. Training adds "sketches", see `recontrast.data.near_copies`, and
        "groups", the names of the groups of the images, if they have any; and "observed", the number of images and
        augmented copies that a network that is fitted in one pass has observed. A run of an older version that was
        extended has no "count" and no "each".
    """
    digest = hashlib.sha256()
    offsets = images.offsets if isinstance(images, FileImages) else range(len(images) + 1)
    owner = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)).tolist()  # file of each image
    hashes = [hashlib.blake2b(digest_size=_BYTES) for _ in offsets[1:]]

    def update_hashes(start: int, pixels: NDArray[Any]) -> None:
        for index, image in enumerate(pixels, start):
            hashes[owner[index]].update(image.data)

    with ThreadPoolExecutor(1) as pool:  # hashing releases the interpreter lock, so both run at once
        for start in range(0, len(images), block):
            pixels = np.ascontiguousarray(images[np.arange(start, min(start + block, len(images)))])
            update = pool.submit(update_hashes, start, pixels)
            digest.update(repr(pixels.shape[1:]).encode() + pixels.tobytes())
            update.result()
    return {"count": len(images), "digest": digest.hexdigest(), "each": "".join(h.hexdigest() for h in hashes)}


def compute_fingerprint(pixels: NDArray[Any]) -> str:
    """Compute the fingerprint of an image: BLAKE2b of its pixels at network input size.

    Args:
        pixels: (H, W, 3), or (tiles, H, W, 3) for an image that training cuts into tiles: uint8, or float32 in [0, 1]
            with a window.

    Returns:
        8 bytes as 16 hexadecimal digits.
    """
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=_BYTES).hexdigest()


def compute_tiled_fingerprint(tiles: Images, block: int = 16) -> str:
    """Compute the fingerprint of an image that training cuts into tiles, without a copy of all tiles.

    Args:
        tiles: Tiles of the image, n of (H, W, 3), uint8, or float32 in [0, 1] with a window, as in training.
        block: Number of tiles that are in memory at once.

    Returns:
        The result of `compute_fingerprint` for the array of all tiles.
    """
    digest = hashlib.blake2b(digest_size=_BYTES)
    for start in range(0, len(tiles), block):
        digest.update(np.ascontiguousarray(tiles[np.arange(start, min(start + block, len(tiles)))]).data)
    return digest.hexdigest()


def count_files(images: Mapping[str, Any]) -> int | None:
    """Count the images, or parts with several views, in a description; tiles of one image count once.

    Args:
        images: Result of `describe_images`, as stored in a checkpoint.

    Returns:
        The number of files; None for checkpoints from before fingerprints existed.
    """
    return len(images["each"]) // (2 * _BYTES) if "each" in images else None


def read_fingerprints(images: Mapping[str, Any]) -> frozenset[str]:
    """Return the fingerprints in a description of images.

    Args:
        images: Result of `describe_images`, as stored in a checkpoint.

    Returns:
        The fingerprints; empty for checkpoints from before fingerprints existed.
    """
    joined = images.get("each", "")
    return frozenset(joined[start : start + 2 * _BYTES] for start in range(0, len(joined), 2 * _BYTES))
