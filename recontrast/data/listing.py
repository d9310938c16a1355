"""Which files are images, and in what order: the same on every machine, whatever its locale and file system say."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""Of what is taken for an image in a folder; compared in lower case."""

PathLike = str | os.PathLike[str]


def list_images(paths: PathLike | Iterable[PathLike]) -> list[Path]:
    """Image files named by ``paths``.

    Args:
        paths: one or more; a file is taken as it is, a folder is searched to the bottom (see `find_images`).

    Returns:
        Files in the order of ``paths``, a folder's in natural order; never empty for a folder.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, [paths] if isinstance(paths, (str, os.PathLike)) else paths):
        if path.is_dir():
            below = find_images(path)
            if not below:
                others = sum(1 for other in path.rglob("*") if other.is_file() and not is_hidden(other.name))
                got = f"{others} of other kinds" if others else "none"
                raise ValueError(f"{path}: wanted a folder with image files ({', '.join(IMAGE_SUFFIXES)}), got {got}")
            found += below
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"{path}: wanted an image or a folder of images, got no such file or folder")
    return found


def find_images(folder: Path) -> list[Path]:
    """Image files at any depth, in natural order of their relative paths; links are followed, hidden names are not."""
    found: list[Path] = []
    seen: set[str] = set()  # a link to a folder above would go round for ever
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        folders[:] = [] if real in seen else sorted(name for name in folders if not is_hidden(name))
        if real not in seen:
            found += [Path(here, name) for name in files if is_image(name)]
        seen.add(real)
    return sorted(found, key=lambda path: [natural_sort_key(part) for part in path.relative_to(folder).parts])


def is_image(name: str) -> bool:
    """Whether a file of this name is taken for an image; macOS leaves hidden ``._name.png`` beside real ones."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is passed over."""
    return name.startswith((".", "__MACOSX")) or name in ("Thumbs.db", "desktop.ini")


def natural_sort_key(name: str) -> tuple[list[int | str], str]:
    """Sort key by which image2 comes before image10."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))], name
