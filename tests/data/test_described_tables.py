"""Described sets whose labels or splits come from masks, tables or listings: miniatures with the original names."""

import json
import re

import numpy as np
import pytest
from command_line import fails, works
from downloads import OTHERS, write_black, write_image, write_mask
from PIL import Image

from recontrast.data import datasets
from recontrast.data.described_sets import DESCRIBED_SETS
from recontrast.data.prepare import prepare
from recontrast.data.published_counts import Counts

pytestmark = pytest.mark.filterwarnings("ignore::recontrast.data.listing.DataWarning")  # images for validation

# Name -> numbers of images by category, and the kinds of defects.
EXPECTED = {
    "real_iad": (dict.fromkeys(("audiojack", "usb"), Counts(5, 10, 8)), {"HS"}),
    "kolektor_sdd": ({"kolektor_sdd": Counts(15, 5, 4)}, {"bad"}),
    "kolektor_sdd2": ({"kolektor_sdd2": Counts(2, 3, 2)}, {"bad"}),
    "dagm2007": (dict.fromkeys(("Class1", "Class10"), Counts(2, 3, 2)), {"bad"}),
    "aitex": ({"aitex": Counts(8, 4, 2)}, {"002", "019"}),
    "bmad": (dict.fromkeys(DESCRIBED_SETS["bmad"].categories, Counts(2, 3, 1)), {"bad"}),
    "ham10000": ({"ham10000": Counts(8, 4, 2)}, {"mel", "bkl"}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_miniatures_become_data_sets(tmp_path, name):
    OTHERS[name](tmp_path / "download")
    counts, defects = EXPECTED[name]
    prepared = prepare(name, tmp_path / "download", tmp_path / "out")
    if name in ("kolektor_sdd", "ham10000"):  # whole groups are divided
        total = {
            category: (number.train + number.test, number.test - number.good) for category, number in counts.items()
        }
        got = {c: (number.train + number.test, number.test - number.good) for c, number in prepared.counts.items()}
        assert got == total and all(number.good for number in prepared.counts.values())
    else:
        assert prepared.counts == counts
    groups = datasets.load(tmp_path / "out")
    assert set(groups) == set(counts)
    for category, samples in groups.items():
        found = [sample for sample in samples if sample.split == "test"]
        assert {sample.defect for sample in found if sample.label} == defects
        assert sum(not sample.label for sample in found) == prepared.counts[category].good
        has_masks = name != "ham10000" and category not in DESCRIBED_SETS[name].unmasked
        for sample in found:
            assert (sample.mask is not None) == bool(sample.label and has_masks)
            if sample.mask is not None:
                values = np.asarray(Image.open(sample.mask))
                assert set(np.unique(values)) == {0, 255} and (values > 0).sum() == 16
    described = DESCRIBED_SETS[name]
    assert prepared.own_split == bool(described.unsplit)
    if described.total is not None and len(counts) == len(described.categories):
        assert prepared.warnings[0].startswith("all categories: ")


def test_other_layout_of_the_liver_and_name_of_the_histopathology(tmp_path):
    """One archive of the liver has images and masks above their kinds; the README of BMAD says camelyon16."""
    root = tmp_path / "BMAD"
    for part in ("train/good", "valid/img/good", "test/img/good", "test/img/Ungood"):
        for number in range(2):
            write_image(root / "Liver/Train/hist_DIY" / part / f"{number}.png", seed=number)
    for number in range(2):
        write_mask(root / "Liver/Train/hist_DIY/test/label/Ungood" / f"{number}.png", 1)
    for part in ("train/good", "valid/good", "valid/Ungood", "test/good", "test/Ungood"):
        write_image(root / "camelyon16" / part / "1000.png")
    prepared = prepare("bmad", tmp_path, tmp_path / "out")
    assert prepared.counts == {"Liver": Counts(2, 4, 2), "Histopathology": Counts(1, 2, 1)}
    masks = [sample.mask is not None for sample in datasets.load(tmp_path / "out")["Liver"] if sample.label]
    assert masks == [True, True] and len(list((tmp_path / "out/Liver/validation/good").iterdir())) == 2


@pytest.mark.parametrize("name", OTHERS)
def test_other_layouts_are_one_error(tmp_path, name):
    write_image(tmp_path / "photos/000.png")
    with pytest.raises(ValueError, match=r"unpacks, got (photos|none)"):
        prepare(name, tmp_path, tmp_path / "out")
    message = fails("prepare", name, "--source", tmp_path / "missing")
    assert f"{tmp_path / 'missing'}: wanted a folder with " in message and message.endswith("unpacks, got none")
    assert not re.search(r"\{\w+:", message)
    assert not (tmp_path / "out").exists()


def test_groups_stay_together(tmp_path):
    """The parts of an item, and the images of a lesion, are all trained on or all measured with."""
    for name, owners in (("kolektor_sdd", lambda path: path.name[:5]), ("ham10000", None)):
        OTHERS[name](tmp_path / name)
        prepare(name, tmp_path / name, tmp_path / f"{name}_out")
        samples = datasets.load(tmp_path / f"{name}_out")[name]
        splits = {}
        for sample in samples:
            number = int(sample.path.stem[-7:]) - 24306 if owners is None else 0
            owner = owners(sample.path) if owners else number // 2 if number < 4 else number
            splits.setdefault(owner, set()).add(sample.split)
        assert all(len(found) == 1 for found in splits.values()) and len(splits) >= 8


def test_items_that_all_have_a_defect_can_be_trained_on(tmp_path):
    """As in the whole KolektorSDD: the good images of an item stay together, those with a defect are test images."""
    for item in range(1, 6):
        for part in range(3):
            folder = tmp_path / f"download/kos{item:02}"
            write_image(folder / f"Part{part}.jpg", seed=10 * item + part)
            label = folder / f"Part{part}_label.bmp"
            write_mask(label, 255) if part == 2 else write_black(label)
    prepare("kolektor_sdd", tmp_path / "download", tmp_path / "out")
    splits = {}
    for sample in datasets.load(tmp_path / "out")["kolektor_sdd"]:
        splits.setdefault((sample.path.name[:5], sample.label), []).append(sample.split)
    good = sorted(found for (_, label), found in splits.items() if not label)
    assert good == [["test"] * 2, *[["train"] * 2] * 4]
    assert [found for (_, label), found in splits.items() if label] == [["test"]] * 5


def test_one_object_of_real_iad_and_its_errors(tmp_path):
    OTHERS["real_iad"](tmp_path, ["usb"])
    prepared = prepare("real_iad", tmp_path)
    assert list(prepared.counts) == ["usb"] and "29 of 30 published categories are missing" in prepared.warnings[0]
    listing = tmp_path / "realiad_jsons/realiad_jsons/usb.json"
    content = json.loads(listing.read_text())
    image = tmp_path / "realiad_1024/usb" / content["test"][0]["image_path"]
    image.rename(image.with_suffix(".away"))
    with pytest.raises(FileNotFoundError, match=f"{listing} test 1: wanted the image {image}, got no such file"):
        prepare("real_iad", tmp_path)
    content["train"].append(content["test"].pop(5))
    listing.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="train 6: wanted good images for training, got one of HS"):
        prepare("real_iad", tmp_path)
    for damaged, error in (
        ({"meta": {}}, "wanted JSON with meta .*, got none with the name prefix$"),
        ([], "wanted JSON with meta .*, got a value of another type$"),
        ({**content, "train": [{"image_path": "a.jpg"}]}, "train 1: wanted anomaly_class, image_path, mask_path, got"),
        ({**content, "train": [{"image_path": 3, "anomaly_class": "OK", "mask_path": None}]}, "as text, got"),
        ({**content, "train": [{"image_path": "../a.jpg", "anomaly_class": "OK", "mask_path": None}]}, "train 1: "
         "wanted the path of its image below"),
    ):  # fmt: skip
        listing.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=error):
            prepare("real_iad", tmp_path)
    listing.unlink()
    with pytest.raises(FileNotFoundError, match="wanted a listing in JSON, got no such file"):
        prepare("real_iad", tmp_path)


