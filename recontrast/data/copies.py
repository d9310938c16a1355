"""Copies among images: files with the same content, and what is said of images with the same pixels.

A promise about new images counts how many different good images it was made from. Copies of one picture are one image.
`recontrast.data.near_copies` finds pictures that were saved again.
"""

import hashlib
import os
from collections.abc import Sequence

from recontrast.data.listing import PathLike, count_images
from recontrast.data.regular_file import open_regular

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


def describe_copies(paths: Sequence[PathLike], first: Sequence[int], noun: str = "image") -> str | None:
    """Describe copies in a sentence.

    Args:
        paths: Paths or names of the images.
        first: Position of the first image with the same content, for each image.
        noun: What is counted, see `recontrast.recipes.recipe.Recipe.noun`.

    Returns:
        The number of copies with the first pair; None if there are none.
    """
    copies = [index for index, group in enumerate(first) if group != index]
    if not copies:
        return None
    count = len(first) - len(copies)
    pair = f"{paths[copies[0]]} is a copy of {paths[first[copies[0]]]}"
    return f"{len(first)} {noun}s are {count_images(count, f'different {noun}')}, for example {pair}"
