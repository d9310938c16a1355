"""Audit of training images: distances against a float64 restatement, copies, errors, and the command."""

import csv

import numpy as np
import pytest
import torch
from command_line import fails, works
from PIL import Image

from recontrast.app.audit_files import choose_images
from recontrast.data import datasets
from recontrast.models.patchcore import PatchCore
from recontrast.training import audit

SIZE = 64


def draw_image(generator, with_defect=False):
    """A grey image with weak noise; a defect is a bright square."""
    pixels = generator.normal(120, 6, (SIZE, SIZE, 3)).clip(0, 255).astype(np.uint8)
    if with_defect:
        top, left = generator.integers(8, 44, 2)
        pixels[top : top + 12, left : left + 12] = generator.integers(0, 255, (12, 12, 3))
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    """Twenty good images, of which the last two have a defect, and one test image."""
    generator = np.random.default_rng(5)
    for index in range(20):
        path = tmp_path / f"nut/train/good/{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_image(generator, index >= 18).save(path)
    (tmp_path / "nut/test/good").mkdir(parents=True)
    draw_image(generator).save(tmp_path / "nut/test/good/000.png")
    return tmp_path / "nut"


def restate(features, others):
    """Distances of each point to the nearest point of the chosen images, in float64, pair by pair."""
    nearest = np.full(features.shape[:2], np.inf)
    for i, j in zip(*np.nonzero(others), strict=True):
        gaps = np.linalg.norm(features[i][:, None].astype(np.float64) - features[j][None], axis=2)
        nearest[i] = np.minimum(nearest[i], gaps.min(1))
    return nearest


@pytest.mark.parametrize(("images", "points", "channels"), [(3, 1, 5), (7, 9, 4), (40, 6, 3), (35, 4, 17)])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_distances(images, points, channels, share):
    generator = np.random.default_rng(images)
    features = generator.normal(size=(images, points, channels)).astype(np.float32)
    others = (generator.random((images, images)) < share) & ~np.eye(images, dtype=bool)
    others[:, 0] = np.arange(images) != 0  # each has at least one
    others[0, 1] = True
    got = audit.measure_distances(torch.from_numpy(features), others).numpy()
    np.testing.assert_allclose(got, restate(features, others), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [5, audit.MAX_OTHERS + 40])
def test_others_are_drawn_and_leave_out_the_own_group(count):
    groups = np.arange(count) // 2
    chosen = audit.choose_others(groups, np.random.default_rng(0))
    assert not (chosen & (groups[:, None] == groups)).any()
    different = count - np.array([np.sum(groups == group) for group in groups])
    assert (chosen.sum(1) == np.minimum(different, audit.MAX_OTHERS)).all()


def test_z_scores():
    scores = np.array([1.0, 2.0, 3.0, 4.0, 100.0])
    assert audit.measure_z_scores(scores) == pytest.approx((scores - 3) / 1.4826)
    assert audit.measure_z_scores(np.array([1.0, 1.0, 1.0, 9.0])).tolist() == [0, 0, 0, 0]


def test_defects_come_first_and_copies_are_left_out_together(folder):
    """A copy of a defect must not explain it."""
    (folder / "train/good/100.png").write_bytes((folder / "train/good/018.png").read_bytes())
    samples = datasets.mvtec(folder.parent, "nut")
    torch.manual_seed(0)
    images, errors = audit.audit_images(samples, PatchCore("test_resnet", weights="random", levels=(1,)), size=SIZE)
    first = [image.sample.path.name for image in images[:3]]
    assert set(first) == {"018.png", "019.png", "100.png"} and not errors
    assert len(images) == 21 and images[0].stands_out and not images[-1].stands_out
    scores = [image.score for image in images]
    assert scores == sorted(scores, reverse=True) and scores[0] == images[0].distances.max()


