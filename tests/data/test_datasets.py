"""recontrast.data.datasets and .listing: folders become samples in a fixed order, and errors name the file."""

import os
import random
import re
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recontrast.data import datasets, images, listing
from recontrast.data.datasets import Sample
from recontrast.data.listing import DataWarning

SUFFIXES = r"\(PNG, JPEG, .* or [A-Z]+\)"


def create_files(root, *names):
    """Create empty files, and return ``root``."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


@pytest.fixture
def screw(tmp_path):
    """Create a root with one category of empty files; `datasets` does not decode images."""
    return create_files(
        tmp_path,
        *(f"screw/train/good/{n}.png" for n in (10, 9, 100)),
        "screw/test/good/0.PNG",
        *(f"screw/test/scratch/{n}.jpg" for n in ("b2", "b10", "b1")),
        *(f"screw/ground_truth/scratch/{n}_mask.png" for n in ("b1", "b2")),
        "screw/ground_truth/scratch/b10.tif",
    )


def test_mvtec_layout(screw):
    category = screw / "screw"
    samples = datasets.mvtec(screw, "screw")
    assert [s.path.relative_to(category).as_posix() for s in samples] == [
        "train/good/9.png",
        "train/good/10.png",
        "train/good/100.png",
        "test/good/0.PNG",
        "test/scratch/b1.jpg",
        "test/scratch/b2.jpg",
        "test/scratch/b10.jpg",
    ]
    assert samples[0] == Sample(category / "train/good/9.png", None, 0, "screw", "train", "good")
    assert samples[3] == Sample(category / "test/good/0.PNG", None, 0, "screw", "test", "good")
    mask = category / "ground_truth/scratch"
    assert samples[4] == Sample(category / "test/scratch/b1.jpg", mask / "b1_mask.png", 1, "screw", "test", "scratch")
    assert [s.mask for s in samples[5:]] == [mask / "b2_mask.png", mask / "b10.tif"]


class _Entries(list):
    """Entries of a folder, with the interface of `os.scandir`."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def test_order_does_not_depend_on_the_file_system(screw, monkeypatch):
    expected = datasets.mvtec(screw, "screw")
    scandir = os.scandir

    def shuffled_scandir(path):
        with scandir(path) as entries:
            entries = list(entries)
        random.shuffle(entries)
        return _Entries(entries)

    monkeypatch.setattr(os, "scandir", shuffled_scandir)
    for _ in range(10):
        assert datasets.mvtec(screw, "screw") == expected


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1), unique=True), st.randoms())
def test_natural_order_is_a_total_order(names, rng):
    expected = sorted(names, key=listing.natural_sort_key)
    rng.shuffle(names)
    assert sorted(names, key=listing.natural_sort_key) == expected


@given(st.lists(st.integers(0, 10**30), unique=True), st.text("ab_-.", max_size=3), st.text("ab_", max_size=2))
def test_natural_order_compares_numbers(numbers, prefix, suffix):
    names = sorted((f"{prefix}{number}{suffix}" for number in numbers), key=listing.natural_sort_key)
    assert names == [f"{prefix}{number}{suffix}" for number in sorted(numbers)]
    assert sorted(["a1", "a01"], key=listing.natural_sort_key) == sorted(["a01", "a1"], key=listing.natural_sort_key)


def test_hidden_and_other_files_are_skipped(screw):
    names = (".hidden.png", "Thumbs.db", "._9.png", "notes.txt", ".git/x.png", "__MACOSX/9.png")
    expected = datasets.mvtec(screw, "screw")
    for folder in ("train/good", "test/scratch", "test", "ground_truth/scratch", ""):
        create_files(screw / "screw" / folder, *names)
    assert datasets.mvtec(screw, "screw") == expected


def test_subfolders_and_links(screw):
    create_files(
        screw / "screw", "test/scratch/day2/7.png", "ground_truth/scratch/day2/7_mask.png", "train/good/day2/7.png"
    )
    (screw / "screw/train/good/day2/again").symlink_to(screw / "screw/train/good")  # a loop
    samples = datasets.mvtec(screw, "screw")
    assert [s.path.name for s in samples if s.split == "train"] == ["9.png", "10.png", "100.png", "7.png"]
    assert samples[-1].mask == screw / "screw/ground_truth/scratch/day2/7_mask.png"


