"""Data sets as lists of samples: MVTec AD layout and plain folders.

::

    CATEGORY/train/good/NAME.png                  required
    CATEGORY/test/good/NAME.png                   label 0
    CATEGORY/test/DEFECT/NAME.png                 label 1
    CATEGORY/ground_truth/DEFECT/NAME_mask.png    or NAME.png, any image suffix; for every defect image or for none

Folders of good images can have any usual name (`recontrast.data.class_names`), and case does not matter. Only file
names are read, no pixels. Samples are in natural order, the same on every machine; upstream uses the order of
``os.listdir``.
"""

import difflib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Literal

from recontrast.data.class_folders import select_good_images
from recontrast.data.class_names import classify_folder, resembles_good
from recontrast.data.listing import (
    DataWarning,
    Folder,
    PathLike,
    count_images,
    list_folder,
    list_names,
    scan_folder,
)
from recontrast.data.mask_files import find_mask_folder, find_masks, list_folders
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


def load(
    path: PathLike | Sequence[PathLike], categories: Sequence[str] | None = None, *, all_good: bool = False,
    incomplete: bool = False,
) -> dict[str, list[Sample]]:  # fmt: skip
    """Read the samples of a data set, a category or a plain folder.

    Args:
        path: Root of a data set in MVTec AD layout, folder of one category, or plain folder of good images. Several
            paths give one data set with all their categories.
        categories: Names of the categories to read, in this order. None reads all, in natural order for each path.
        all_good: Whether all images in plain folders are good. Otherwise, if their subfolders are classes, only the
            good class is read.
        incomplete: Whether a test image without its mask, or a mask without its image, is a sample with the path that
            the missing file should have, if other images of the category have masks. Otherwise it raises an error.

    Returns:
        Samples by category, train before test. A plain folder gives training samples, and its name is the category.
        Pictures that are not used are named in a `recontrast.data.listing.DataWarning`.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If a path is a file, a category is missing or occurs twice, a folder contains no images, images lie
            directly in ``test``, masks and images do not match, or it is unclear which images are good.
    """
    paths = [Path(p) for p in ([path] if isinstance(path, (str, os.PathLike)) else path)]
    readers: dict[str, Callable[[], list[Sample]]] = {}
    sources: dict[str, Path] = {}
    for source in paths:
        for name, reader in _make_readers(source, all_good, incomplete).items():
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


def _make_readers(path: Path, all_good: bool, incomplete: bool) -> dict[str, Callable[[], list[Sample]]]:
    """Return a function that reads the samples, for each category at ``path``."""
    _check_folder(path, "the folder of a data set")
    name = Path(os.path.abspath(path)).name
    if _is_category(path):
        return {name: partial(_read_category, path, name, incomplete)}
    # A train or a test folder makes a category, so that a missing train/good raises an error.
    inside = [child for child in list_folders(path) if _is_category(child)]
    if not inside:
        return {name: partial(folder, path, all_good=all_good)}
    _warn_of_unused(path, [child for child in list_folders(path) if child not in inside])
    return {child.name: partial(_read_category, child, child.name, incomplete) for child in inside}


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
    return [child.name for child in list_folders(root) if any(_list_good(split) for split in _find(child, "train"))]


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
            lines.append(f"  {path.absolute().relative_to(root)}: {count_images(len(inside))} ({use})")
    return lines


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
    _check_folder(path, "a folder of images")
    category = Path(os.path.abspath(path)).name if category is None else category
    found = scan_folder(path)
    images = list_folder(found) if label else select_good_images(found, all_good)
    return [Sample(image, None, label, category, split, "defect" if label else GOOD) for image in images]


def _read_category(path: Path, name: str, incomplete: bool = False) -> list[Sample]:
    """Read the samples of the category in the folder ``path``; for ``incomplete``, see `load`."""
    training = [Sample(image, None, 0, name, "train", GOOD) for image in _read_training_images(path)]
    tests = [split for folder in _find(path, "test") for split in [scan_folder(folder)]]
    mask_folder = find_mask_folder(path)
    masks = {} if mask_folder is None else find_masks(mask_folder)
    unused = dict(masks)
    samples = []
    errors = []
    for test in tests:
        _refuse_unclear_tests(test)
        _warn_of_unused(test.path, [])
        for child in test.folders:
            label = _label_test_folder(test, child)
            if label is None:
                continue
            defect = child.path.name if label else GOOD
            for image in list_folder(child):
                mask = None
                if label and masks:
                    stem = image.relative_to(test.path).with_suffix("").as_posix()
                    key = next((key for key in (f"{stem}_mask", stem) if key in masks), None)
                    mask = path / "ground_truth" / f"{stem}_mask.png" if key is None else masks[key]
                    if key is None:
                        errors.append(
                            f"{image}: wanted its mask {mask}, got none, although {name} has {len(masks)} masks"
                        )
                    unused.pop(key or "", None)
                samples.append(Sample(image, mask, label, name, "test", defect))
    if unused:
        mask = next(iter(unused.values()))
        errors.append(f"{mask}: wanted an image in {path / 'test'} for this mask, got none of its name")
    if errors and not (incomplete and tests and len(unused) < len(masks)):
        raise ValueError(errors[0])
    samples += [_guess_image(tests[0].path, key, mask, name, samples) for key, mask in unused.items()]
    used = {test.path for test in tests} | set(_find(path, "train")) | ({mask_folder} if mask_folder else set())
    _warn_of_unused(path, [child for child in list_folders(path) if child not in used])
    return training + samples