def test_command(folder, tmp_path):
    broken = folder / "train/good/500.png"
    broken.write_bytes(b"no image")
    options = ["--weights", "random", "--backbone", "test_resnet", "--size", SIZE, "--device", "cpu"]
    text = fails("audit", folder, *options, "--out", tmp_path / "out", "--clean", 0.1)
    assert str(broken) in text and str(broken) in (tmp_path / "out/audit.csv").read_text()
    assert str(broken) not in (tmp_path / "out/clean.csv").read_text()  # training would stop at it
    broken.unlink()
    works("audit", folder, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out/clean.csv").exists()  # it would belong to another table
    text = works("audit", folder, *options, "--out", tmp_path / "out", "--clean", 0.1)
    assert f"recontrast train {tmp_path / 'out/clean.csv'}" in text
    rows = list(csv.DictReader((tmp_path / "out/audit.csv").read_text().splitlines()))
    assert [row["rank"] for row in rows] == [str(rank) for rank in range(1, 21)]
    gone = {row["path"] for row in rows if row["left_out"] == "1"}
    assert gone == {row["path"] for row in rows[:2]}
    kept = datasets.load([tmp_path / "out/clean.csv"])["nut"]
    assert {str(sample.path) for sample in kept if sample.split == "train"} == {row["path"] for row in rows[2:]}
    assert sum(sample.split == "test" for sample in kept) == 1
    page = (tmp_path / "out/audit.html").read_text()
    assert page.count("<li>") == 20 and page.count("data:image/webp") == 40 and "left out of the list" in page
    (tmp_path / "out/audit.csv").write_text("mine")
    assert "audit.csv" in fails("audit", folder, *options, "--out", tmp_path / "out")
    assert (tmp_path / "out/audit.csv").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--clean", "1"], "--clean: wanted a share between 0 and 1, got 1"),
        (["--size", "33"], "multiple"),
        (["--weights", "missing.pth"], "missing.pth"),
        (["--category", "bolt"], "bolt"),
    ],
)
def test_wrong_options_write_nothing(folder, tmp_path, options, wanted):
    arguments = ["--weights", "random", "--backbone", "test_resnet", "--size", SIZE, "--device", "cpu", *options]
    assert wanted in fails("audit", folder, *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_data():
    assert "DATA: wanted data sets, folders of good images or lists, got none" in fails("audit")


def test_too_few_images_and_shares(folder):
    samples = datasets.mvtec(folder.parent, "nut")
    network = PatchCore("test_resnet", weights="random", levels=(1,))
    with pytest.raises(ValueError, match="audit: wanted at least 3 different good training images, got 2"):
        audit.audit_images(samples[:2], network, size=SIZE)
    images, _ = audit.audit_images(samples[:4], network, size=SIZE)
    counts = [len(choose_images({"nut": images}, share)) for share in (0.5, 0.01, 0.99)]
    assert counts == [2, 1, 3]


def test_categories_that_fail_lose_no_others(folder, tmp_path):
    """Too few images are refused before anything is computed; images that cannot be read, after it, by name."""
    options = ["--weights", "random", "--backbone", "test_resnet", "--size", SIZE, "--device", "cpu"]
    small = tmp_path / "bolt/train/good"
    small.mkdir(parents=True)
    for index in range(2):
        draw_image(np.random.default_rng(index)).save(small / f"{index}.png")
    text = fails("audit", folder, tmp_path / "bolt", *options, "--out", tmp_path / "out")
    assert "bolt: audit: wanted at least 3 different good training images, got 2" in text
    assert not (tmp_path / "out").exists()
    for index in range(3):
        (small / f"broken{index}.png").write_bytes(b"no image %d" % index)
    text = fails("audit", folder, tmp_path / "bolt", *options, "--out", tmp_path / "out")
    assert "bolt: audit: wanted at least 3 different good training images, got 2 that can be read:" in text
    assert "broken0.png" in text and len((tmp_path / "out/audit.csv").read_text().splitlines()) == 21


def test_images_of_16_bits(tmp_path):
    generator = np.random.default_rng(0)
    folder = tmp_path / "nut/train/good"
    folder.mkdir(parents=True)
    for index in range(8):
        levels = generator.normal(1500, 20, (SIZE, SIZE)).astype(np.uint16)
        levels[10:20, 10:20] += 300 * (index == 5)
        Image.fromarray(levels).save(folder / f"{index}.png")
    options = ["--weights", "random", "--backbone", "test_resnet", "--size", SIZE, "--device", "cpu"]
    works("audit", tmp_path / "nut", *options, "--window", "1300 2000", "--out", tmp_path / "out")
    first = (tmp_path / "out/audit.csv").read_text().splitlines()[1]
    assert first.split(",")[1].endswith("5.png")


def test_plain_folder(folder, tmp_path):
    """All images of a folder without a layout are ranked; none is kept for a test."""
    options = ["--weights", "random", "--backbone", "test_resnet", "--size", SIZE, "--device", "cpu"]
    works("audit", folder / "train/good", *options, "--out", tmp_path / "out")
    assert len((tmp_path / "out/audit.csv").read_text().splitlines()) == 21