def test_masks_are_required_for_all_defects_or_for_none(screw):
    folder = screw / "screw/ground_truth/scratch"
    (folder / "b2_mask.png").unlink()
    with pytest.raises(
        ValueError, match=r"scratch/b2\.jpg: wanted its mask .*ground_truth/scratch/b2_mask\.png, got none"
    ):
        datasets.mvtec(screw, "screw")
    create_files(folder, "b2_mask.png")
    create_files(screw, "screw/test/hole/0.png")
    with pytest.raises(ValueError, match=r"hole/0\.png: wanted its mask .*, got none, although screw has 3 masks"):
        datasets.mvtec(screw, "screw")
    for mask in folder.iterdir():
        mask.unlink()
    assert all(s.mask is None for s in datasets.mvtec(screw, "screw"))
    folder.rmdir()
    folder.parent.rmdir()
    assert [s.label for s in datasets.mvtec(screw, "screw")] == [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("name", ["scratch/b3_mask.png", "scratch/b3.png", "hole/0_mask.png", "loose.png"])
def test_mask_without_image(screw, name):
    create_files(screw / "screw/ground_truth", name)
    with pytest.raises(ValueError, match=rf"ground_truth/{name}: wanted an image in .*test for this mask, got none"):
        datasets.mvtec(screw, "screw")


def test_two_masks_for_one_image(screw):
    create_files(screw / "screw/ground_truth/scratch", "b1_mask.bmp")
    with pytest.raises(ValueError, match=r"b1_mask\.\w+: wanted one mask of this name, got b1_mask\.\w+ as well"):
        datasets.mvtec(screw, "screw")


def test_masks_of_good_images_are_ignored(screw):
    create_files(screw / "screw/ground_truth/good", "0_mask.png", "nothing_mask.png")
    assert datasets.mvtec(screw, "screw")[3].mask is None


def test_train_good_is_required_and_test_good_is_not(screw):
    category = screw / "screw"
    (category / "test/good/0.PNG").unlink()
    (category / "test/good").rmdir()
    assert [s.defect for s in datasets.mvtec(screw, "screw")] == ["good"] * 3 + ["scratch"] * 3
    (category / "train/good").rename(category / "train/parts")
    message = r"screw/train/good: wanted the folder of good training images, got no such folder$"
    for call in (lambda: datasets.mvtec(screw, "screw"), lambda: datasets.load(screw), lambda: datasets.load(category)):
        with pytest.raises(FileNotFoundError, match=message):
            call()
    assert datasets.categories(screw) == []


@pytest.mark.parametrize("folder", ["train/good", "test/scratch", "test/good"])
def test_empty_folder(screw, folder):
    for path in (screw / "screw" / folder).iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=rf"{folder}: wanted a folder with image files {SUFFIXES}, got none$"):
        datasets.load(screw)
    create_files(screw / "screw" / folder, "a.heic", "b.txt", ".hidden")
    with pytest.raises(ValueError, match=rf"{folder}: wanted .* {SUFFIXES}, got 2 of other kinds$"):
        datasets.load(screw)


def test_images_beside_the_defect_folders(screw):
    create_files(screw, "screw/test/7.png")
    with pytest.raises(
        ValueError, match=r"test/7\.png: wanted test images in test/good and test/DEFECT, got one directly in test"
    ):
        datasets.mvtec(screw, "screw")


def test_plain_folder(tmp_path):
    create_files(tmp_path / "parts", "10.png", "9.JPG", "more/1.bmp", "x.txt")
    samples = datasets.folder(tmp_path / "parts")
    assert [s.path.name for s in samples] == ["9.JPG", "10.png", "1.bmp"]
    assert samples[0] == Sample(tmp_path / "parts/9.JPG", None, 0, "parts", "train", "good")
    bad = datasets.folder(tmp_path / "parts", split="test", label=1, category="x")
    assert bad[0] == Sample(tmp_path / "parts/9.JPG", None, 1, "x", "test", "defect")


