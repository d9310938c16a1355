"""Data sets as lists of samples: MVTec AD layout and plain folders.

::

    CATEGORY/train/good/NAME.png                  required
    CATEGORY/test/good/NAME.png                   label 0
    CATEGORY/test/DEFECT/NAME.png                 label 1
    CATEGORY/ground_truth/DEFECT/NAME_mask.png    or NAME.png, any image suffix; for every defect image or for none

Only file names are read, no pixels. Samples are in natural order, the same on every machine; upstream uses the order of
``os.listdir``.
"""

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from recontrast.data.listing import PathLike, find_images, is_hidden, is_image, list_images, natural_sort_key
from recontrast.data.temporary import complete_commits

GOOD = "good"  # name of the folders of normal images, and `Sample.defect` of normal samples


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        path: Path of the image.
        mask: Path of the mask; None for normal images, and in categories without masks.
        label: 0 for normal, 1 for anomalous.
        category: Name of the category, which is the name of its folder.
        split: "train" or "test".
        defect: Kind of defect, which is the name of the folder below ``test``; "good" for normal images.
    """

    path: Path
    mask: Path | None
    label: int
    category: str
    split: Literal["train", "test"]
    defect: str


def load(path: PathLike | Sequence[PathLike], categories: Sequence[str] | None = None) -> dict[str, list[Sample]]:
    """Read the samples of a data set, a category or a plain folder.

    Args:
        path: Root of a data set in MVTec AD layout, folder of one category, or plain folder of good images. Several
            paths give one data set with all their categories.
        categories: Names of the categories to read, in this order. None reads all, in natural order for each path.

    Returns:
        Samples by category, train before test. A plain folder gives training samples, and its name is the category.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If a path is a file, a category is missing or occurs twice, a folder contains no images, images lie
            directly in ``test``, or masks and images do not match.
    """
    paths = [Path(p) for p in ([path] if isinstance(path, (str, os.PathLike)) else path)]
    readers: dict[str, Callable[[], list[Sample]]] = {}
    sources: dict[str, Path] = {}
    for source in paths:
        for name, reader in _make_readers(source).items():
            if name in readers:
                raise ValueError(
                    f"{source}: wanted categories with different names, got {name!r} again, as in {sources[name]}"
                )
            readers[name], sources[name] = reader, source
    for category in categories or ():
        if category not in readers:
            searched = ", ".join(map(str, paths))
            raise ValueError(f"{searched}: wanted category {category!r}, got {_list_names(category, list(readers))}")
    return {category: readers[category]() for category in categories or readers}


def _make_readers(path: Path) -> dict[str, Callable[[], list[Sample]]]:
    """Return a function that reads the samples, for each category at ``path``."""
    _check_folder(path, "the folder of a data set")
    name = Path(os.path.abspath(path)).name
    if (path / "train").is_dir() or (path / "test").is_dir():
        return {name: partial(_read_category, path, name)}
    # A train or a test folder makes a category, so that a missing train/good raises an error.
    inside = [child.name for child in _list_folders(path) if (child / "train").is_dir() or (child / "test").is_dir()]
    return {child: partial(mvtec, path, child) for child in inside} or {name: partial(folder, path)}


def categories(root: PathLike) -> list[str]:
    """List the categories of a data set in MVTec AD layout: the folders with a ``train/good``.

    Args:
        root: Root of the data set.

    Returns:
        Names of the categories, in natural order.

    Raises:
        FileNotFoundError: If ``root`` does not exist.
        ValueError: If ``root`` is a file.
    """
    root = Path(root)
    _check_folder(root, "the root of a data set")
    return [child.name for child in _list_folders(root) if (child / "train" / GOOD).is_dir()]


def mvtec(root: PathLike, category: str) -> list[Sample]:
    """Read one category in MVTec AD layout.

    Args:
        root: Folder that contains the folder of the category.
        category: Name of the category.

    Returns:
        Training samples, then test samples by folder, each in natural order.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If a path is a file, the category is missing, a folder contains no images, images lie directly in
            ``test``, or masks and images do not match.
    """
    root = Path(root)
    _check_folder(root, "the root of a data set")
    if not (root / category).is_dir():
        raise ValueError(f"{root}: wanted category {category!r}, got {_list_names(category, categories(root))}")
    return _read_category(root / category, category)


def folder(
    path: PathLike, *, split: Literal["train", "test"] = "train", label: int = 0, category: str | None = None
) -> list[Sample]:
    """Read a plain folder of images and its subfolders.

    Args:
        path: Folder of images.
        split: Split of all samples.
        label: Label of all samples, 0 or 1.
        category: Category of all samples. None uses the name of the folder.

    Returns:
        Samples without masks, in natural order.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If ``path`` is a file or contains no images.
    """
    path = Path(path)
    _check_folder(path, "a folder of images")
    category = Path(os.path.abspath(path)).name if category is None else category
    defect = "defect" if label else GOOD
    return [Sample(image, None, label, category, split, defect) for image in list_images(path)]


def _read_category(path: Path, name: str) -> list[Sample]:
    """Read the samples of the category in the folder ``path``."""
    good = path / "train" / GOOD
    _check_folder(good, "the folder of good training images")
    samples = [Sample(image, None, 0, name, "train", GOOD) for image in list_images(good)]
    test = path / "test"
    loose = sorted(p.name for p in test.iterdir() if p.is_file() and is_image(p.name)) if test.is_dir() else []
    if loose:
        raise ValueError(
            f"{test / loose[0]}: wanted test images in test/{GOOD} and test/DEFECT, got one directly in test"
        )
    masks = _find_masks(path / "ground_truth")
    unused = dict(masks)
    for defect in _list_folders(test) if test.is_dir() else []:
        for image in list_images(defect):
            mask = None
            if defect.name != GOOD and masks:
                stem = image.relative_to(test).with_suffix("").as_posix()
                key = next((key for key in (f"{stem}_mask", stem) if key in masks), None)
                if key is None:
                    expected = path / "ground_truth" / f"{stem}_mask.png"
                    raise ValueError(
                        f"{image}: wanted its mask {expected}, got none, although {name} has {len(masks)} masks"
                    )
                mask = masks[key]
                unused.pop(key, None)
            samples.append(Sample(image, mask, int(defect.name != GOOD), name, "test", defect.name))
    if unused:
        mask = next(iter(unused.values()))
        raise ValueError(f"{mask}: wanted an image in {test} for this mask, got none of its name")
    return samples


def _find_masks(ground_truth: Path) -> dict[str, Path]:
    """Return mask files by relative path without suffix, except masks of good images, which are always black."""
    masks: dict[str, Path] = {}
    for path in find_images(ground_truth):
        relative = path.relative_to(ground_truth)
        if relative.parts[0] == GOOD:
            continue
        key = relative.with_suffix("").as_posix()
        if key in masks:
            raise ValueError(f"{path}: wanted one mask of this name, got {masks[key].name} as well")
        masks[key] = path
    return masks


def _list_folders(path: Path) -> list[Path]:
    """Return the visible folders directly below ``path``, in natural order."""
    folders = (child for child in path.iterdir() if child.is_dir() and not is_hidden(child.name))
    return sorted(folders, key=lambda child: natural_sort_key(child.name))


def _check_folder(path: Path, description: str) -> None:
    """Raise an error if ``path`` does not exist or is not a folder."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: wanted {description}, got no such folder")
    if not path.is_dir():
        raise ValueError(f"{path}: wanted {description}, got a file")
    complete_commits(path)  # of `recontrast prepare`, if it was killed


def _list_names(missing: str, names: list[str]) -> str:
    """Join ``names`` for an error message about a missing name, the closest one first."""
    closest = difflib.get_close_matches(missing, names, 1)
    return ", ".join(closest + [name for name in names if name not in closest]) or "no category"
