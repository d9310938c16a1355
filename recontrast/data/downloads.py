"""Readers of the original downloads of the paper's five data sets, with the target of each file in MVTec AD layout.

Folders, splits and labels are those of the reference (README and prepare_data/ of its public code). The reference puts
test images of all diagnoses into one folder ABNORMAL. Here, each diagnosis has its own folder; the labels are the same,
and reports show each diagnosis.

Each reader takes the folder of a download, or a folder up to three levels above it, and reads no pixels.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from recontrast.data import datasets
from recontrast.data.csv_table import TableRow, read_table, shorten
from recontrast.data.datasets import GOOD
from recontrast.data.decode import decode
from recontrast.data.fundus import read_fundus
from recontrast.data.images import MAX_PIXELS, image_size
from recontrast.data.listing import is_hidden, is_image, list_images

BAD = "bad"  # folder of anomalous images in the layout that the script of VisA's authors writes
APTOS_TRAIN = 1000  # normal images for training, drawn with `APTOS_SEED`; the others are test images
APTOS_SEED = 1
APTOS_GRADES = ("0", "1", "2", "3", "4")  # grades of diabetic retinopathy; 0 is none
ISIC_CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
ISIC_NORMAL = "NV"  # naevi are the normal class


@dataclass(frozen=True)
class Entry:
    """One file of a prepared data set.

    Attributes:
        target: Path below the root of the data set: CATEGORY/train/good/NAME, CATEGORY/ground_truth/bad/NAME.
        source: File of the download.
        convert: Function that returns the pixels to write, or None to use the source unchanged. Default: no conversion.
    """

    target: str
    source: Path
    convert: Callable[[Path], np.ndarray | None] | None = None


Plan = tuple[Path, list[Entry]]  # folder of the download, and the files of the prepared data set


def read_mvtec(source: Path) -> Plan:
    """Read MVTec AD as unpacked, CATEGORY/{train,test,ground_truth}, or another data set in the same layout.

    Args:
        source: Folder of the download, or of a single category.

    Returns:
        Folder of the download, and the files of the prepared data set.

    Raises:
        FileNotFoundError: If a category has no ``train/good``.
        ValueError: If there is no such data set below ``source``, or a category is invalid.
    """
    is_category = (source / "train").is_dir()
    root = source if is_category else find_root(source, "*/train", f"CATEGORY/train/{GOOD}, as MVTec AD unpacks")
    entries = []
    for category, samples in datasets.load(root).items():
        folder = root if is_category else root / category
        files = [file for sample in samples for file in (sample.path, sample.mask) if file is not None]
        entries += [Entry(f"{category}/{file.relative_to(folder).as_posix()}", file) for file in files]
    return root, entries


def read_visa(source: Path) -> Plan:
    """Read VisA, split by its own split_csv/1cls.csv, or in the layout that the script of its authors writes.

    Normal images become good, all others bad. Every nonzero value of a mask becomes 255.

    Args:
        source: Folder of the download.

    Returns:
        Folder of the download, and the files of the prepared data set.

    Raises:
        FileNotFoundError: If files named by the table are missing.
        ValueError: If there is no such data set below ``source``, or the table is invalid.
    """
    table = "split_csv/1cls.csv"
    if not _find_folders(source, table) and _find_folders(source, "*/train"):
        return read_mvtec(source)
    root = find_root(source, table, f"{table} of the VisA download, or the one-class layout CATEGORY/train/{GOOD}")
    entries, files = [], ListedFiles(root)
    for row in read_table(root / table, ("image", "object", "split", "label", "mask")):
        category, split, is_good = row["object"], row["split"], row["label"] == "normal"
        if split not in ("train", "test"):
            raise ValueError(f"{row.location}: wanted the split train or test, got {shorten(split)!r}")
        if split == "train" and not is_good:
            raise ValueError(
                f"{row.location}: wanted normal images for training, got one with the label {shorten(row['label'])}"
            )
        if not category or is_hidden(category) or category in (".", "..") or "/" in category:
            raise ValueError(f"{row.location}: wanted the name of an object, got {shorten(category)!r}")
        image = files.resolve(row, row["image"])
        name = PurePosixPath(row["image"]).name
        entries.append(Entry(f"{category}/{split}/{GOOD if is_good else BAD}/{name}", image))
        if not is_good:
            mask = files.resolve(row, row["mask"], "mask")
            target = f"{category}/ground_truth/{BAD}/{PurePosixPath(name).with_suffix('.png')}"
            entries.append(Entry(target, mask, partial(binarise_mask, image=image)))
    files.check()
    return root, entries


def read_aptos(source: Path) -> Plan:
    """Read APTOS 2019: train.csv and train_images/. Its images without labels are not used.

    Grade 0 is normal. The normal images are shuffled from the order of the table, and the first thousand are training
    images. All images are cropped to the eye and resized (`recontrast.data.fundus`).

    Args:
        source: Folder of the download.

    Returns:
        Folder of the download, and the files of the prepared data set.

    Raises:
        FileNotFoundError: If the table, or a file named by it, is missing.
        ValueError: If there is no such data set below ``source``, or the table is invalid.
    """
    root = find_root(source, "train.csv", "train.csv and train_images/, as APTOS 2019 unpacks")
    normal, anomalous, files = [], [], ListedFiles(root)
    for row in read_table(root / "train.csv", ("id_code", "diagnosis")):
        name, grade = f"{row['id_code']}.png", row["diagnosis"]
        if grade not in APTOS_GRADES:
            raise ValueError(f"{row.location}: wanted a diagnosis from 0 to 4, got {shorten(grade)!r}")
        image = files.resolve(row, f"train_images/{name}")
        if grade == "0":
            normal.append(image)
        else:
            anomalous.append(Entry(f"aptos/test/grade{grade}/{name}", image, read_fundus))
    files.check()
    random.Random(APTOS_SEED).shuffle(normal)
    splits = ["train"] * APTOS_TRAIN + ["test"] * max(0, len(normal) - APTOS_TRAIN)
    good = [Entry(f"aptos/{split}/{GOOD}/{p.name}", p, read_fundus) for split, p in zip(splits, normal, strict=False)]
    return root, good + anomalous


def read_oct2017(source: Path) -> Plan:
    """Read OCT2017 (CellData/OCT of ZhangLabData): train/NORMAL for training, all of test/ for the test.

    Args:
        source: Folder of the download.

    Returns:
        Folder of the download, and the files of the prepared data set.

    Raises:
        ValueError: If there is no such data set below ``source``, or a folder contains no images.
    """
    root = find_root(source, "train/NORMAL", "train/NORMAL and test/NORMAL, as OCT2017 unpacks")
    if not (root / "test" / "NORMAL").is_dir():
        raise ValueError(
            f"{root}: wanted test/NORMAL beside train/NORMAL, as OCT2017 unpacks, got {list_content(root)}"
        )
    folders = [("train", root / "train" / "NORMAL")]
    folders += [("test", folder) for folder in sorted((root / "test").iterdir()) if folder.is_dir()]
    entries = []
    for split, folder in folders:
        if not is_hidden(folder.name):
            kind = GOOD if folder.name == "NORMAL" else folder.name
            entries += [
                Entry(f"oct2017/{split}/{kind}/{p.relative_to(folder).as_posix()}", p) for p in list_images(folder)
            ]
    return root, entries


def read_isic2018(source: Path) -> Plan:
    """Read ISIC 2018 Task 3: naevi (NV) of the training set for training, all of the validation set for the test.

    Args:
        source: Folder of the download.

    Returns:
        Folder of the download, and the files of the prepared data set.

    Raises:
        FileNotFoundError: If a table, or a file named by one, is missing.
        ValueError: If there is no such data set below ``source``, or a table is invalid.
    """
    marker = "ISIC2018_Task3_Training_Input"
    description = f"{marker}, ..._GroundTruth and the same of Validation, as ISIC 2018 Task 3 unpacks"
    root = find_root(source, marker, description)
    entries, files = [], ListedFiles(root)
    for split, part in (("train", "Training"), ("test", "Validation")):
        table = Path(f"ISIC2018_Task3_{part}_GroundTruth.csv")
        path = (
            root / table.stem / table if (root / table.stem).is_dir() else root / table
        )  # in a folder of its own, or directly in the root
        for row in read_table(path, ("image", *ISIC_CLASSES)):
            try:
                values = [float(row[name]) for name in ISIC_CLASSES]
            except ValueError:
                values = []
            if sorted(values) != [0.0] * (len(ISIC_CLASSES) - 1) + [1.0]:
                cells = shorten(", ".join(row[name] for name in ISIC_CLASSES))
                raise ValueError(f"{row.location}: wanted one of {', '.join(ISIC_CLASSES)} to be 1, got {cells}")
            kind = ISIC_CLASSES[values.index(1.0)]
            if split == "test" or kind == ISIC_NORMAL:
                name = f"{row['image']}.jpg"
                image = files.resolve(row, f"ISIC2018_Task3_{part}_Input/{name}")
                entries.append(Entry(f"isic2018/{split}/{GOOD if kind == ISIC_NORMAL else kind}/{name}", image))
    files.check()
    return root, entries


def binarise_mask(path: Path, image: Path, *, always: bool = False) -> np.ndarray | None:
    """Convert a mask so that every nonzero value becomes 255.

    Args:
        path: Path of the mask.
        image: Path of its image, which must have the same size.
        always: Whether to return the values also if the file contains exactly these.

    Returns:
        (H, W) uint8; None if the file contains exactly these values already.

    Raises:
        OSError: If a file does not exist or cannot be opened.
        ValueError: If a file cannot be decoded, or the sizes differ.
    """
    decoded = decode(path, MAX_PIXELS)
    height, width = image_size(image)
    if (height, width) != (decoded.height, decoded.width):
        raise ValueError(
            f"{path}: wanted a mask of the size of its image {image}, {height} x {width} (height x width), "
            f"got {decoded.height} x {decoded.width}"
        )
    values = np.asarray(decoded)
    if values.ndim == 3:  # maximum over the colour channels; an alpha channel is ignored
        values = values[:, :, : 3 if values.shape[2] > 2 else 1].max(axis=2)
    full = np.where(values != 0, np.uint8(255), np.uint8(0))
    return None if not always and decoded.mode == "L" and np.array_equal(values, full) else full


class ListedFiles:
    """Files named by a table; missing files are counted, and reported in one error.

    Args:
        root: Folder of the files.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.first_error, self.missing = root, "", 0

    def resolve(self, row: TableRow, name: str, kind: str = "image") -> Path:
        """Return the path of a file; it can be missing.

        Args:
            row: Row that names the file, for error messages.
            name: Path below the root.
            kind: What the file is, for error messages.

        Raises:
            ValueError: If ``name`` is no path of an image below the root.
        """
        relative = PurePosixPath(name)
        if not is_image(relative.name) or relative.is_absolute() or ".." in relative.parts:
            raise ValueError(f"{row.location}: wanted the path of its {kind} below {self.root}, got {shorten(name)!r}")
        path = self.root / relative
        if not path.is_file():
            self.first_error = self.first_error or f"{row.location}: wanted the {kind} {path}, got no such file"
            self.missing += 1
        return path

    def check(self) -> None:
        """Raise FileNotFoundError if files are missing."""
        if self.missing:
            more = f", and {self.missing - 1} more are missing" if self.missing > 1 else ""
            raise FileNotFoundError(self.first_error + more)


