"""recontrast.data.described_sets: miniatures with the original names become data sets in MVTec AD layout."""

import shutil
import warnings

import numpy as np
import pytest
from command_line import fails, works
from downloads import OTHERS, write_image, write_mask
from PIL import Image

from recontrast.data import datasets
from recontrast.data.described_sets import DESCRIBED_SETS
from recontrast.data.listing import DataWarning
from recontrast.data.prepare import READERS, compare_total, prepare, sum_counts
from recontrast.data.published_counts import Counts

# Files of one category by set: good images to train on and to validate with, test images, masks by test image.
MINIATURES = {
    "mvtec_loco": (
        ["train/good/000.png", "train/good/001.png"], ["validation/good/000.png"],
        ["test/good/000.png", "test/logical_anomalies/000.png", "test/structural_anomalies/000.png"],
        ["ground_truth/logical_anomalies/000/000.png", "ground_truth/logical_anomalies/000/001.png",
         "ground_truth/structural_anomalies/000/000.png"],
    ),
    "mvtec_ad_2": (
        ["train/good/000_regular.png", "train/good/001_regular.png"], ["validation/good/000_regular.png"],
        ["test_public/good/000_regular.png", "test_public/bad/000_overexposed.png", "test_public/bad/001_regular.png"],
        ["test_public/ground_truth/bad/000_overexposed_mask.png", "test_public/ground_truth/bad/001_regular_mask.png"],
    ),
    "mvtec_3d": (
        ["train/good/rgb/000.png", "train/good/rgb/001.png"], ["validation/good/rgb/000.png"],
        ["test/good/rgb/000.png", "test/crack/rgb/000.png", "test/hole/rgb/000.png"],
        ["test/good/gt/000.png", "test/crack/gt/000.png", "test/hole/gt/000.png"],
    ),
    "btad": (
        ["train/ok/0000.bmp", "train/ok/0001.bmp"], [],
        ["test/ok/0000.bmp", "test/ko/0000.bmp", "test/ko/0001.bmp"],
        ["ground_truth/ko/0000.png", "ground_truth/ko/0001.png"],
    ),
    "mpdd": (
        ["train/good/000.png", "train/good/001.png"], [],
        ["test/good/000.png", "test/hole/000.png", "test/scratches/001.png"],
        ["ground_truth/hole/000_mask.png", "ground_truth/scratches/001_mask.png"],
    ),
}  # fmt: skip


def make_download(root, name, categories=None):
    """Write a miniature of a download, one folder below ``root``, and return ``root``."""
    for category in categories or DESCRIBED_SETS[name].categories:
        folder = root / "unpacked" / category
        train, validation, tests, masks = MINIATURES[name]
        for index, file in enumerate([*train, *validation, *tests]):
            if file.endswith(".bmp"):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (16, 12), (index, 0, 0)).save(folder / file)
            else:
                write_image(folder / file, seed=index)
        for index, file in enumerate(masks):
            write_mask(folder / file, 200 + index)
        (folder / "license.txt").write_text("licence")
    return root


@pytest.mark.parametrize("name", MINIATURES)
def test_miniatures_become_data_sets(tmp_path, name):
    described = DESCRIBED_SETS[name]
    prepared = prepare(name, make_download(tmp_path / "download", name), tmp_path / "out")
    assert prepared.source == tmp_path / "download/unpacked" and prepared.title == described.title
    assert prepared.counts == dict.fromkeys(described.categories, Counts(2, 3, 1))
    _, validation, tests, _ = MINIATURES[name]
    category = described.categories[0]
    folder = tmp_path / "out" / category
    kept = sorted(path.relative_to(folder).as_posix() for path in folder.glob("validation/good/*"))
    assert len(kept) == len(validation)
    if validation:  # images to calibrate with are named when the set is read
        with pytest.warns(DataWarning, match="1 image in validation"):
            samples = datasets.load(folder)[category]
    else:
        samples = datasets.load(folder)[category]
    assert [sample.split for sample in samples] == ["train"] * 2 + ["test"] * 3
    assert sorted(sample.label for sample in samples) == [0, 0, 0, 1, 1]
    defects = {"good" if file.split("/")[1] == described.good else file.split("/")[1] for file in tests}
    assert {sample.defect for sample in samples if sample.split == "test"} == defects
    for sample in samples:
        assert (sample.mask is not None) == bool(sample.label)
        if sample.mask is not None:
            with Image.open(sample.mask) as mask:
                values = np.asarray(mask)
            assert set(np.unique(values)) == {0, 255} and (values > 0).sum() == 16  # the pixel of value 1 counts


