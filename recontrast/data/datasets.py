"""Data sets as lists of samples: MVTec AD layout and plain folders.

::

    CATEGORY/train/good/NAME.png                  wanted
    CATEGORY/test/good/NAME.png                   label 0
    CATEGORY/test/DEFECT/NAME.png                 label 1
    CATEGORY/ground_truth/DEFECT/NAME_mask.png    or NAME.png, any image suffix; for every defect image or for none

Only folders are read here. Order is natural and the same on every machine, unlike that of upstream's ``os.listdir``.
"""

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from recontrast.data.listing import PathLike, find_images, is_hidden, is_image, list_images, natural_sort_key

GOOD = "good"  # the folder of normal images, and the `defect` of a normal sample


@dataclass(frozen=True)
class Sample:
    """One image of a data set.

    Attributes:
        path: image file.
        mask: mask file; None for normal images, and where a category has no masks.
        label: 0 normal, 1 anomalous.
        category: name of the category's folder.
        split: "train" or "test".
        defect: name of the folder below ``test``; "good" for normal images.
    """

    path: Path
    mask: Path | None
    label: int
    category: str
    split: Literal["train", "test"]
    defect: str


def load(path: PathLike | Sequence[PathLike], categories: Sequence[str] | None = None) -> dict[str, list[Sample]]:
    """Samples of whatever stands at ``path``.

    Args:
        path: root of a data set in MVTec AD layout, the folder of one category, or a plain folder of good images; or
            several of these, for one detector of all their categories.
        categories: names of those wanted, in that order. None takes all, in natural order of each path.

    Returns:
        Samples by category, train before test; of a plain folder by its own name, train only.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no folder but a file, no such category or one twice, no images, images beside the folders of
            ``test``, or masks and images that do not go together.
    """
    paths = [Path(one) for one in ([path] if isinstance(path, (str, os.PathLike)) else path)]
    readers: dict[str, Callable[[], list[Sample]]] = {}
    found: dict[str, Path] = {}
    for one in paths:
        for name, reader in _readers(one).items():
            if name in readers:
                raise ValueError(f"{one}: wanted categories of different names, got {name!r} of {found[name]} again")
            readers[name], found[name] = reader, one
    for wanted in categories or ():
        if wanted not in readers:
            where = ", ".join(map(str, paths))
            raise ValueError(f"{where}: wanted category {wanted!r}, got {_among(wanted, list(readers))}")
    return {wanted: readers[wanted]() for wanted in categories or readers}


def _readers(path: Path) -> dict[str, Callable[[], list[Sample]]]:
    """What reads each category at ``path``, by its name."""
    _must_be_folder(path, "the folder of a data set")
    name = Path(os.path.abspath(path)).name
    if (path / "train").is_dir() or (path / "test").is_dir():
        return {name: partial(_category, path, name)}
    # Whatever has a train or a test folder, so that one without train/good is an error and not overlooked.
    inside = [c.name for c in _folders(path) if (c / "train").is_dir() or (c / "test").is_dir()]
    return {child: partial(mvtec, path, child) for child in inside} or {name: partial(folder, path)}


def categories(root: PathLike) -> list[str]:
    """All names of the folders below ``root`` that have a ``train/good``, in natural order.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no folder but a file.
    """
    root = Path(root)
    _must_be_folder(root, "the root of a data set")
    return [child.name for child in _folders(root) if (child / "train" / GOOD).is_dir()]


def mvtec(root: PathLike, category: str) -> list[Sample]:
    """One category in MVTec AD layout.

    Args:
        root: folder that holds the category's folder.
        category: its name.

    Returns:
        Train, then test by defect folder, each in natural order.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no folder but a file, no such category, no images, images beside the folders of ``test``, or masks
            and images that do not go together.
    """
    root = Path(root)
    _must_be_folder(root, "the root of a data set")
    if not (root / category).is_dir():
        raise ValueError(f"{root}: wanted category {category!r}, got {_among(category, categories(root))}")
    return _category(root / category, category)


def folder(
    path: PathLike, *, split: Literal["train", "test"] = "train", label: int = 0, category: str | None = None
) -> list[Sample]:
    """A plain folder of images, searched to the bottom.

    Args:
        path: the folder.
        split: of all samples.
        label: of all samples, 0 or 1.
        category: of all samples. None takes the folder's name.

    Returns:
        Samples without masks, in natural order.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: no folder but a file, or one without images.
    """
    path = Path(path)
    _must_be_folder(path, "a folder of images")
    category = Path(os.path.abspath(path)).name if category is None else category
    defect = "defect" if label else GOOD
    return [Sample(image, None, label, category, split, defect) for image in list_images(path)]


def _category(here: Path, name: str) -> list[Sample]:
    """Samples of the category folder ``here``."""
    good = here / "train" / GOOD
    _must_be_folder(good, "the folder of good training images")
    samples = [Sample(path, None, 0, name, "train", GOOD) for path in list_images(good)]
    test = here / "test"
    loose = sorted(p.name for p in test.iterdir() if p.is_file() and is_image(p.name)) if test.is_dir() else []
    if loose:
        raise ValueError(f"{test / loose[0]}: wanted test images in test/{GOOD} and test/DEFECT, got one beside them")
    masks = _masks(here / "ground_truth")
    unused = dict(masks)
    for defect in _folders(test) if test.is_dir() else []:
        for path in list_images(defect):
            mask = None
            if defect.name != GOOD and masks:
                stem = path.relative_to(test).with_suffix("").as_posix()
                key = next((key for key in (f"{stem}_mask", stem) if key in masks), None)
                if key is None:
                    wanted = here / "ground_truth" / f"{stem}_mask.png"
                    raise ValueError(
                        f"{path}: wanted its mask {wanted}, got none, where {len(masks)} masks of {name} exist"
                    )
                mask = masks[key]
                unused.pop(key, None)
            samples.append(Sample(path, mask, int(defect.name != GOOD), name, "test", defect.name))
    if unused:
        mask = next(iter(unused.values()))
        raise ValueError(f"{mask}: wanted an image in {test} for this mask, got none of its name")
    return samples


def _masks(ground_truth: Path) -> dict[str, Path]:
    """Mask files by relative path without suffix; those of good images, which can only be black, are left out."""
    masks: dict[str, Path] = {}
    for path in find_images(ground_truth):
        relative = path.relative_to(ground_truth)
        if relative.parts[0] == GOOD:
            continue
        key = relative.with_suffix("").as_posix()
        if key in masks:
            raise ValueError(f"{path}: wanted one mask of this name, got {masks[key].name} too")
        masks[key] = path
    return masks


def _folders(path: Path) -> list[Path]:
    """Visible folders directly below ``path``, in natural order."""
    return sorted(
        (p for p in path.iterdir() if p.is_dir() and not is_hidden(p.name)), key=lambda p: natural_sort_key(p.name)
    )


def _must_be_folder(path: Path, what: str) -> None:
    """Refuse a path that is not there, or not a folder."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: wanted {what}, got no such folder")
    if not path.is_dir():
        raise ValueError(f"{path}: wanted {what}, got a file")


def _among(wanted: str, names: list[str]) -> str:
    """What is there instead of ``wanted``, the nearest name first."""
    near = difflib.get_close_matches(wanted, names, 1)
    return ", ".join(near + [name for name in names if name not in near]) or "no category"
