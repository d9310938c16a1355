"""Miniatures of the original downloads: the same folders, file names and tables, with tiny images."""

import csv

import numpy as np
from PIL import Image


def write_image(path, *, shape=(12, 16, 3), values=(60, 200), seed=0):
    """Write a tiny image of noise, in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng((seed, len(path.name))).integers(*values, shape, np.uint8)
    Image.fromarray(noise).save(path, "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG")


def write_mask(path, value, shape=(12, 16)):
    """Write a mask with a rectangle of ``value`` and one pixel of 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.zeros(shape, np.uint8)
    levels[3:6, 4:9] = value
    levels[7, 2] = 1
    Image.fromarray(levels).save(path)


def write_table(path, header, rows):
    """Write a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_mvtec(root):
    """Write a miniature of MVTec AD."""
    folder = root / "mvtec_anomaly_detection"
    for category, defect in (("bottle", "broken_large"), ("metal_nut", "bent")):
        for i in range(3):
            write_image(folder / category / "train" / "good" / f"{i:03}.png", seed=i)
        write_image(folder / category / "test" / "good" / "000.png")
        write_image(folder / category / "test" / defect / "000.png")
        write_mask(folder / category / "ground_truth" / defect / "000_mask.png", 255)
        (folder / category / "license.txt").write_text("CC BY-NC-SA 4.0")
    (folder / "readme.txt").write_text("MVTec AD")


VISA_HEADER = ["object", "split", "label", "image", "mask"]


def visa_rows(objects=("candle", "pcb1")):
    """Yield the rows of split_csv/1cls.csv."""
    for name in objects:
        normal = [f"{name}/Data/Images/Normal/{i:04}.JPG" for i in (7, 2, 0, 5)]
        yield from ([name, "train", "normal", image, ""] for image in normal[:3])
        yield [name, "test", "normal", normal[3], ""]
        for i in range(2):
            paths = (f"{name}/Data/Images/Anomaly/{i:03}.JPG", f"{name}/Data/Masks/Anomaly/{i:03}.png")
            yield [name, "test", "anomaly", *paths]


def write_visa(root):
    """Write a miniature of VisA."""
    folder = root / "VisA"
    for row in visa_rows():
        write_image(folder / row[3])
        if row[4]:
            write_mask(folder / row[4], 3 if row[4].endswith("000.png") else 255)
    for name in ("1cls", "2cls_fewshot", "2cls_highshot"):
        write_table(folder / "split_csv" / f"{name}.csv", VISA_HEADER, visa_rows())
    (folder / "candle" / "image_anno.csv").write_text("image,label,mask\n")
    (folder / "LICENSE-DATASET").write_text("CC BY 4.0")


APTOS_IDS = [f"{i:02x}c1434d8d7" for i in range(9)]


def write_aptos(root):
    """Write a miniature of APTOS 2019: six normal images, and one each of grades 1, 2 and 3."""
    rows = [(name, i % 5 if i > 5 else 0) for i, name in enumerate(APTOS_IDS)]
    write_table(root / "train.csv", ["id_code", "diagnosis"], rows)
    write_table(root / "test.csv", ["id_code"], [["0005cfc8afb6"]])
    write_table(root / "sample_submission.csv", ["id_code", "diagnosis"], [["0005cfc8afb6", 0]])
    for i, name in enumerate(APTOS_IDS):
        write_image(root / "train_images" / f"{name}.png", shape=(20, 30, 3), seed=i)
    write_image(root / "test_images" / "0005cfc8afb6.png")


def write_oct2017(root):
    """Write a miniature of OCT2017."""
    folder = root / "ZhangLabData" / "CellData" / "OCT"
    for kind in ("CNV", "DME", "DRUSEN", "NORMAL"):
        for i in (10, 9):
            write_image(folder / "train" / kind / f"{kind}-1384-{i}.jpeg", shape=(12, 16))
            write_image(folder / "test" / kind / f"{kind}-5193-{i}.jpeg", shape=(12, 16))
    (folder / "test" / ".DS_Store").write_text("")
    write_image(root / "ZhangLabData" / "CellData" / "chest_xray" / "train" / "PNEUMONIA" / "x.jpeg")


ISIC_HEADER = ["image", "MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]


def isic_rows(first, classes):
    """Yield the rows of a ground-truth table, for images numbered from ``first``."""
    for i, label in enumerate(classes, first):
        yield [f"ISIC_{i:07}", *("1.0" if name == label else "0.0" for name in ISIC_HEADER[1:])]


def write_isic2018(root):
    """Write a miniature of ISIC 2018 Task 3."""
    parts = {"Training": (24306, ["NV", "MEL", "NV", "DF", "NV"]), "Validation": (34321, ["NV", "BKL", "NV", "MEL"])}
    for part, (first, classes) in parts.items():
        name = f"ISIC2018_Task3_{part}"
        write_table(root / f"{name}_GroundTruth" / f"{name}_GroundTruth.csv", ISIC_HEADER, isic_rows(first, classes))
        for i in range(first, first + len(classes)):
            write_image(root / f"{name}_Input" / f"ISIC_{i:07}.jpg", seed=i)
        for folder in (f"{name}_GroundTruth", f"{name}_Input"):
            (root / folder / "ATTRIBUTION.txt").write_text("HAM10000")
            (root / folder / "LICENSE.txt").write_text("CC BY-NC 4.0")


DOWNLOADS = {
    "mvtec": write_mvtec,
    "visa": write_visa,
    "aptos": write_aptos,
    "oct2017": write_oct2017,
    "isic2018": write_isic2018,
}