def test_masks_of_one_image_are_joined(tmp_path):
    root = make_download(tmp_path, "mvtec_loco", ["pushpins"])
    levels = np.zeros((12, 16), np.uint8)
    levels[10, 10:15] = 7
    Image.fromarray(levels).save(root / "unpacked/pushpins/ground_truth/logical_anomalies/000/001.png")
    prepare("mvtec_loco", root, tmp_path / "out")
    with Image.open(tmp_path / "out/pushpins/ground_truth/logical_anomalies/000_mask.png") as mask:
        assert (np.asarray(mask) == 255).sum() == 16 + 5


def test_single_masks_of_loco_are_kept(tmp_path):
    """What sPRO needs: the single masks with their values, and the file that says what these mean."""
    root = make_download(tmp_path, "mvtec_loco", ["pushpins"])
    (root / "unpacked/pushpins/defects_config.json").write_text("[]")
    prepared = prepare("mvtec_loco", root, tmp_path / "out")
    assert prepared.counts == {"pushpins": Counts(2, 3, 1)}
    folder = tmp_path / "out/pushpins"
    for kind, names in (("logical", ["000", "001"]), ("structural", ["000"])):
        for name in names:
            kept = folder / "defects" / f"{kind}_anomalies/000/{name}.png"
            source = root / "unpacked/pushpins/ground_truth" / f"{kind}_anomalies/000/{name}.png"
            assert kept.read_bytes() == source.read_bytes()
    assert (folder / "defects_config.json").read_text() == "[]"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*validation")
        warnings.filterwarnings("error", message=".*defects")
        assert len(datasets.load(folder)["pushpins"]) == 5


def test_private_images_of_mvtec_ad_2_have_no_labels(tmp_path):
    root = make_download(tmp_path, "mvtec_ad_2", ["can"])
    for name in ("test_private", "test_private_mixed"):
        write_image(root / "unpacked/can" / name / "000_mixed.png")
    assert prepare("mvtec_ad_2", root).counts == {"can": Counts(2, 3, 1)}


@pytest.mark.parametrize("name", MINIATURES)
def test_missing_masks_and_images(tmp_path, name):
    root = make_download(tmp_path / "a", name, DESCRIBED_SETS[name].categories[:1])
    category = root / "unpacked" / DESCRIBED_SETS[name].categories[0]
    shutil.copytree(root, tmp_path / "b")
    mask, image = MINIATURES[name][3][-1], MINIATURES[name][2][-1]
    (category / mask).unlink()
    with pytest.raises(ValueError, match=f"{category / image}: wanted its mask"):
        prepare(name, root, tmp_path / "out")
    other = tmp_path / "b/unpacked" / category.name
    (other / image).unlink()
    with pytest.raises(ValueError, match=f"{other / mask}: wanted an image for this mask"):
        prepare(name, tmp_path / "b", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="unpacks, got "):
        prepare(name, write_nothing(tmp_path / "c"))


def write_nothing(root):
    """Write a folder with one image in no layout of a data set."""
    write_image(root / "photos/000.png")
    return root


def test_counts_are_compared():
    counts = {"a": Counts(2, 3, 1), "b": Counts(4, 5, 2)}
    assert compare_total(counts, ("a", "b"), Counts(6, 8, 3)) == []
    differences = "all categories: 6 train, published 7; 3 good of test, published 2"
    assert compare_total(counts, ("a", "b"), Counts(7, 8, 2)) == [differences]
    assert compare_total(counts, ("a", "b", "c"), Counts(7, 8, 2)) == ["1 of 3 published categories are missing: c"]
    assert compare_total(counts, ("a",), None) == ["not among the published categories: b"]
    assert sum_counts(counts) == Counts(6, 8, 3)
    assert compare_total(counts, ("a", "b"), Counts(0, 14, 9), is_split=False) == []
    differences = "all categories: 14 images, published 15; 9 good images, published 7"
    assert compare_total(counts, ("a", "b"), Counts(5, 10, 2), is_split=False) == [differences]


def test_command_prints_licence_and_citation(tmp_path):
    root = make_download(tmp_path, "btad")
    printed = works("prepare", "btad", "--source", root)
    assert "BTAD, beanTech (CC BY-NC-SA 4.0; Mishra et al." in printed and "are not compared with published" in printed
    assert "wanted one of mvtec, visa" in fails("prepare", "bta", "--source", root)


def test_every_described_set_is_read():
    assert {*MINIATURES, *OTHERS} == set(DESCRIBED_SETS) < set(READERS)
