"""The five data sets of the paper as their authors publish them -> which file goes where in MVTec AD layout.

Folders, splits and labels are those of the reference (README and prepare_data/ of its public code). Where it puts the
test images of several diagnoses into one folder ABNORMAL, each has its own here: labels are the same, reports say more.
Every function takes the folder of a download, or one up to three levels above it, and reads no pixel.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from recontrast.data import datasets
from recontrast.data.csv_table import TableRow, read_table
from recontrast.data.datasets import GOOD
from recontrast.data.decode import decode
from recontrast.data.fundus import read_fundus
from recontrast.data.images import MAX_PIXELS, image_size
from recontrast.data.listing import is_hidden, is_image, list_images

BAD = "bad"  # VisA's folder of anomalous images, in the layout that its authors' script writes
APTOS_TRAIN = 1000  # normal images, drawn with `APTOS_SEED`; the others are for the test
APTOS_SEED = 1
APTOS_GRADES = ("0", "1", "2", "3", "4")  # of diabetic retinopathy, 0 is none
ISIC_CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
ISIC_NORMAL = "NV"  # naevi


@dataclass(frozen=True)
class Entry:
    """One file of a prepared data set."""

    target: str  # below its root: CATEGORY/train/good/NAME, CATEGORY/ground_truth/bad/NAME
    source: Path
    make: Callable[[Path], np.ndarray | None] | None = None  # the picture to write, where it is not the source as it is


Plan = tuple[Path, list[Entry]]  # where the download was found, and what is made of it


def read_mvtec(source: Path) -> Plan:
    """MVTec AD as it unpacks: CATEGORY/{train,test,ground_truth}, and any other data set in its layout."""
    alone = (source / "train").is_dir()
    root = source if alone else _root(source, "*/train", f"CATEGORY/train/{GOOD}, as MVTec AD unpacks")
    entries = []
    for category, samples in datasets.load(root).items():
        here = root if alone else root / category
        files = [file for sample in samples for file in (sample.path, sample.mask) if file is not None]
        entries += [Entry(f"{category}/{file.relative_to(here).as_posix()}", file) for file in files]
    return root, entries


def read_visa(source: Path) -> Plan:
    """VisA: its download arranged by its own split_csv/1cls.csv, or what its authors' script made of it.

    Normal images are good, all others bad; every value of a mask that is not zero becomes 255.
    """
    table = "split_csv/1cls.csv"
    if not _holders(source, table) and _holders(source, "*/train"):
        return read_mvtec(source)
    root = _root(source, table, f"{table} of the VisA download, or the one-class layout CATEGORY/train/{GOOD}")
    entries, absent = [], _Absent(root)
    for line in read_table(root / table, ("image", "object", "split", "label", "mask")):
        category, split, good = line["object"], line["split"], line["label"] == "normal"
        if split not in ("train", "test"):
            raise ValueError(f"{line.place}: wanted the split train or test, got {split!r}")
        if split == "train" and not good:
            raise ValueError(f"{line.place}: wanted normal images for training, got one with the label {line['label']}")
        if not category or is_hidden(category) or category in (".", "..") or "/" in category:
            raise ValueError(f"{line.place}: wanted the name of an object, got {category!r}")
        image = absent.check(line, line["image"])
        name = PurePosixPath(line["image"]).name
        entries.append(Entry(f"{category}/{split}/{GOOD if good else BAD}/{name}", image))
        if not good:
            mask = absent.check(line, line["mask"], "mask")
            target = f"{category}/ground_truth/{BAD}/{PurePosixPath(name).with_suffix('.png')}"
            entries.append(Entry(target, mask, partial(binarise_mask, image=image)))
    absent.refuse()
    return root, entries


def read_aptos(source: Path) -> Plan:
    """APTOS 2019: train.csv and train_images/; the images without labels are not used.

    Grade 0 is normal. Its images are shuffled in the order of the table, and the first thousand are for training.
    Each image is cut to the eye and resized (`recontrast.data.fundus`).
    """
    root = _root(source, "train.csv", "train.csv and train_images/, as APTOS 2019 unpacks")
    normal, entries, absent = [], [], _Absent(root)
    for line in read_table(root / "train.csv", ("id_code", "diagnosis")):
        name, grade = f"{line['id_code']}.png", line["diagnosis"]
        if grade not in APTOS_GRADES:
            raise ValueError(f"{line.place}: wanted a diagnosis from 0 to 4, got {grade!r}")
        image = absent.check(line, f"train_images/{name}")
        if grade == "0":
            normal.append(image)
        else:
            entries.append(Entry(f"aptos/test/grade{grade}/{name}", image, read_fundus))
    absent.refuse()
    random.Random(APTOS_SEED).shuffle(normal)
    splits = ["train"] * APTOS_TRAIN + ["test"] * max(0, len(normal) - APTOS_TRAIN)
    drawn = [Entry(f"aptos/{split}/{GOOD}/{p.name}", p, read_fundus) for split, p in zip(splits, normal, strict=False)]
    return root, drawn + entries


def read_oct2017(source: Path) -> Plan:
    """OCT2017 (CellData/OCT of ZhangLabData): train/NORMAL for training, all of test/ for the test."""
    root = _root(source, "train/NORMAL", "train/NORMAL and test/NORMAL, as OCT2017 unpacks")
    if not (root / "test" / "NORMAL").is_dir():
        raise ValueError(f"{root}: wanted test/NORMAL beside train/NORMAL, as OCT2017 unpacks, got {_inside(root)}")
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
    """ISIC 2018 Task 3: naevi (NV) of the training set for training, all of the validation set for the test."""
    first = "ISIC2018_Task3_Training_Input"
    root = _root(source, first, f"{first}, ..._GroundTruth and the same of Validation, as ISIC 2018 Task 3 unpacks")
    entries, absent = [], _Absent(root)
    for split, part in (("train", "Training"), ("test", "Validation")):
        table = Path(f"ISIC2018_Task3_{part}_GroundTruth.csv")
        path = root / table.stem / table if (root / table.stem).is_dir() else root / table  # unpacked, or alone
        for line in read_table(path, ("image", *ISIC_CLASSES)):
            try:
                values = [float(line[name]) for name in ISIC_CLASSES]
            except ValueError:
                values = []
            if sorted(values) != [0.0] * (len(ISIC_CLASSES) - 1) + [1.0]:
                cells = ", ".join(line[name] for name in ISIC_CLASSES)
                raise ValueError(f"{line.place}: wanted one of {', '.join(ISIC_CLASSES)} to be 1, got {cells}")
            kind = ISIC_CLASSES[values.index(1.0)]
            if split == "test" or kind == ISIC_NORMAL:
                name = f"{line['image']}.jpg"
                image = absent.check(line, f"ISIC2018_Task3_{part}_Input/{name}")
                entries.append(Entry(f"isic2018/{split}/{GOOD if kind == ISIC_NORMAL else kind}/{name}", image))
    absent.refuse()
    return root, entries


def binarise_mask(path: Path, image: Path) -> np.ndarray | None:
    """The mask with every value that is not zero as 255, (H, W) uint8; None where it is so already."""
    decoded = decode(path, MAX_PIXELS)
    wanted, got = image_size(image), (decoded.height, decoded.width)
    if wanted != got:
        raise ValueError(
            f"{path}: wanted a mask of the size of its image {image}, {wanted[0]} x {wanted[1]} (height x width), "
            f"got {got[0]} x {got[1]}"
        )
    values = np.asarray(decoded)
    if values.ndim == 3:  # colours, and perhaps transparency, which says nothing
        values = values[:, :, : 3 if values.shape[2] > 2 else 1].max(axis=2)
    full = np.where(values != 0, np.uint8(255), np.uint8(0))
    return None if decoded.mode == "L" and np.array_equal(values, full) else full


class _Absent:
    """Collects the files that a table names and that are not there, to speak of them once."""

    def __init__(self, root: Path) -> None:
        self.root, self.first, self.count = root, "", 0

    def check(self, line: TableRow, name: str, what: str = "image") -> Path:
        """The file ``name`` below the root that ``line`` names."""
        relative = PurePosixPath(name)
        if not is_image(relative.name) or relative.is_absolute() or ".." in relative.parts:
            raise ValueError(f"{line.place}: wanted the path of its {what} below {self.root}, got {name!r}")
        path = self.root / relative
        if not path.is_file():
            self.first = self.first or f"{line.place}: wanted the {what} {path}, got no such file"
            self.count += 1
        return path

    def refuse(self) -> None:
        """Raise if any was missing."""
        if self.count:
            more = f", and {self.count - 1} more are missing" if self.count > 1 else ""
            raise FileNotFoundError(self.first + more)


def _root(source: Path, marker: str, wanted: str) -> Path:
    """``source``, or the folder up to three levels below it, that holds ``marker``, a pattern."""
    if not source.is_dir():
        raise ValueError(f"{source}: wanted a folder with {wanted}, got {'a file' if source.exists() else 'none'}")
    found = _holders(source, marker)
    if not found:
        raise ValueError(f"{source}: wanted {wanted}, got {_inside(source)}")
    if len(found) > 1:
        raise ValueError(f"{source}: wanted one folder with {wanted}, got {found[0]} and {found[1]}")
    return found[0]


def _holders(source: Path, marker: str) -> list[Path]:
    """The folders with ``marker`` on the first level that has any."""
    level = [source] if source.is_dir() else []
    for _ in range(4):
        if found := [folder for folder in level if next(folder.glob(marker), None)]:
            return found
        level = sorted(p for folder in level for p in folder.iterdir() if p.is_dir() and not is_hidden(p.name))
    return []


def _inside(folder: Path) -> str:
    """The first names in a folder, for an error."""
    names = sorted(path.name for path in folder.iterdir() if not is_hidden(path.name))
    return (", ".join(names[:5]) + ", ..." * (len(names) > 5)) or "an empty folder"
