"""recontrast.data.prepare: miniatures of the original downloads become data sets."""

import errno
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from downloads import APTOS_IDS, DOWNLOADS, write_image, write_table
from PIL import Image
from typer.testing import CliRunner

from recontrast.app.cli import app
from recontrast.data import datasets, downloads, fundus, images
from recontrast.data import prepare as module
from recontrast.data.described_sets import DESCRIBED_SETS
from recontrast.data.prepare import PUBLISHED_COUNTS, Counts, prepare


@pytest.fixture
def small_aptos(monkeypatch):
    """Use four training images of APTOS 2019 instead of a thousand."""
    monkeypatch.setattr(downloads, "APTOS_TRAIN", 4)


def list_samples(out):
    """Return the samples by category: image and mask relative to the category, and label."""
    return {
        category: [
            (
                sample.path.relative_to(out / category).as_posix(),
                sample.mask and sample.mask.relative_to(out / category).as_posix(),
                sample.label,
            )
            for sample in samples
        ]
        for category, samples in datasets.load(out).items()
    }


def list_tree(folder):
    """Return all relative paths below a folder."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*")) if folder.exists() else []


def run_command(*arguments):
    """Run ``recontrast prepare``."""
    return CliRunner().invoke(app, ["prepare", *map(str, arguments)])


# ---- layout of each data set -------------------------------------------------------------


def test_mvtec(download, tmp_path):
    prepared = prepare("mvtec", download("mvtec"), tmp_path / "out")
    good = [(f"train/good/{i:03}.png", None, 0) for i in range(3)]
    assert list_samples(tmp_path / "out") == {
        "bottle": [
            *good,
            ("test/broken_large/000.png", "ground_truth/broken_large/000_mask.png", 1),
            ("test/good/000.png", None, 0),
        ],
        "metal_nut": [
            *good,
            ("test/bent/000.png", "ground_truth/bent/000_mask.png", 1),
            ("test/good/000.png", None, 0),
        ],
    }
    assert prepared.source == tmp_path / "downloads/mvtec/mvtec_anomaly_detection"
    assert prepared.counts == {"bottle": Counts(3, 2, 1), "metal_nut": Counts(3, 2, 1)}
    assert prepared.files == {"hard links": 12}
    single = prepare("mvtec", prepared.source / "bottle", tmp_path / "single")  # a single category
    assert list(single.counts) == ["bottle"] and list_samples(tmp_path / "single")["bottle"][:3] == good


VISA = [
    ("train/good/0000.JPG", None, 0),
    ("train/good/0002.JPG", None, 0),
    ("train/good/0007.JPG", None, 0),
    ("test/bad/000.JPG", "ground_truth/bad/000.png", 1),
    ("test/bad/001.JPG", "ground_truth/bad/001.png", 1),
    ("test/good/0005.JPG", None, 0),
]


def test_visa(download, tmp_path):
    source, out = download("visa"), tmp_path / "out"
    prepared = prepare("visa", source, out)
    assert list_samples(out) == {"candle": VISA, "pcb1": VISA}
    assert prepared.counts == {"candle": Counts(3, 3, 1), "pcb1": Counts(3, 3, 1)}
    assert prepared.files == {"hard links": 12, "pictures written": 4}
    for sample in datasets.load(out)["pcb1"]:
        if sample.mask:
            original = source / "VisA/pcb1/Data/Masks/Anomaly" / sample.mask.name
            with Image.open(sample.mask) as mask, Image.open(original) as original_mask:
                np.testing.assert_array_equal(np.asarray(mask), (np.asarray(original_mask) != 0) * np.uint8(255))
            assert images.read_pair(sample)[1].sum() == 16


def test_visa_in_one_class_layout(download, tmp_path):
    """The layout that the script of VisA's authors writes, and the one of `prepare`, are accepted as they are."""
    prepare("visa", download("visa"), tmp_path / "VisA_pytorch" / "1cls")
    prepared = prepare("visa", tmp_path / "VisA_pytorch", tmp_path / "out")
    assert list_samples(tmp_path / "out") == {"candle": VISA, "pcb1": VISA}
    assert prepared.files == {"hard links": 16} and prepared.published is PUBLISHED_COUNTS["visa"]


