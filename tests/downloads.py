"""Miniatures of the original downloads: the same folders, file names and tables, with tiny images."""

import csv
import json

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


def write_black(path, shape=(12, 16)):
    """Write a mask that marks nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros(shape, np.uint8)).save(path)


def write_real_iad(root, categories=("audiojack", "usb")):
    """Write a miniature of Real-IAD: two good samples, and one whose views C1 and C3 show the defect."""
    for category in categories:
        lines = {"train": [], "test": []}
        for split, sample, kind in (("train", 1, "OK"), ("test", 2, "OK"), ("test", 3, "HS")):
            for view in range(1, 6):
                folder = f"OK/S{sample:04}" if kind == "OK" else f"NG/{kind}/S{sample:04}"
                ok = "OK" if kind == "OK" else "NG_HS"
                image = f"{folder}/{category}_{sample:04}_{ok}_C{view}_20230922141132.jpg"
                write_image(root / "realiad_1024" / category / image, seed=10 * sample + view)
                mask = image.replace(".jpg", ".png") if kind != "OK" and view in (1, 3) else None
                if mask is not None:
                    write_mask(root / "realiad_1024" / category / mask, 255)
                values = {"category": category, "anomaly_class": kind, "image_path": image, "mask_path": mask}
                lines[split].append(values)
        content = {"meta": {"prefix": f"{category}/", "normal_class": "OK"}, **lines}
        listing = root / "realiad_jsons" / "realiad_jsons" / f"{category}.json"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text(json.dumps(content))


def write_kolektor_sdd(root):
    """Write a miniature of KolektorSDD: ten items of two parts, the last item with a defect."""
    for item in range(1, 11):
        for part in range(2):
            folder = root / "KolektorSDD" / f"kos{item:02}"
            write_image(folder / f"Part{part}.jpg", seed=10 * item + part)
            label = folder / f"Part{part}_label.bmp"
            write_mask(label, 2) if (item, part) == (10, 1) else write_black(label)


def write_kolektor_sdd2(root):
    """Write a miniature of KolektorSDD2, with its stray copies; 10001 and 20001 have a defect."""
    for split, first in (("train", 10000), ("test", 20000)):
        for number in range(first, first + 3):
            write_image(root / split / f"{number}.png", seed=number)
            label = root / split / f"{number}_GT.png"
            write_mask(label, 255) if number % 10 == 1 else write_black(label)
    write_image(root / "train" / "10001 (copy).png")
    write_black(root / "train" / "10001_GT (copy).png")


def write_dagm2007(root, categories=("Class1", "Class10")):
    """Write a miniature of DAGM 2007: one of three images of each half has a label."""
    for category in categories:
        for split, first in (("Train", 576), ("Test", 1)):
            folder = root / "DAGM" / category / split
            for number in range(first, first + 3):
                write_image(folder / f"{number:04}.PNG", shape=(12, 16), seed=number)
            write_mask(folder / "Label" / f"{first:04}_label.PNG", 255)
            (folder / "Label" / "Labels.txt").write_text("1")


def write_aitex(root):
    """Write a miniature of AITEX: ten good strips; one defect in two masks, one with one mask, one without a mask."""
    for number in range(10):
        write_image(root / "NODefect_images" / "2306881-210020u" / f"{number:04}_000_{number % 3:02}.png", seed=number)
    for name in ("0001_002_00", "0044_019_04", "0100_025_08"):
        write_image(root / "Defect_images" / f"{name}.png")
    write_mask(root / "Mask_images" / "0001_002_00_mask.png", 255)
    write_mask(root / "Mask_images" / "0044_019_04_mask1.png", 255)
    write_mask(root / "Mask_images" / "0044_019_04_mask2.png", 3)


def write_bmad(root):
    """Write a miniature of BMAD, with the different names of its folders."""
    for folder, valid, bad, image, mask in (
        ("Brain_AD/BraTS2021_slice", "valid", "Ungood", "img/", "label"),
        ("Liver_AD/hist_DIY", "valid", "ungood", "img/", "label"),
        ("Retina_RESC_AD/RESC", "val", "ungood", "img/", "anomaly_mask"),
        ("Retina_OCT2017", "val", "Ungood", "", None),
        ("Chest_AD/Chest-RSNA", "val", "Ungood", "img/", None),
        ("Histopathology_AD/camelyon16_256", "valid", "Ungood", "", None),
    ):
        for part, count in (("train/good/", 2), (f"{valid}/good/{image}", 1), (f"test/good/{image}", 1),
                            (f"{valid}/{bad}/{image}", 1), (f"test/{bad}/{image}", 2)):  # fmt: skip
            for number in range(count):
                write_image(root / "BMAD" / folder / part / f"{number}_60.png", seed=number)
        if mask is not None:
            for number in range(2):
                write_mask(root / "BMAD" / folder / "test" / bad / mask / f"{number}_60.png", 1)
            write_black(root / "BMAD" / folder / "test" / "good" / mask / "0_60.png")


def write_ham10000(root):
    """Write a miniature of HAM10000: twelve images of ten lesions in two folders."""
    rows = []
    for number in range(12):
        name, label = f"ISIC_{24306 + number:07}", "mel" if number == 5 else "bkl" if number == 6 else "nv"
        rows.append([f"HAM_{number // 2 if number < 4 else number:07}", name, label, "histo", "80.0", "male", "scalp"])
        write_image(root / f"HAM10000_images_part_{1 + number % 2}" / f"{name}.jpg", seed=number)
    header = ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"]
    write_table(root / "HAM10000_metadata.csv", header, rows)


OTHERS = {
    "real_iad": write_real_iad,
    "kolektor_sdd": write_kolektor_sdd,
    "kolektor_sdd2": write_kolektor_sdd2,
    "dagm2007": write_dagm2007,
    "aitex": write_aitex,
    "bmad": write_bmad,
    "ham10000": write_ham10000,
}
