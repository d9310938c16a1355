"""Lists of images in place of folders: one row an image, with its split, label, masks, category and group.

A list says what the folders of the MVTec AD layout say, for images that lie anywhere. Relative paths start at the
folder of the list.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from recontrast.data.class_names import classify_folder
from recontrast.data.csv_table import TableRow, shorten
from recontrast.data.dataset_sample import GOOD, Sample
from recontrast.data.list_files import COLUMNS, read_rows, write_rows
from recontrast.data.listing import PathLike
from recontrast.data.unsplit import assign_splits

Split = Literal["train", "test", "calibration"]
_SPLITS: dict[str, Split] = {
    "train": "train", "training": "train", "test": "test", "testing": "test",
    "calibration": "calibration", "validation": "calibration", "val": "calibration",
}  # fmt: skip
_DEFECT = "defect"  # kind of defect of images with a defect whose list does not name it


def read_list(
    path: PathLike, *, incomplete: bool = False, for_test: bool = False, views_from: str | None = None
) -> dict[str, list[Sample]]:  # fmt: skip
    """Read a list of images, see `recontrast.data.list_files.read_rows` for its formats.

    Columns: ``path``; ``split`` (train, test or calibration, for good images to calibrate with); ``label`` (0 or good,
    1 or defect); ``defect``, its kind; ``mask`` of the defect; ``roi``, mask of the region of interest; ``category``,
    by default the name of the list; ``group``, such as the serial number of a part.

    Without a column ``split``, all images are good images to train on, or test images if ``for_test``; if some have a
    defect, these and a fifth of the good ones are test images, see `recontrast.data.unsplit.assign_splits`.

    Args:
        path: File of the list.
        incomplete: Whether images and masks may be missing, and defects without a mask in a category with masks.
        for_test: Whether all images are test images if there is no column ``split``.
        views_from: Where the views of a part are found, see `recontrast.data.views.Views`: they are in one split, and
            those that do not show a defect need no mask. None: single images.

    Returns:
        Samples by category, in the order of the list.

    Raises:
        OSError: If the list cannot be read.
        ImportError: If it is a Parquet file, and pyarrow is not installed.
        ValueError: If the list is damaged, a file is missing or listed twice, a label contradicts the split, the kind
            of defect, a mask or the name of the folder, or a group is on both sides of a split.
    """
    path = Path(path)
    rows = read_rows(path)
    has_split = _check_all_or_none(rows, "split")
    samples = [_read_sample(row, path, has_split=has_split, incomplete=incomplete) for row in rows]
    _check_unique(rows, [sample.path for sample in samples])
    if not incomplete and views_from is None:
        _check_masks(rows, samples)
    if not has_split:
        root = path.parent
        if for_test:
            samples = [replace(sample, split="test") for sample in samples]
        else:
            samples = assign_splits(samples, [os.path.relpath(sample.path, root) for sample in samples], views_from)
    _check_groups([row.location for row in rows], [_name_row(row) for row in rows], samples)
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.category, []).append(sample)
    return groups


def read_good_list(path: PathLike, views_from: str | None = None) -> list[Sample]:
    """Return the good images of a list to train or calibrate with.

    Args:
        path: File of the list.
        views_from: As in `read_list`.

    Returns:
        The images of the split calibration if there are any; otherwise all good ones that are no test images.

    Raises:
        ValueError: If there are none, or the list is invalid, see `read_list`.
    """
    samples = [sample for group in read_list(path, views_from=views_from).values() for sample in group]
    good = [sample for sample in samples if sample.split == "calibration"]
    good = good or [sample for sample in samples if not sample.label and sample.split == "train"]
    if not good:
        raise ValueError(f"{path}: wanted good images of the split calibration or train, got {len(samples)} others")
    return good


def list_paths(path: PathLike) -> list[Path]:
    """Return the paths of all images of a list, of every split and label; their files may be missing.

    Args:
        path: File of the list.

    Raises:
        ValueError: If the list is damaged, or a path is empty or listed twice.
    """
    path = Path(path)
    rows = read_rows(path)
    paths = [_resolve(row, "path", path.parent) for row in rows]
    return _check_unique(rows, [file for file in paths if file is not None])


def write_list(path: PathLike, groups: Mapping[str, Sequence[Sample]]) -> None:
    """Write samples as a list that `read_list` reads.

    Args:
        path: File of the list, whose ending is the format. Paths below its folder become relative, others absolute.
        groups: Samples by category.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the ending is not that of a list, or a group is on both sides of a split.
    """
    folder = Path(os.path.abspath(path)).parent

    def shorten_path(file: Path | None) -> str:
        if file is None:
            return ""
        absolute = Path(os.path.abspath(file))
        return absolute.relative_to(folder).as_posix() if absolute.is_relative_to(folder) else str(absolute)

    samples = [sample for group in groups.values() for sample in group]
    _check_groups([f"{path}: {sample.path}" for sample in samples], [str(sample.path) for sample in samples], samples)
    rows = []
    for sample in samples:
        row = {
            "path": shorten_path(sample.path), "split": sample.split, "label": str(sample.label),
            "defect": sample.defect, "mask": shorten_path(sample.mask), "roi": shorten_path(sample.roi),
            "category": sample.category, "group": sample.group or "",
        }  # fmt: skip
        rows.append([row[name] for name in COLUMNS])
    write_rows(path, rows)


def _check_all_or_none(rows: Sequence[TableRow], column: str) -> bool:
    """Return whether all rows have a value in a column, or raise ValueError if only some have."""
    filled = [bool(row[column].strip()) for row in rows]
    if any(filled) and not all(filled):
        row = rows[filled.index(False)]
        raise ValueError(f"{row.location}: wanted a {column} in each row or in none, got none in this one")
    return any(filled)


def _read_sample(row: TableRow, path: Path, *, has_split: bool, incomplete: bool) -> Sample:
    """Return the sample of a row; without a split it is a training image."""
    folder = path.parent
    image = _resolve(row, "path", folder)
    if image is None:
        raise ValueError(f"{row.location}: wanted the path of an image, got none")
    split: Split = "train"
    if has_split:
        name = row["split"].strip().lower()
        if name not in _SPLITS:
            raise ValueError(f"{row.location}: split: wanted train, test or calibration, got {shorten(row['split'])!r}")
        split = _SPLITS[name]
    mask, roi = (_resolve(row, column, folder) for column in ("mask", "roi"))
    label = _read_label(row, split if has_split else None, has_mask=mask is not None)
    defect = row["defect"].strip()
    kind = GOOD if not label else defect or _DEFECT
    if label and has_split and split != "test":
        purpose = "training" if split == "train" else "calibration"
        raise ValueError(f"{row.location}: wanted good images for {purpose}, got one with a defect: {image}")
    if not label and mask is not None:
        raise ValueError(f"{row.location}: wanted masks of images with a defect alone, got one of a good image: {mask}")
    _check_folder_name(row, image, folder, label)
    for column, file in (("path", image), ("mask", mask), ("roi", roi)):
        if file is not None and (column == "roi" or not incomplete) and not file.is_file():
            got = "a folder" if file.is_dir() else "no such file"
            wanted = {"path": "the image", "mask": "the mask", "roi": "the region of interest"}[column]
            raise ValueError(f"{row.location}: wanted {wanted} {file}, got {got}")
    category = row["category"].strip() or path.stem
    return Sample(image, mask, label, category, split, kind, roi, row["group"].strip() or None)


def _resolve(row: TableRow, column: str, folder: Path) -> Path | None:
    """Return the path in a cell; blanks around it belong to it if a file of that name exists."""
    cell = row[column]
    if not cell.strip():
        return None
    if "\0" in cell:
        raise ValueError(f"{row.location}: wanted a path in {column}, got a null byte")
    exact = folder / cell
    return exact if cell == cell.strip() or os.path.lexists(exact) else folder / cell.strip()


def _read_label(row: TableRow, split: Split | None, *, has_mask: bool) -> int:
    """Return the label of a row: as stated, or as its kind of defect, its mask or its split say."""
    text, defect = row["label"].strip(), row["defect"].strip()
    of_defect = None if not defect else 0 if classify_folder(defect) == "good" else 1
    if text in ("0", "1"):
        label = int(text)
    elif text:
        kind = classify_folder(text)
        if kind not in ("good", "bad"):
            raise ValueError(f"{row.location}: label: wanted 0 or good, 1 or defect, got {shorten(text)!r}")
        label = int(kind == "bad")
    elif of_defect is not None:
        label = of_defect
    elif has_mask:
        label = 1
    elif split == "test":
        raise ValueError(f"{row.location}: wanted a label or a defect for a test image, got neither")
    else:
        label = 0
    if of_defect is not None and of_defect != label:
        name = "with a defect (label 1)" if label else "good (label 0)"
        raise ValueError(f"{row.location}: wanted a label that fits the defect {shorten(defect)!r}, got {name}")
    return label


def _check_folder_name(row: TableRow, image: Path, folder: Path, label: int) -> None:
    """Raise ValueError if a folder between the list and the image has a name that contradicts the label."""
    parents = image.relative_to(folder).parents if image.is_relative_to(folder) else [image.parent]
    for parent in parents:
        kind = classify_folder(parent.name) if parent.name not in ("", "..") else "other"
        if kind == ("good" if label else "bad"):
            name, got = ("with a defect", "good images") if label else ("good", "images with defects")
            raise ValueError(
                f"{row.location}: wanted an image that is {name}, got one in a folder whose name is that of {got}: "
                f"{image}"
            )
        if kind in ("bad", "good"):
            return


def _check_unique(rows: Sequence[TableRow], paths: Sequence[Path]) -> list[Path]:
    """Return the paths, or raise ValueError if one is empty or is listed twice."""
    if len(paths) < len(rows):
        row = next(row for row in rows if not row["path"].strip())
        raise ValueError(f"{row.location}: wanted the path of an image, got none")
    first: dict[str, TableRow] = {}
    for row, path in zip(rows, paths, strict=True):
        earlier = first.setdefault(os.path.normcase(os.path.abspath(path)), row)
        if earlier is not row:
            raise ValueError(f"{row.location}: wanted each path once, got {path} again, as in {_name_row(earlier)}")
    return list(paths)


def _check_masks(rows: Sequence[TableRow], samples: Sequence[Sample]) -> None:
    """Raise ValueError if only some of the images with a defect of a category have masks."""
    masked = {sample.category for sample in samples if sample.mask is not None}
    for row, sample in zip(rows, samples, strict=True):
        if sample.label and sample.mask is None and sample.category in masked:
            raise ValueError(
                f"{row.location}: wanted a mask for each image with a defect of {sample.category} or for none, got "
                f"none for {sample.path}"
            )


def _name_row(row: TableRow) -> str:
    """Return the number of a row without its file, such as ``line 3``."""
    return " ".join(row.location.rsplit(" ", 2)[1:])


def _check_groups(locations: Sequence[str], names: Sequence[str], samples: Sequence[Sample]) -> None:
    """Raise ValueError if a group is divided between splits; ``locations`` and ``names`` say where each sample is."""
    first: dict[tuple[str, str], tuple[Sample, str]] = {}
    for location, name, sample in zip(locations, names, samples, strict=True):
        if sample.group is None:
            continue
        other, earlier = first.setdefault((sample.category, sample.group), (sample, name))
        if other.split != sample.split:
            raise ValueError(
                f"{location}: wanted all images of group {shorten(sample.group)!r} in one split, got {sample.split} "
                f"here and {other.split} in {earlier}"
            )