def _guess_image(test: Path, key: str, mask: Path, name: str, samples: Sequence[Sample]) -> Sample:
    """Return the sample of a missing image, of whose path only the mask is known."""
    stem = PurePosixPath(key.removesuffix("_mask"))
    folder = test / stem.parent
    suffix = next((sample.path.suffix for sample in samples if sample.path.parent == folder), mask.suffix)
    return Sample(folder / f"{stem.name}{suffix}", mask, 1, name, "test", stem.parts[0] if stem.parts[1:] else "defect")


def _read_training_images(path: Path) -> list[Path]:
    """Return the good training images of a category."""
    splits = _find(path, "train") or [path / "train"]
    if not any(_list_good(split) for split in splits):
        _check_folder(splits[0] / GOOD, "the folder of good training images")
    images = []
    for split in splits:
        if good := _list_good(split):
            unused = [child for child in list_folders(split) if child not in good]
            _warn_of_unused(split, unused)
            images += [image for folder in good for image in select_good_images(scan_folder(folder))]
        elif count := scan_folder(split).count():
            got = count_images(count)
            raise ValueError(f"{split}: wanted good images in {split / GOOD}, got {got} in other folders")
    return images


def _label_test_folder(test: Folder, child: Folder) -> int | None:
    """Return the label of a folder below ``test``: 0 for good images, 1 for a kind of defect, None to leave it out."""
    kind, name = classify_folder(child.path.name), child.path.name
    if kind == "good":
        if inside := [f.path for f in child.walk() if f is not child and f.count() and _is_suspect(f)]:
            raise ValueError(
                f"{child.path}: wanted a folder of good images, got {list_names(child.path, inside)} in it, whose "
                "name is not that of good images"
            )
        return 0
    if kind == "mask":
        if count := sum(len(inner.images) + len(inner.unread) for inner in child.walk()):
            warnings.warn(
                f"{child.path}: {count_images(count, 'picture')} not used, because the name is that of masks: "
                "masks lie in ground_truth", DataWarning, stacklevel=2,
            )  # fmt: skip
        return None
    below = [f for f in child.walk() if f is not child and f.count() and classify_folder(f.path.name) == "good"]
    is_plain_word = kind == "neutral" and not any(char.isdigit() for char in name) and len(name) > 1
    is_unclear = kind in ("unclear", "train", "test") or is_plain_word or (kind == "other" and resembles_good(name))
    if below or (is_unclear and child.count()):
        inner = f", and {list_names(child.path, [f.path for f in below])} in it" if below else ""
        raise ValueError(
            f"{child.path}: wanted a folder of good images ({test.path / GOOD}) or of one kind of defect "
            f"({test.path / 'DEFECT'}), got a name that does not say which{inner}: rename it"
        )
    return 1


def _is_suspect(folder: Folder) -> bool:
    return classify_folder(folder.path.name) in ("bad", "mask", "unclear")


def _refuse_unclear_tests(test: Folder) -> None:
    """Raise an error if images lie directly in ``test``, or its folders are numbers of classes."""
    if test.images:
        first = min(test.images)
        raise ValueError(
            f"{test.path / first}: wanted test images in test/{GOOD} and test/DEFECT, got one directly in test"
        )
    names = {child.path.name for child in test.folders if child.count()}
    if len(names) > 1 and names == {str(number) for number in range(len(names))}:
        raise ValueError(
            f"{test.path}: wanted test images in test/{GOOD} and test/DEFECT, got folders {', '.join(sorted(names))}, "
            "which may be numbers of classes: rename the one of good images"
        )


def _warn_of_unused(path: Path, folders: Sequence[Path]) -> None:
    """Warn of pictures directly in ``path``, and of folders with pictures that are not used."""
    own = scan_folder(path, recursive=False)
    unused = [own, *(scan_folder(folder) for folder in folders)]
    parts = [f"{count_images(count)} in {folder.path.name}" for folder in unused[1:] if (count := folder.count())]
    if own.images:
        loose = [path / name for name in own.images]
        parts.insert(0, f"{count_images(len(loose))} directly in it ({list_names(path, loose)})")
    if unread := [inner.path / name for folder in unused for inner in folder.walk() for name in inner.unread]:
        parts.append(f"{count_images(len(unread), 'picture')} that cannot be read ({list_names(path, unread)})")
    if parts:
        warnings.warn(f"{path}: not used: {', '.join(parts)}", DataWarning, stacklevel=2)


def _is_category(path: Path) -> bool:
    return bool(_find(path, "train") or _find(path, "test"))


def _find(path: Path, split: Literal["train", "test"]) -> list[Path]:
    """Return the folders of a split: ``train`` or ``test`` in any case; only if there is none, other words for it."""
    exact = path / split
    if exact.is_dir():
        return [exact]
    if not path.is_dir():
        return []
    names = (split, f"{split}ing", f"{split}s")
    return [child for child in list_folders(path) if child.name.lower() in names]


def _list_good(split: Path) -> list[Path]:
    """Return the folders of good images directly in a split."""
    folders = list_folders(split) if split.is_dir() else []
    return [child for child in folders if classify_folder(child.name) == "good"]


def _class_folder(sample: Sample) -> Path:
    """Return the folder of a sample that names its class, or else the folder that contains it."""
    for parent in sample.path.parents:
        if parent.name == sample.defect or (not sample.label and classify_folder(parent.name) == "good"):
            return parent
        if parent.name == sample.category:
            return parent
    return sample.path.parent


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