def test_visa_masks_of_every_mode(tmp_path):
    write_image(tmp_path / "image.png")
    levels = np.zeros((12, 16), np.uint8)
    levels[3:6] = 2
    palette = Image.fromarray(levels, "L").convert("P")
    palette.putpalette([0, 0, 0] * 256)  # the index counts, not its colour
    coloured = np.zeros((12, 16, 4), np.uint8)
    coloured[..., 3] = 255  # the alpha channel does not count
    coloured[3:6, :, 1] = 9
    for picture in (Image.fromarray(levels), palette, Image.fromarray(coloured), Image.fromarray(levels.astype("u2"))):
        picture.save(tmp_path / "mask.png")
        mask = downloads.binarise_mask(tmp_path / "mask.png", tmp_path / "image.png")
        np.testing.assert_array_equal(mask, (levels != 0) * np.uint8(255))
    Image.fromarray((levels != 0) * np.uint8(255)).save(tmp_path / "mask.png")
    assert (
        downloads.binarise_mask(tmp_path / "mask.png", tmp_path / "image.png") is None
    )  # already binary, so it is linked


def test_aptos(download, tmp_path, small_aptos):
    source, out = download("aptos"), tmp_path / "out"
    prepared = prepare("aptos", source, out)
    normal = [f"{name}.png" for name in APTOS_IDS[:6]]
    random.seed(1)  # as the reference does
    random.shuffle(normal)
    assert list_samples(out) == {
        "aptos": [
            *((f"train/good/{name}", None, 0) for name in sorted(normal[:4])),
            *((f"test/good/{name}", None, 0) for name in sorted(normal[4:])),
            *((f"test/grade{i % 5}/{APTOS_IDS[i]}.png", None, 1) for i in (6, 7, 8)),
        ]
    }
    assert prepared.counts == {"aptos": Counts(4, 5, 2)} and prepared.files == {"pictures written": 9}
    for sample in datasets.load(out)["aptos"]:
        eye = fundus.read_fundus(source / "train_images" / sample.path.name)
        np.testing.assert_array_equal(images.read_image(sample.path), eye)


def test_aptos_split_is_that_of_the_reference(tmp_path):
    """A thousand of 1,805 normal images, drawn from the order of the table without decoding images."""
    names = [f"{i:012x}" for i in random.Random(7).sample(range(10**12), 1810)]
    rows = [(name, int(i >= 1805)) for i, name in enumerate(names)]
    write_table(tmp_path / "train.csv", ["id_code", "diagnosis"], rows)
    (tmp_path / "train_images").mkdir()
    for name in names:
        (tmp_path / "train_images" / f"{name}.png").touch()
    _, entries = downloads.read_aptos(tmp_path)
    normal = names[:1805]
    random.seed(1)
    random.shuffle(normal)
    assert [entry.target for entry in entries[:1000]] == [f"aptos/train/good/{name}.png" for name in normal[:1000]]
    assert [entry.target for entry in entries[1000:1805]] == [f"aptos/test/good/{name}.png" for name in normal[1000:]]
    assert module.count_images(entries, tmp_path)["aptos"] == Counts(1000, 810, 805)


def test_oct2017(download, tmp_path):
    prepared = prepare("oct2017", download("oct2017"), tmp_path / "out")
    assert list_samples(tmp_path / "out") == {
        "oct2017": [
            *((f"train/good/NORMAL-1384-{i}.jpeg", None, 0) for i in (9, 10)),
            *((f"test/{kind}/{kind}-5193-{i}.jpeg", None, 1) for kind in ("CNV", "DME", "DRUSEN") for i in (9, 10)),
            *((f"test/good/NORMAL-5193-{i}.jpeg", None, 0) for i in (9, 10)),
        ]
    }
    assert prepared.source.name == "OCT" and prepared.counts == {"oct2017": Counts(2, 8, 2)}


def test_isic2018(download, tmp_path):
    source, out = download("isic2018"), tmp_path / "out"
    prepared = prepare("isic2018", source, out)
    assert list_samples(out) == {
        "isic2018": [
            *((f"train/good/ISIC_00{i}.jpg", None, 0) for i in (24306, 24308, 24310)),
            ("test/BKL/ISIC_0034322.jpg", None, 1),
            ("test/MEL/ISIC_0034324.jpg", None, 1),
            *((f"test/good/ISIC_00{i}.jpg", None, 0) for i in (34321, 34323)),
        ]
    }
    assert prepared.counts == {"isic2018": Counts(3, 4, 2)}
    for part in ("Training", "Validation"):  # the tables are also offered without a folder
        table = source / f"ISIC2018_Task3_{part}_GroundTruth" / f"ISIC2018_Task3_{part}_GroundTruth.csv"
        table.rename(source / table.name)
        shutil.rmtree(table.parent)
    assert prepare("isic2018", source).counts == prepared.counts


@pytest.mark.parametrize("name", ["visa", "oct2017", "isic2018"])
def test_jpeg_stays_jpeg(download, tmp_path, name):
    source = download(name)
    prepare(name, source, tmp_path / "out")
    originals_by_bytes = {path.read_bytes() for path in source.rglob("*.[jJ][pP]*") if path.is_file()}
    for samples in datasets.load(tmp_path / "out").values():
        for sample in samples:
            assert sample.path.read_bytes() in originals_by_bytes
            assert sample.path.read_bytes()[:3] == b"\xff\xd8\xff"