def test_load_accepts_root_category_and_plain_folder(screw, monkeypatch):
    create_files(screw, "bolt10/train/good/0.png", "bolt9/train/good/0.png", "bolt9/test/bent/0.png", "readme/x.png")
    assert datasets.categories(screw) == ["bolt9", "bolt10", "screw"]
    with pytest.warns(DataWarning, match=r"not used: 1 image in readme$"):
        samples = datasets.load(screw)
    shutil.rmtree(screw / "readme")
    assert list(samples) == ["bolt9", "bolt10", "screw"] and samples["screw"] == datasets.mvtec(screw, "screw")
    assert list(datasets.load(str(screw), ["screw", "bolt9"])) == ["screw", "bolt9"]
    assert datasets.load(screw / "screw") == {"screw": samples["screw"]}
    plain = datasets.load(screw / "screw/train/good")
    assert list(plain) == ["good"] and [s.split for s in plain["good"]] == ["train"] * 3
    monkeypatch.chdir(screw / "screw")
    assert [s.category for s in datasets.load(".")["screw"]] == ["screw"] * 7  # not "."
    assert set(datasets.load("train/../train/good")) == {"good"}


def test_several_paths(screw, tmp_path):
    """Roots, category folders and plain folders can be combined."""
    create_files(tmp_path / "more", "nut/train/good/0.png", "bolt/train/good/0.png")
    parts = create_files(tmp_path / "parts", "0.png")
    paths = [tmp_path / "more", str(screw / "screw"), parts]
    samples = datasets.load(paths)
    assert list(samples) == ["bolt", "nut", "screw", "parts"]
    assert samples["screw"] == datasets.mvtec(screw, "screw") and samples["parts"] == datasets.folder(parts)
    assert list(datasets.load(paths, ["screw", "nut"])) == ["screw", "nut"]
    assert datasets.load([screw / "screw"]) == datasets.load(screw / "screw")
    first, last = re.escape(str(paths[0])), re.escape(str(parts))
    with pytest.raises(ValueError, match=rf"^{first}, .*, {last}: wanted category 'skrew', got screw, bolt, nut, "):
        datasets.load(paths, ["skrew"])


def test_categories_with_the_same_name(screw, tmp_path):
    create_files(tmp_path / "more", "nut/train/good/0.png", "screw/train/good/0.png")
    message = (
        rf"^{tmp_path / 'more'}: wanted categories with different names, got 'screw' again, as in {screw / 'screw'}$"
    )
    for categories in (None, ["nut"]):
        with pytest.raises(ValueError, match=message):
            datasets.load([screw / "screw", tmp_path / "more"], categories)
    with pytest.raises(ValueError, match=r"got 'screw' again, as in "):
        datasets.load([screw / "screw"] * 2)


def test_category_without_training_images(screw):
    """An error, whether the folder is missing or empty."""
    create_files(screw, "bolt/test/bent/0.png")
    message = r"bolt/train/good: wanted the folder of good training images, got no such folder$"
    with pytest.raises(FileNotFoundError, match=message):
        datasets.load(screw)
    assert list(datasets.load(screw, ["screw"])) == ["screw"]
    (screw / "bolt/train/good").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"bolt/train/good: wanted a folder with image files .*, got none$"):
        datasets.load(screw)


def test_wrong_paths_and_names(screw):
    missing = screw / "no"
    for call in (datasets.load, datasets.categories, datasets.folder, lambda path: datasets.mvtec(path, "x")):
        with pytest.raises(FileNotFoundError, match=rf"^{missing}: wanted .*, got no such folder$"):
            call(missing)
        with pytest.raises(ValueError, match=r"0\.PNG: wanted .*, got a file$"):
            call(screw / "screw/test/good/0.PNG")
    create_files(screw, "bolt/train/good/0.png")
    with pytest.raises(ValueError, match=r"wanted category 'skrew', got screw, bolt$"):
        datasets.mvtec(screw, "skrew")
    with pytest.raises(ValueError, match=r"wanted category 'skrew', got screw, bolt$"):
        datasets.load(screw, ["screw", "skrew"])
    with pytest.raises(ValueError, match=r"wanted category 'bolt', got good$"):
        datasets.load(screw / "screw/train/good", ["bolt"])


def test_list_images(screw):
    good = screw / "screw/train/good"
    other = create_files(screw, "a.dat") / "a.dat"
    assert images.list_images([other, good]) == [other, good / "9.png", good / "10.png", good / "100.png"]
    assert images.list_images(str(good / "9.png")) == [good / "9.png"]
    with pytest.raises(FileNotFoundError, match=r"no\.png: wanted an image or a folder of images, got no such file"):
        images.list_images([good, good / "no.png"])
    assert datasets.load(screw)["screw"][0].path == good / "9.png"