def test_labels_must_fit_the_images(tmp_path):
    OTHERS["ham10000"](tmp_path)
    table = tmp_path / "HAM10000_metadata.csv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"wanted a line for .*ISIC_0024317\.jpg, got none"):
        prepare("ham10000", tmp_path)
    table.write_text("\n".join([*lines, lines[1].replace("ISIC_0024306", "ISIC_0000001")]))
    with pytest.raises(FileNotFoundError, match="line 14: wanted the image ISIC_0000001, got no such file"):
        prepare("ham10000", tmp_path)
    table.write_text("\n".join([lines[0], lines[1].replace(",nv,", ",../nv,"), *lines[2:]]))
    with pytest.raises(ValueError, match=r"line 2: wanted a class in dx, got '../nv'"):
        prepare("ham10000", tmp_path)


def test_masks_without_images_and_images_without_masks(tmp_path):
    OTHERS["kolektor_sdd"](tmp_path / "a")
    (tmp_path / "a/KolektorSDD/kos03/Part1_label.bmp").unlink()
    with pytest.raises(
        ValueError, match=r"kos03/Part1.jpg: wanted its mask \(\{group\}/\{stem\}_label.bmp\), got none"
    ):
        prepare("kolektor_sdd", tmp_path / "a")
    OTHERS["dagm2007"](tmp_path / "b")
    write_mask(tmp_path / "b/DAGM/Class1/Test/Label/0009_label.PNG", 255)
    with pytest.raises(ValueError, match=r"0009_label\.PNG: wanted an image for this mask"):
        prepare("dagm2007", tmp_path / "b")
    OTHERS["aitex"](tmp_path / "c")
    (tmp_path / "c/Mask_images/0001_002_00_mask.png").unlink()
    with pytest.raises(ValueError, match=r"0001_002_00\.png: wanted its mask"):
        prepare("aitex", tmp_path / "c")


def test_command_says_that_the_split_is_its_own(tmp_path):
    OTHERS["aitex"](tmp_path / "a")
    printed = works("prepare", "aitex", "--source", tmp_path / "a")
    assert "no split is published" in printed and "Silvestre-Blanes et al." in printed
    OTHERS["kolektor_sdd2"](tmp_path / "b")
    assert "no split is published" not in works("prepare", "kolektor_sdd2", "--source", tmp_path / "b")