# ---- links, repeated runs, messages -----------------------------------------------------


def test_hard_links(download, tmp_path):
    source = download("isic2018")
    assert prepare("isic2018", source, tmp_path / "out").files == {"hard links": 7}
    for sample in datasets.load(tmp_path / "out")["isic2018"]:
        assert not sample.path.is_symlink()
        assert sample.path.samefile(next(source.rglob(sample.path.name)))
    shutil.rmtree(source)
    assert all(images.read_image(s.path).shape == (12, 16, 3) for s in datasets.load(tmp_path / "out")["isic2018"])


def no_links(*args, **options):
    raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))


@pytest.mark.parametrize("exists", [False, True], ids=["new", "empty"])
def test_relative_symbolic_links_across_file_systems(download, tmp_path, monkeypatch, exists):
    monkeypatch.setattr(os, "link", no_links)
    download("isic2018")
    (tmp_path / "source_link").symlink_to(tmp_path / "downloads")  # source and target are reached through links
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "target_link").symlink_to(tmp_path / "far" / "away")
    if exists:
        (tmp_path / "far" / "away" / "out").mkdir()
    prepared = prepare("isic2018", tmp_path / "source_link" / "isic2018", tmp_path / "target_link" / "out")
    assert prepared.files == {"symbolic links": 7}
    for sample in datasets.load(tmp_path / "far/away/out")["isic2018"]:
        assert not os.path.isabs(os.readlink(sample.path)) and images.read_image(sample.path).shape == (12, 16, 3)
    monkeypatch.undo()
    shutil.move(tmp_path, tmp_path.with_name("moved"))  # source and target together
    moved = datasets.load(tmp_path.with_name("moved") / "far/away/out")["isic2018"]
    assert all(images.read_image(sample.path).shape == (12, 16, 3) for sample in moved)


@pytest.mark.parametrize("reason", ["no links", "requested"])
def test_copies(download, tmp_path, monkeypatch, reason):
    source = download("isic2018")
    if reason == "no links":
        monkeypatch.setattr(os, "link", no_links)
        monkeypatch.setattr(os, "symlink", no_links)
        monkeypatch.setattr(Path, "symlink_to", no_links)
    assert prepare("isic2018", source, tmp_path / "out", link=reason == "no links").files == {"copies": 7}
    for sample in datasets.load(tmp_path / "out")["isic2018"]:
        original = next(source.rglob(sample.path.name))
        assert sample.path.read_bytes() == original.read_bytes() and sample.path.stat().st_nlink == 1
        assert sample.path.stat().st_mtime_ns == original.stat().st_mtime_ns


@pytest.mark.parametrize("name", DOWNLOADS)
def test_repeated_runs(download, tmp_path, small_aptos, name):
    """Two runs on one download give the same files, and an existing data set is never changed."""
    source = download(name)
    before = list_tree(source)
    first, second = (prepare(name, source, tmp_path / out) for out in ("a", "b"))
    assert (first.counts, first.files) == (second.counts, second.files)
    assert list_tree(tmp_path / "a") == list_tree(tmp_path / "b")
    for path in list_tree(tmp_path / "a"):
        file, other = (tmp_path / out / path for out in ("a", "b"))
        assert file.is_dir() or file.read_bytes() == other.read_bytes()
    description = json.loads((tmp_path / "a" / module.MARKER_FILE).read_text())
    assert description["data"] == name and description["files"] == first.files
    assert description["source"] == str(first.source)
    with pytest.raises(ValueError, match=f"^{tmp_path / 'a'}: wanted a new or an empty folder, got one that holds "):
        prepare(name, source, tmp_path / "a")
    assert list_tree(tmp_path / "a") == list_tree(tmp_path / "b") and list_tree(source) == before
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").mkdir()
    assert prepare(name, source, tmp_path / "a").files == first.files


@pytest.mark.parametrize("name", DOWNLOADS)
def test_check_only(download, tmp_path, name):
    source = download(name)
    prepared = prepare(name, source)
    assert prepared.out is None and prepared.files == {} and prepared.counts
    assert list_tree(tmp_path) == sorted(["downloads", *(f"downloads/{path}" for path in list_tree(source.parent))])


def test_run_after_an_interrupt(download, tmp_path):
    def interrupt(done, total):
        assert total == 16
        if done == 5:
            raise KeyboardInterrupt

    source = download("visa")
    with pytest.raises(KeyboardInterrupt):
        prepare("visa", source, tmp_path / "out", workers=1, on_progress=interrupt)
    assert list_tree(tmp_path)[0] == "downloads" and not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["downloads"]
    prepare("visa", source, tmp_path / "out")


