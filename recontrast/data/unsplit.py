"""Images without a split: good ones and ones with a defect, of which a part is kept for the test."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from recontrast.data.class_folders import list_good_samples
from recontrast.data.class_names import classify_folder
from recontrast.data.dataset_sample import GOOD, Sample
from recontrast.data.groups import group_samples
from recontrast.data.list_files import is_list
from recontrast.data.listing import PathLike, list_images
from recontrast.data.views import list_part_names

TEST_SHARE = 0.2  # of the good images of a category with defects, if nothing says which are test images


def assign_splits(samples: Sequence[Sample], names: Sequence[str], views_from: str | None = None) -> list[Sample]:
    """Divide images without a split into training and test.

    In a category with defects, these and a fifth of the good images are test images. Which ones depends on their names
    alone, so that they stay test images when others are added. Copies and groups are not divided: those with a defect
    are test images. Only if this would leave no good image to train on, since each group has a defect, the good images
    of a group are divided from those with a defect, not from each other.

    Args:
        samples: Images of one or several categories.
        names: Name of each image that does not depend on where the data set lies, such as its relative path.
        views_from: Where the views of a part are found, see `recontrast.data.views.Views`. They are in one split: a
            part has a defect if one of its views has. None: each image is a part.

    Returns:
        The images with their split, in their order.

    Raises:
        ValueError: If a path has no name of a view.
    """
    if views_from is not None:
        return _assign_to_parts(samples, names, views_from)
    with_defects = {sample.category for sample in samples if sample.label}
    splits: list[Literal["train", "test"]] = ["test" if sample.label else "train" for sample in samples]
    for category in with_defects:
        own = [index for index, sample in enumerate(samples) if sample.category == category]
        owners = dict(zip(own, group_samples([samples[index] for index in own]), strict=True))
        good = [index for index in own if not samples[index].label]
        keys: dict[int, str] = {}  # the smallest name of each group, in an order that is as good as random
        for index in good:
            digest = hashlib.sha256(Path(names[index]).as_posix().encode(errors="surrogateescape")).hexdigest()
            keys[owners[index]] = min(keys.get(owners[index], digest), digest)
        count = min(max(round(TEST_SHARE * len(keys)), 1), len(keys) - 1)
        tests = {owners[index] for index in own if samples[index].label} & keys.keys()
        if len(tests) == len(keys):
            tests = set()
        free = sorted(keys.keys() - tests, key=lambda owner: keys[owner])
        tests.update(free[: max(count - len(tests), 0)])
        for index in good:
            if owners[index] in tests:
                splits[index] = "test"
    return [replace(sample, split=split) for sample, split in zip(samples, splits, strict=True)]


def _assign_to_parts(samples: Sequence[Sample], names: Sequence[str], views_from: str) -> list[Sample]:
    """Divide parts with several views as `assign_splits` does images."""
    parts: dict[str, list[int]] = {}
    for index, part in enumerate(list_part_names([sample.path for sample in samples], views_from)):
        parts.setdefault(part, []).append(index)
    joined = []
    for positions in parts.values():
        first, *others = [samples[position] for position in positions]
        group = next((sample.group for sample in (first, *others) if sample.group is not None), None)
        label = max(samples[position].label for position in positions)
        joined.append(replace(first, label=label, group=group, views=tuple(others)))
    divided = assign_splits(joined, [min(names[position] for position in positions) for positions in parts.values()])
    result = list(samples)
    for joint, positions in zip(divided, parts.values(), strict=True):
        for position in positions:
            result[position] = replace(samples[position], split=joint.split)
    return result


def read_good_and_bad(
    good: Sequence[PathLike], bad: Sequence[PathLike], *, category: str | None = None, all_good: bool = False,
    for_test: bool = False, views_from: str | None = None,
) -> dict[str, list[Sample]]:  # fmt: skip
    """Read folders of good images and folders of images with defects, without any layout.

    Args:
        good: Files, folders or lists of good images.
        bad: Files or folders of images with defects. A subfolder is a kind of defect.
        category: Name of the category. None: the name of the first folder of good images, or of the first one above
            it that says more than good, train or test.
        all_good: Whether all images in ``good`` are good, whatever the names of subfolders.
        for_test: Whether all images are test images. Otherwise, those with defects and a fifth of the good ones are,
            see `assign_splits`; without images with defects, all are training images.
        views_from: Where the views of a part are found, which are not divided, see `assign_splits`.

    Returns:
        Samples by category, of which there is one.

    Raises:
        OSError: If a file or folder does not exist.
        ValueError: If there are no good images, it is unclear which are good, or an image is good and bad.
    """
    if not good:
        raise ValueError("good: wanted files or folders of good images, got none")
    name = category or _name_category(Path(good[0]))
    samples: dict[str, Sample] = {}  # by real path: a file that is given twice counts once
    names: dict[str, str] = {}
    for folder in map(Path, good):
        for sample in list_good_samples(folder, all_good, views_from):
            key = os.path.realpath(sample.path)
            samples.setdefault(key, replace(sample, category=name, split="train", defect=GOOD))
            names.setdefault(key, os.path.relpath(sample.path, folder if folder.is_dir() else folder.parent))
    for folder in map(Path, bad):
        for path in list_images(folder):
            key = os.path.realpath(path)
            if key in samples and not samples[key].label:
                raise ValueError(f"bad: wanted images with defects, got one that is among the good ones: {path}")
            inner = path.relative_to(folder).parts[:-1] if folder.is_dir() else ()
            samples.setdefault(key, Sample(path, None, 1, name, "test", inner[0] if inner else "defect"))
            names.setdefault(key, str(path))
    if for_test:
        return {name: [replace(sample, split="test") for sample in samples.values()]}
    return {name: assign_splits(list(samples.values()), list(names.values()), views_from)}


def list_good_of_classes(
    paths: PathLike | Iterable[PathLike], all_good: bool = False, views_from: str | None = None
) -> list[Sample]:  # fmt: skip
    """List good images as samples whose category is their class, to draw classes equally often.

    Args:
        paths: One or more files, folders and lists, see `recontrast.data.class_folders.list_good_samples`.
        all_good: Whether all images in the folders are good, whatever the names of their subfolders.
        views_from: Where the views of a part are found, see `recontrast.data.image_lists.read_list`.

    Returns:
        The images in the order of ``paths``. The category is that in the list, or the folder above the ``train/good``
        in which an image lies; else the name of the list or folder, or of the first folder above it that says more than
        good, train or test. It is empty for folders and lists that share their name with others, and say no more.

    Raises:
        FileNotFoundError: If a file or folder does not exist.
        ValueError: If a folder contains no images, or it is unclear which of them are good.
    """
    paths = [paths] if isinstance(paths, str) or not isinstance(paths, Iterable) else paths
    given = [(*_find_name(path), list_good_samples(path, all_good, views_from)) for path in map(Path, paths)]
    stated = [_find_stated_classes(where, samples) for where, _, samples in given]
    # A folder "screw" and the training images of a data set "screw" are of one class; "a/new" and "b/new" may not be.
    pairs = list(zip(given, stated, strict=True))
    unsure = {where for (where, says_more, _), names in pairs if not says_more and None in names}
    counts = Counter(map(_name, unsure))
    listed: list[Sample] = []
    for (where, _, samples), names in pairs:
        own = "" if where in unsure and counts[_name(where)] > 1 else _name(where)
        listed += [replace(s, category=name or own) for s, name in zip(samples, names, strict=True)]
    return listed


def _find_stated_classes(where: Path, samples: Sequence[Sample]) -> list[str | None]:
    """Return the class of each image of a list or folder, None if nothing but the name of the latter tells it."""
    if is_list(where):
        stated = {sample.category for sample in samples} != {where.stem}
        return [sample.category if stated else None for sample in samples]
    parents = [Path(os.path.abspath(sample.path)).parents for sample in samples]
    return [p[2].name if len(p) > 3 and (p[0].name, p[1].name) == (GOOD, "train") else None for p in parents]


def _name_category(path: Path) -> str:
    """Return the name of a list or a folder, or of the one above it if it says only that its images are good."""
    return _name(_find_name(path)[0]) or "images"


def _find_name(path: Path) -> tuple[Path, bool]:
    """Return the list or folder whose name is that of the category, and whether it is above the given one."""
    path = Path(os.path.abspath(path))
    if is_list(path):
        return path, False
    path = folder = path if path.is_dir() else path.parent
    while classify_folder(path.name) in ("good", "train", "test") and path.parent.name:
        path = path.parent
    return path, path != folder


def _name(path: Path) -> str:
    return path.stem if is_list(path) else path.name
