"""Tables in a download that say what its images are: labels in CSV, and listings of images and masks in JSON."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recontrast.data.csv_table import TableRow, read_table, shorten
from recontrast.data.dataset_sample import GOOD
from recontrast.data.downloads import ListedFiles
from recontrast.data.json_text import describe_json_error, parse_json
from recontrast.data.regular_file import read_bytes

_LARGEST = 2**30  # bytes of a listing


@dataclass(frozen=True)
class Table:
    """CSV table with the labels of images.

    Attributes:
        file: Path of the table below the root of the download.
        image: Column with the names of the images, without suffix.
        label: Column with the classes.
        group: Column with the name of what an image shows: images of one group are not divided between training and
            test. None: each image is a group of its own.
    """

    file: str
    image: str
    label: str
    group: str | None = None


@dataclass(frozen=True)
class Listing:
    """JSON files, one for each category, that name the images, their masks and their split.

    Each holds ``{"meta": {"prefix", "normal_class"}, "train": [...], "test": [...]}``, and an image is
    ``{"anomaly_class", "image_path", "mask_path"}``. An image without a mask is good, whatever its class.

    Attributes:
        files: Paths of the file of a category, alternatives, with the part ``{category}``.
        folders: Folders that the images may lie in; the first one that exists is used.
    """

    files: tuple[str, ...]
    folders: tuple[str, ...]


def read_labels(root: Path, table: Table, images: Sequence[Path]) -> list[tuple[str, str | None]]:
    """Read the class and the group of each image.

    Args:
        root: Root of the download.
        table: Description of the table.
        images: Images, each of which must have a line; every line must have an image.

    Returns:
        Class and group of each image.

    Raises:
        FileNotFoundError: If the table, or an image of it, is missing.
        ValueError: If the table is invalid, or lacks an image.
    """
    columns = [table.image, table.label, *([] if table.group is None else [table.group])]
    rows = {row[table.image]: row for row in read_table(root / table.file, columns)}
    labels, found = [], set()
    for path in images:
        row = rows.get(path.stem)
        if row is None:
            raise ValueError(f"{root / table.file}: wanted a line for {path}, got none")
        if not row[table.label] or "/" in row[table.label] or row[table.label].startswith("."):
            raise ValueError(f"{row.location}: wanted a class in {table.label}, got {shorten(row[table.label])!r}")
        labels.append((row[table.label], None if table.group is None else row[table.group]))
        found.add(path.stem)
    if missing := [row for name, row in rows.items() if name not in found]:
        more = f", and {len(missing) - 1} more are missing" if len(missing) > 1 else ""
        name = shorten(missing[0][table.image])
        raise FileNotFoundError(f"{missing[0].location}: wanted the image {name}, got no such file{more}")
    return labels


def read_listing(
    root: Path, listing: Listing, categories: Sequence[str]
) -> list[tuple[Path, str, str, str, Path | None]]:
    """Read the images of all categories whose images are there.

    Args:
        root: Root of the download.
        listing: Description of the files.
        categories: Names of the categories.

    Returns:
        Path, split, category, kind of defect and mask of each image.

    Raises:
        FileNotFoundError: If a listing, or a file named by one, is missing.
        ValueError: If a listing is not of the form that `Listing` describes.
    """
    folder = next((root / name for name in listing.folders if (root / name).is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"{root}: wanted one of {', '.join(listing.folders)}, got none")
    images, files = [], ListedFiles(folder)
    for category in categories:
        if not (folder / category).is_dir():
            continue
        paths = [root / name.format(category=category) for name in listing.files]
        path = next((path for path in paths if path.is_file()), paths[0])
        for row, split, values, prefix, normal in _read_lines(path):
            image = files.resolve(row, f"{prefix}{values['image_path']}")
            mask, defect = values["mask_path"], values["anomaly_class"]
            is_good = mask is None or defect == normal
            if split == "train" and not is_good:
                raise ValueError(f"{row.location}: wanted good images for training, got one of {shorten(defect)}")
            if defect.startswith(".") or "/" in defect:
                raise ValueError(f"{row.location}: wanted the name of a class, got {shorten(defect)!r}")
            own = None if is_good else files.resolve(row, f"{prefix}{mask}", "mask")
            images.append((image, split, category, GOOD if is_good else defect, own))
    files.check()
    return images


def _read_lines(path: Path) -> Iterator[tuple[TableRow, str, dict[str, Any], str, str]]:
    """Yield where it stands, the split, the values, the prefix of the paths and the good class, for each image."""
    try:
        content = parse_json(read_bytes(path, "a listing in JSON", _LARGEST))
        prefix, normal = content["meta"]["prefix"], content["meta"]["normal_class"]
        splits = {name: content[name] for name in ("train", "test")}
        if not (isinstance(prefix, str) and all(isinstance(images, list) for images in splits.values())):
            raise ValueError("a value of another type")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: wanted a listing in JSON, got no such file") from None
    except (ValueError, KeyError, TypeError) as error:
        wanted = "wanted JSON with meta (prefix, normal_class), train and test"
        raise ValueError(f"{path}: {wanted}, got {describe_json_error(error)}") from None
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""
    for split, images in splits.items():
        for number, values in enumerate(images, 1):
            row = TableRow(f"{path} {split} {number}", {})
            keys = ("anomaly_class", "image_path", "mask_path")
            if not isinstance(values, dict) or not values.keys() >= set(keys):
                raise ValueError(f"{row.location}: wanted {', '.join(keys)}, got {shorten(str(values))}")
            texts = [values[key] for key in keys[:2]] + ([] if values["mask_path"] is None else [values["mask_path"]])
            if not all(isinstance(text, str) and text for text in texts):
                raise ValueError(f"{row.location}: wanted {', '.join(keys)} as text, got {shorten(str(values))}")
            yield row, split, values, prefix, normal
