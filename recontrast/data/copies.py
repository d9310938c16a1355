"""Copies among images: equal files, equal pixels, and pictures that were saved again.

A promise about new images counts how many different good images it was made from. Copies of one picture are one image.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recontrast.data.listing import PathLike, count_images
from recontrast.data.regular_file import open_regular

MOST_SKETCHES = 5000  # images among which near-copies are searched; comparing all pairs of more takes minutes
_SKETCH = 64  # side of a sketch, in pixels
_NEAR = 0.97  # correlation of sketches; different photographs of one part reach 0.95, a file saved again 0.98
_SAME_SCENE = 0.99  # median correlation above which all images show one unchanged scene
_FEW = 8  # images whose mean says nothing about what they have in common
_PIECE = 4096  # bytes read first at the start, middle and end of files of equal size


def group_equal_files(paths: Sequence[PathLike]) -> list[int]:
    """Group files with the same content.

    Only files of equal size are opened, and only those with equal pieces are read whole.

    Args:
        paths: Paths of image files.

    Returns:
        For each file the position of the first file with the same content, which is its own if there is none. Files
        that cannot be read are in groups of their own.
    """
    first = list(range(len(paths)))
    sizes: dict[int, list[int]] = {}
    nodes: dict[tuple[int, int], int] = {}
    for index, path in enumerate(paths):
        try:
            status = os.stat(path)
        except OSError:
            continue
        first[index] = nodes.setdefault((status.st_dev, status.st_ino), index)  # links to one file
        if first[index] == index:
            sizes.setdefault(status.st_size, []).append(index)
    for size, indices in sizes.items():
        groups = [indices]
        for is_whole in (False, True):
            groups = [part for group in groups if len(group) > 1 for part in _divide(paths, group, size, is_whole)]
        for group in groups:
            for index in group:
                first[index] = group[0]
    return [first[group] for group in first]


def _divide(paths: Sequence[PathLike], group: Sequence[int], size: int, is_whole: bool) -> list[list[int]]:
    """Divide files of equal size by the hash of their content, or of three pieces of it."""
    parts: dict[object, list[int]] = {}
    for index in group:
        try:
            with open_regular(paths[index], "an image") as file:
                digest = hashlib.blake2b(digest_size=16)
                if is_whole:
                    while block := file.read(1 << 20):
                        digest.update(block)
                else:
                    for start in (0, size // 2, max(size - _PIECE, 0)):
                        file.seek(start)
                        digest.update(file.read(_PIECE))
                parts.setdefault(digest.digest(), []).append(index)
        except (OSError, ValueError):  # reported when the image is decoded
            parts[index] = [index]
    return list(parts.values())


def describe_copies(paths: Sequence[PathLike], first: Sequence[int]) -> str | None:
    """Describe copies in a sentence.

    Args:
        paths: Paths or names of the images.
        first: Position of the first image with the same content, for each image.

    Returns:
        The number of copies with the first pair; None if there are none.
    """
    copies = [index for index, group in enumerate(first) if group != index]
    if not copies:
        return None
    count = len(first) - len(copies)
    pair = f"{paths[copies[0]]} is a copy of {paths[first[copies[0]]]}"
    return f"{len(first)} images are {count_images(count, 'different image')}, for example {pair}"


def sketch_image(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Reduce an image to the fine structure that stays when it is saved again or rescaled.

    Args:
        pixels: (H, W, 3) uint8.

    Returns:
        Grey image of at most 64 x 64 pixels, flattened, float32.
    """
    side = min(_SKETCH, *pixels.shape[:2])
    grey = Image.fromarray(np.ascontiguousarray(pixels)).convert("L")
    return np.asarray(grey.resize((side, side), Image.Resampling.BOX), np.float32).ravel()


def find_near_copies(sketches: NDArray[np.float32]) -> list[tuple[int, int]]:
    """Find pictures that seem to be the same photograph, saved again or rescaled.

    The fine structure of two images is compared after what all images have in common is subtracted, so that photographs
    of the same part in a fixed position are different images. If nearly nothing is left, all of them count as copies.

    Args:
        sketches: Results of `sketch_image`, (n, m) float32.

    Returns:
        For each image with an earlier near-copy, the position of the earlier one and its own; empty for more than
        `MOST_SKETCHES` images.
    """
    n = len(sketches)
    if n < 2 or n > MOST_SKETCHES:
        return []
    fine = _sharpen(sketches)
    pairs = _find_pairs(_normalise(fine), _SAME_SCENE, whole=True)
    if not pairs and n >= _FEW:
        pairs = _find_pairs(_normalise(fine - fine.mean(0)), _NEAR)
    return pairs


def _sharpen(sketches: NDArray[np.float32]) -> NDArray[np.float32]:
    """Subtract from each pixel the mean of its 5 x 5 neighbourhood."""
    side = round(sketches.shape[1] ** 0.5)
    images = sketches.reshape(-1, side, side)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)), mode="edge")
    total = np.zeros_like(images)
    for top in range(5):
        for left in range(5):
            total += padded[:, top : top + side, left : left + side]
    return (images - total / np.float32(25)).reshape(len(sketches), -1)


def _normalise(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    centred = rows - rows.mean(1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.divide(centred, norm, out=np.zeros_like(centred), where=norm > 1e-3)


def _find_pairs(rows: NDArray[np.float32], limit: float, whole: bool = False) -> list[tuple[int, int]]:
    """Return pairs of rows that correlate above ``limit``; with ``whole``, only if most rows do."""
    pairs, best = [], []
    for start in range(0, len(rows), 512):
        block = rows[start : start + 512] @ rows.T
        for index, line in enumerate(block, start):
            line[index] = -1
            best.append(float(line.max()))
            earlier = np.flatnonzero(line[:index] >= limit)
            if earlier.size:
                pairs.append((int(earlier[0]), index))
    return [] if whole and np.median(best) < limit else pairs


def describe_near_copies(paths: Sequence[PathLike | Path], pairs: Sequence[tuple[int, int]]) -> str | None:
    """Describe near-copies in a sentence.

    Args:
        paths: Paths or names of the images.
        pairs: Result of `find_near_copies`.

    Returns:
        The sentence; None if there are none.
    """
    if not pairs:
        return None
    first, second = pairs[0]
    return (
        f"{len(pairs)} of {len(paths)} images seem to be another one of them, saved again or rescaled (for example "
        f"{paths[second]} and {paths[first]}): the promise counts them as different images"
    )
