"""Categories in MVTec AD layout: their folders, labels and masks.

::

    CATEGORY/train/good/NAME.png                  required
    CATEGORY/test/good/NAME.png                   label 0
    CATEGORY/test/DEFECT/NAME.png                 label 1
    CATEGORY/ground_truth/DEFECT/NAME_mask.png    or NAME.png, any image suffix; for every defect image or for none

Folders of good images can have any usual name (`recontrast.data.class_names`), and case does not matter.
"""

import difflib
import warnings
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from recontrast.data.class_folders import select_good_images
from recontrast.data.class_names import classify_folder, resembles_good
from recontrast.data.dataset_sample import GOOD, Sample
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

DEFECTS, DEFECTS_CONFIG = "defects", "defects_config.json"  # single masks of MVTec LOCO AD, and what their values mean


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
    check_folder(root, "the root of a data set")
    return [child.name for child in list_folders(root) if any(_list_good(split) for split in _find(child, "train"))]


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
    check_folder(root, "the root of a data set")
    if not (root / category).is_dir():
        raise ValueError(f"{root}: wanted category {category!r}, got {join_names(category, categories(root))}")
    return read_category(root / category, category)


def read_category(path: Path, name: str, incomplete: bool = False) -> list[Sample]:
    """Read the samples of one category.

    Args:
        path: Folder of the category.
        name: Name of the category.
        incomplete: Whether test images and masks that lack each other are samples, see `recontrast.data.datasets.load`.

    Returns:
        Training samples, then test samples by folder, each in natural order.

    Raises:
        FileNotFoundError: If there is no folder of good training images.
        ValueError: If a folder contains no images, the label of a folder is unclear, or masks and images do not match.
    """
    training = [Sample(image, None, 0, name, "train", GOOD) for image in _read_training_images(path)]
    tests = [split for folder in _find(path, "test") for split in [scan_folder(folder)]]
    mask_folder = find_mask_folder(path)
    masks = {} if mask_folder is None else find_masks(mask_folder)
    unused = dict(masks)
    samples = []
    errors = []
    for test in tests:
        _refuse_unclear_tests(test)
        warn_of_unused(test.path, [])
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
    used |= {path / DEFECTS} if (path / DEFECTS_CONFIG).is_file() else set()
    warn_of_unused(path, [child for child in list_folders(path) if child not in used])
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
        check_folder(splits[0] / GOOD, "the folder of good training images")
    images = []
    for split in splits:
        if good := _list_good(split):
            unused = [child for child in list_folders(split) if child not in good]
            warn_of_unused(split, unused)
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


def warn_of_unused(path: Path, folders: Sequence[Path]) -> None:
    """Warn of pictures directly in a folder, and of subfolders with pictures that are not used.

    Args:
        path: Folder whose own pictures are not used.
        folders: Subfolders that are not used.
    """
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


def is_category(path: Path) -> bool:
    """Return whether a folder is a category: whether it has a folder of training or test images."""
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


def check_folder(path: Path, description: str) -> None:
    """Raise an error if a path does not exist or is not a folder.

    Args:
        path: Path of the folder.
        description: What the folder should be, for the error message.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is a file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: wanted {description}, got no such folder")
    if not path.is_dir():
        raise ValueError(f"{path}: wanted {description}, got a file")
    complete_commits(path)  # of `recontrast prepare`, if it was killed


def join_names(missing: str, names: list[str]) -> str:
    """Join names for an error message about a missing name.

    Args:
        missing: The missing name.
        names: Names that exist.

    Returns:
        The names separated by commas, the one closest to the missing name first.
    """
    closest = difflib.get_close_matches(missing, names, 1)
    return ", ".join(closest + [name for name in names if name not in closest]) or "no category"
