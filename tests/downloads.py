"""Miniatures of the original downloads: their folders, file names and tables, with tiny pictures."""

import csv

import numpy as np
from PIL import Image


def draw(path, *, shape=(12, 16, 3), values=(60, 200), seed=0):
    """A tiny picture in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng((seed, len(path.name))).integers(*values, shape, np.uint8)
    Image.fromarray(noise).save(path, "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG")


def mask(path, value, shape=(12, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.zeros(shape, np.uint8)
    levels[3:6, 4:9] = value
    levels[7, 2] = 1
    Image.fromarray(levels).save(path)


def write_table(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def download_mvtec(root):
    top = root / "mvtec_anomaly_detection"
    for category, defect in (("bottle", "broken_large"), ("metal_nut", "bent")):
        for i in range(3):
            draw(top / category / "train" / "good" / f"{i:03}.png", seed=i)
        draw(top / category / "test" / "good" / "000.png")
        draw(top / category / "test" / defect / "000.png")
        mask(top / category / "ground_truth" / defect / "000_mask.png", 255)
        (top / category / "license.txt").write_text("CC BY-NC-SA 4.0")
    (top / "readme.txt").write_text("MVTec AD")


VISA_HEADER = ["object", "split", "label", "image", "mask"]


def visa_rows(objects=("candle", "pcb1")):
    for name in objects:
        normal = [f"{name}/Data/Images/Normal/{i:04}.JPG" for i in (7, 2, 0, 5)]
        yield from ([name, "train", "normal", image, ""] for image in normal[:3])
        yield [name, "test", "normal", normal[3], ""]
        for i in range(2):
            paths = (f"{name}/Data/Images/Anomaly/{i:03}.JPG", f"{name}/Data/Masks/Anomaly/{i:03}.png")
            yield [name, "test", "anomaly", *paths]


def download_visa(root):
    top = root / "VisA"
    for row in visa_rows():
        draw(top / row[3])
        if row[4]:
            mask(top / row[4], 3 if row[4].endswith("000.png") else 255)
    for name in ("1cls", "2cls_fewshot", "2cls_highshot"):
        write_table(top / "split_csv" / f"{name}.csv", VISA_HEADER, visa_rows())
    (top / "candle" / "image_anno.csv").write_text("image,label,mask\n")
    (top / "LICENSE-DATASET").write_text("CC BY 4.0")


APTOS_IDS = [f"{i:02x}c1434d8d7" for i in range(9)]


def download_aptos(root):
    rows = [(name, i % 5 if i > 5 else 0) for i, name in enumerate(APTOS_IDS)]  # six normal ones, grades 1, 2 and 3
    write_table(root / "train.csv", ["id_code", "diagnosis"], rows)
    write_table(root / "test.csv", ["id_code"], [["0005cfc8afb6"]])
    write_table(root / "sample_submission.csv", ["id_code", "diagnosis"], [["0005cfc8afb6", 0]])
    for i, name in enumerate(APTOS_IDS):
        draw(root / "train_images" / f"{name}.png", shape=(20, 30, 3), seed=i)
    draw(root / "test_images" / "0005cfc8afb6.png")


def download_oct2017(root):
    top = root / "ZhangLabData" / "CellData" / "OCT"
    for kind in ("CNV", "DME", "DRUSEN", "NORMAL"):
        for i in (10, 9):
            draw(top / "train" / kind / f"{kind}-1384-{i}.jpeg", shape=(12, 16))
            draw(top / "test" / kind / f"{kind}-5193-{i}.jpeg", shape=(12, 16))
    (top / "test" / ".DS_Store").write_text("")
    draw(root / "ZhangLabData" / "CellData" / "chest_xray" / "train" / "PNEUMONIA" / "x.jpeg")


ISIC_HEADER = ["image", "MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]


def isic_rows(first, kinds):
    for i, kind in enumerate(kinds, first):
        yield [f"ISIC_{i:07}", *("1.0" if name == kind else "0.0" for name in ISIC_HEADER[1:])]


def download_isic2018(root):
    parts = {"Training": (24306, ["NV", "MEL", "NV", "DF", "NV"]), "Validation": (34321, ["NV", "BKL", "NV", "MEL"])}
    for part, (first, kinds) in parts.items():
        name = f"ISIC2018_Task3_{part}"
        write_table(root / f"{name}_GroundTruth" / f"{name}_GroundTruth.csv", ISIC_HEADER, isic_rows(first, kinds))
        for i in range(first, first + len(kinds)):
            draw(root / f"{name}_Input" / f"ISIC_{i:07}.jpg", seed=i)
        for folder in (f"{name}_GroundTruth", f"{name}_Input"):
            (root / folder / "ATTRIBUTION.txt").write_text("HAM10000")
            (root / folder / "LICENSE.txt").write_text("CC BY-NC 4.0")


DOWNLOADS = {
    "mvtec": download_mvtec,
    "visa": download_visa,
    "aptos": download_aptos,
    "oct2017": download_oct2017,
    "isic2018": download_isic2018,
}
