"""Find image files, in an order that does not depend on the locale or the file system."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""File name suffixes of images, in lower case; upper case is accepted too."""

PathLike = str | os.PathLike[str]


def list_images(paths: PathLike | Iterable[PathLike]) -> list[Path]:
    """List image files.

    Args:
        paths: One or more files and folders. Files are taken as they are; folders are searched with `find_images`.

    Returns:
        The files in the order of ``paths``; the files of a folder in natural order.

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        ValueError: If a folder contains no images.
    """
    images: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        if path.is_dir():
            below = find_images(path)
            if not below:
                others = sum(1 for other in path.rglob("*") if other.is_file() and not is_hidden(other.name))
                got = f"{others} of other kinds" if others else "none"
                raise ValueError(f"{path}: wanted a folder with image files ({', '.join(IMAGE_SUFFIXES)}), got {got}")
            images += below
        elif path.exists():
            images.append(path)
        else:
            raise FileNotFoundError(f"{path}: wanted an image or a folder of images, got no such file or folder")
    return images


def find_images(folder: Path) -> list[Path]:
    """Find the image files in a folder and its subfolders.

    Symbolic links are followed; hidden files and folders are skipped.

    Args:
        folder: Folder to search.

    Returns:
        The files in natural order of their relative paths; empty if there are none.
    """
    images: list[Path] = []
    visited: set[str] = set()  # a link to a parent folder would loop forever
    for parent, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [] if real in visited else sorted(name for name in folders if not is_hidden(name))
        if real not in visited:
            images += [Path(parent, name) for name in files if is_image(name)]
        visited.add(real)
    return sorted(images, key=lambda path: [natural_sort_key(part) for part in path.relative_to(folder).parts])


def is_image(name: str) -> bool:
    """Return whether a file name is that of an image; hidden files, such as ``._name.png`` of macOS, are not."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder name is hidden, or belongs to the operating system."""
    return name.startswith((".", "__MACOSX")) or name in ("Thumbs.db", "desktop.ini")


def natural_sort_key(name: str) -> tuple[list[int | str], str]:
    """Return a sort key that compares digits as numbers, so that image2 comes before image10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))], name