def test_published_counts():
    """The totals are those that the authors of the data sets, and of the reference, state."""
    totals = {}
    for name, table in PUBLISHED_COUNTS.items():
        total = module.sum_counts(table)
        totals[name] = (total.train, total.test, len(table))
    assert totals == {
        "mvtec": (3629, 1725, 15),
        "visa": (8659, 2162, 12),
        "aptos": (1000, 2662, 1),
        "oct2017": (26315, 1000, 1),
        "isic2018": (6705, 193, 1),
    }
    assert sum(c.good for c in PUBLISHED_COUNTS["mvtec"].values()) == 467
    assert all(c.test - c.good == 100 for c in PUBLISHED_COUNTS["visa"].values())
    assert set(module.READERS) - set(DESCRIBED_SETS) == set(PUBLISHED_COUNTS) == set(DOWNLOADS)


def test_differences_from_the_published_counts():
    published = {"a": Counts(3, 4, 2), "b": Counts(1, 1), "c": Counts(5, 5, 5)}
    assert module.compare_counts({**published, "b": Counts(1, 1, 1)}, published) == []
    assert module.compare_counts({"a": Counts(2, 4, 1), "b": Counts(1, 3, 1), "d": Counts(1, 0, 0)}, published) == [
        "a: 2 train, published 3; 1 good of test, published 2",
        "b: 3 test, published 1",
        "d: 1 train, 0 test, not among the published categories",
        "1 of 3 published categories are missing: c",
    ]


def test_command(download, tmp_path):
    result = run_command("mvtec", "--source", download("mvtec"), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    assert rows == [
        ["bottle", "3", "209", "2", "83", "1", "20"],
        ["metal_nut", "3", "220", "2", "115", "1", "22"],
        ["all", "6", "3629", "4", "1725", "2", "467"],
    ]
    warnings = [line for line in result.stderr.splitlines() if line.startswith("recontrast: warning: ")]
    assert warnings[0].endswith("bottle: 3 train, published 209; 2 test, published 83; 1 good of test, published 20")
    assert warnings[-1].endswith(
        "13 of 15 published categories are missing: cable, capsule, carpet, grid, hazelnut, leather, pill, screw, "
        "tile, toothbrush, transistor, wood, zipper"
    )
    assert len(warnings) == 3 and "published ones" not in result.stdout
    assert f"12 hard links: {tmp_path / 'out'}\n" in result.stdout
    assert "prepare mvtec 12/12" in result.stderr


def test_command_with_the_published_counts(download, tmp_path, monkeypatch):
    monkeypatch.setitem(PUBLISHED_COUNTS, "isic2018", {"isic2018": Counts(3, 4)})
    result = run_command("isic2018", "--source", download("isic2018"), "--out", tmp_path / "out", "--copy")
    assert "all counts match the published ones" in result.stdout and "warning" not in result.output
    assert f"7 copies: {tmp_path / 'out'}\n" in result.stdout
    (row,) = (line for line in result.stdout.splitlines() if line.startswith("│ isic2018"))
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == ["isic2018", "3", "3", "4", "4", "2", "-"]
    (tmp_path / "checked").mkdir()
    result = run_command("isic2018", "--source", tmp_path / "downloads")  # a folder above the download, without --out
    assert "all counts match the published ones" in result.stdout and "copies" not in result.stdout
    help_text = CliRunner().invoke(app, ["prepare", "--help"]).stdout
    assert all(text in help_text for text in ("NAME", "--source", "--out", "--copy", "--workers", "one per CPU"))


SMALL = ["--backbone", "test_resnet", "--weights", "random", "--size", "64", "--batch", "2", "--steps", "1"]


@pytest.mark.parametrize("name", ["aptos", "isic2018"])
def test_without_masks_from_download_to_result(download, tmp_path, small_aptos, name):
    """Image metrics are reported, with a note that explains the missing pixel metrics."""
    assert run_command(name, "--source", download(name), "--out", tmp_path / "data").exit_code == 0
    arguments = ["train", str(tmp_path / "data"), "--out", str(tmp_path / "run"), *SMALL, "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (row,) = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    defects = {"aptos": 3, "isic2018": 2}[name]
    assert (row["category"], row["images"], row["defects"]) == (name, defects + 2, defects)
    assert 0 <= row["i_auroc"] <= 1 and row["p_auroc"] is None and row["aupro"] is None
    assert row["note"] == f"no pixel metrics: {defects} of {defects} defective images have no mask"