def find_root(source: Path, marker: str, description: str) -> Path:
    """Find the root of a download: ``source``, or one folder up to three levels below it.

    Args:
        source: Folder to search.
        marker: Glob pattern of something that the root contains.
        description: What the root should contain, for error messages.

    Returns:
        The root.

    Raises:
        ValueError: If there is none, or there are several.
    """
    if not source.is_dir():
        raise ValueError(f"{source}: wanted a folder with {description}, got {'a file' if source.exists() else 'none'}")
    folders = _find_folders(source, marker)
    if not folders:
        raise ValueError(f"{source}: wanted {description}, got {list_content(source)}")
    if len(folders) > 1:
        raise ValueError(f"{source}: wanted one folder with {description}, got {folders[0]} and {folders[1]}")
    return folders[0]


def _find_folders(source: Path, marker: str) -> list[Path]:
    """Return the folders that contain ``marker``, on the first of four levels that has any."""
    level = [source] if source.is_dir() else []
    for _ in range(4):
        if folders := [folder for folder in level if next(folder.glob(marker), None)]:
            return folders
        level = sorted(p for folder in level for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name))
    return []


def list_content(folder: Path) -> str:
    """Return the first names in a ``folder``, for an error message."""
    names = sorted(path.name for path in folder.iterdir() if not is_hidden(path.name))
    return (", ".join(names[:5]) + ", ..." * (len(names) > 5)) or "an empty folder"
