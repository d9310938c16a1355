"""Data sets as samples: categories in MVTec AD layout (`recontrast.data.mvtec_layout`), plain folders, and lists.

Only file names are read, no pixels. Samples are in natural order, the same on every machine; upstream uses the order of
``os.listdir``.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from recontrast.data.class_folders import select_good_images
from recontrast.data.class_names import classify_folder
from recontrast.data.dataset_sample import GOOD, Sample
from recontrast.data.image_lists import read_list
from recontrast.data.list_files import is_list
from recontrast.data.listing import PathLike, count_images, list_folder, scan_folder
from recontrast.data.mask_files import list_folders
from recontrast.data.mvtec_layout import (
    categories,
    check_folder,
    is_category,
    join_names,
    mvtec,
    read_category,
    warn_of_unused,
)

__all__ = ["Sample", "categories", "describe", "folder", "load", "mvtec"]


def load(
    path: PathLike | Sequence[PathLike], categories: Sequence[str] | None = None, *, all_good: bool = False,
    incomplete: bool = False, for_test: bool = False, views_from: str | None = None,
) -> dict[str, list[Sample]]:  # fmt: skip
    """Read the samples of a data set, a category, a plain folder or a list.

    Args:
        path: Root of a data set in MVTec AD layout, folder of one category, plain folder of good images, or a list of
            images (`recontrast.data.image_lists`). Several paths give one data set with all their categories.
        categories: Names of the categories to read, in this order. None reads all, in natural order for each path.
        all_good: Whether all images in plain folders are good. Otherwise, if their subfolders are classes, only the
            good class is read.
        incomplete: Whether a test image without its mask, or a mask without its image, is a sample with the path that
            the missing file should have, if other images of the category have masks. Otherwise it raises an error.
        for_test: Whether all images of a list without a column ``split`` are test images.
        views_from: Where the views of a part are found, see `recontrast.data.image_lists.read_list`.

    Returns:
        Samples by category, train before test; those of a list in its order. A plain folder gives training samples, and
        its name is the category. Pictures that are not used are named in a `recontrast.data.listing.DataWarning`.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If a path is a file that is no list, a category is missing or occurs twice, a folder contains no
            images, images lie directly in ``test``, masks and images do not match, or it is unclear which images are
            good.
    """
    paths = [Path(p) for p in ([path] if isinstance(path, (str, os.PathLike)) else path)]
    readers: dict[str, Callable[[], list[Sample]]] = {}
    sources: dict[str, Path] = {}
    for source in paths:
        for name, reader in _make_readers(source, all_good, incomplete, for_test, views_from).items():
            if name in readers:
                raise ValueError(
                    f"{source}: wanted categories with different names, got {name!r} again, as in {sources[name]}"
                )
            readers[name], sources[name] = reader, source
    for category in categories or ():
        if category not in readers:
            searched = ", ".join(map(str, paths))
            raise ValueError(f"{searched}: wanted category {category!r}, got {join_names(category, list(readers))}")
    return {category: readers[category]() for category in categories or readers}


def _make_readers(
    path: Path, all_good: bool, incomplete: bool, for_test: bool, views_from: str | None
) -> dict[str, Callable[[], list[Sample]]]:
    """Return a function that reads the samples, for each category at ``path``."""
    if is_list(path):
        groups = read_list(path, incomplete=incomplete, for_test=for_test, views_from=views_from)
        return {name: partial(list, samples) for name, samples in groups.items()}
    check_folder(path, "the folder of a data set")
    name = Path(os.path.abspath(path)).name
    if is_category(path):
        return {name: partial(read_category, path, name, incomplete)}
    # A train or a test folder makes a category, so that a missing train/good raises an error.
    inside = [child for child in list_folders(path) if is_category(child)]
    if not inside:
        return {name: partial(folder, path, all_good=all_good)}
    warn_of_unused(path, [child for child in list_folders(path) if child not in inside])
    return {child.name: partial(read_category, child, child.name, incomplete) for child in inside}


def describe(groups: Mapping[str, Sequence[Sample]]) -> list[str]:
    """Describe which images were taken from which folders, as a tree with counts.

    Args:
        groups: Samples by category, as `load` returns them.

    Returns:
        One line for each category, and one for each of its folders.
    """
    lines = []
    for name, samples in groups.items():
        parents: dict[tuple[str, str, int, Path], list[Sample]] = {}
        for sample in samples:
            parents.setdefault((sample.split, sample.defect, sample.label, sample.path.parent), []).append(sample)
        folders: dict[tuple[str, str, int, Path], list[Sample]] = {}
        for (split, defect, label, _), inside in parents.items():
            folders.setdefault((split, defect, label, _class_folder(inside[0])), []).extend(inside)
        paths = [path.absolute() for *_, path in folders]
        root = Path(os.path.commonpath(paths)) if len(set(paths)) > 1 else paths[0].parent
        lines.append(f"{name}: {root}")
        for (split, defect, label, path), inside in folders.items():
            masks = sum(sample.mask is not None for sample in inside)
            use = "good, to train on" if split == "train" and not label else f"{split}, {defect}"
            use += f", {count_images(masks, 'mask')}" if masks else ""
            count = count_images(len(inside), "part" if any(sample.views for sample in inside) else "image")
            lines.append(f"  {path.absolute().relative_to(root)}: {count} ({use})")
    return lines


def folder(
    path: PathLike,
    *,
    split: Literal["train", "test"] = "train",
    label: int = 0,
    category: str | None = None,
    all_good: bool = False,
) -> list[Sample]:
    """Read a plain folder of images and its subfolders.

    If the subfolders are classes, such as ``good`` and ``crack``, only good images are read (for label 0).

    Args:
        path: Folder of images.
        split: Split of all samples.
        label: Label of all samples, 0 or 1.
        category: Category of all samples. None uses the name of the folder.
        all_good: Whether all images are good, whatever the names of the subfolders.

    Returns:
        Samples without masks, in natural order.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If ``path`` is a file or contains no images, or it is unclear which of them are good.
    """
    path = Path(path)
    check_folder(path, "a folder of images")
    category = Path(os.path.abspath(path)).name if category is None else category
    found = scan_folder(path)
    images = list_folder(found) if label else select_good_images(found, all_good)
    return [Sample(image, None, label, category, split, "defect" if label else GOOD) for image in images]


def _class_folder(sample: Sample) -> Path:
    """Return the folder of a sample that names its class, or else the folder that contains it."""
    for parent in sample.path.parents:
        if parent.name == sample.defect or (not sample.label and classify_folder(parent.name) == "good"):
            return parent
        if parent.name == sample.category:
            return parent
    return sample.path.parent
