import csv
import json

import numpy as np
import pytest
from PIL import Image

from recontrast.app.prediction.predict import predict
from recontrast.calibration.conformal import calibrate_maps
from recontrast.inference.decisions import Region, find_regions
from recontrast.inference.detector import Detector
from recontrast.recipes.recipe import Recipe

RECIPE = Recipe(backbone="test_resnet", weights="random", size=64, encoder_bn="eval")


class BrightnessDetector(Detector):
    """Detector whose map is the grey level of the image; its score is the maximum of the map."""

    recipe, category, max_map_value = RECIPE, "paper", 1.0

    def __init__(self, calibration=None):
        self.calibration = calibration

    def run(self, files, batch):
        images = files.resized(self.recipe.size)
        for start in range(0, len(files), batch):
            maps = images[range(start, min(start + batch, len(files)))].mean(-1).astype(np.float32) / 255
            yield maps, maps.max((1, 2))


@pytest.fixture(scope="module")
def calibration():
    maps = np.random.default_rng(0).uniform(0, 0.4, (19, 64, 64)).astype(np.float32)
    maps[:, 0, 0] = np.linspace(0.41, 0.5, 19)  # distinct scores
    return calibrate_maps([(maps, maps.max((1, 2)))], 19, rate=0.05, pixel_rate=0.1, source="drawn", weights="")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("paper")
    for name, squares in (("good", []), ("bad", [(10, 20, 30, 40, 200), (80, 100, 8, 12, 255)])):
        pixels = np.full((128, 192), 51, np.uint8)
        for top, left, height, width, grey in squares:
            pixels[top : top + height, left : left + width] = grey
        Image.fromarray(pixels).save(root / f"{name}.png")
    (root / "cut.png").write_bytes((root / "bad.png").read_bytes()[:60])
    return root


def test_decisions_and_regions(calibration, folder, tmp_path):
    report = predict(BrightnessDetector(calibration), [folder], tmp_path, decide=True, batch=2)
    assert len(report.unread) == 1 and "cut.png" in report.unread[0]
    rows = {
        row["path"].split("/")[-1]: row for row in csv.DictReader((tmp_path / "scores.csv").read_text().splitlines())
    }
    assert {name: (row["decision"], row["regions"]) for name, row in rows.items()} == {
        "good.png": ("good", "0"),
        "bad.png": ("defect", "2"),
        "cut.png": ("", ""),
    }
    assert rows["cut.png"]["error"] == report.unread[0] and not rows["cut.png"]["score"]
    assert float(rows["bad.png"]["p_value"]) == pytest.approx(1 / 20) and float(rows["good.png"]["p_value"]) == 1
    about = json.loads((tmp_path / "scores.json").read_text())
    assert about["calibration"]["images"] == 19 and about["calibration"]["rate"] == 0.05
    good, bad = sorted(about["images"], key=lambda image: image["path"], reverse=True)
    assert "regions" not in good and good["decision"] == "good"
    small, large = bad["regions"]  # the brighter one first
    assert small["peak"] == pytest.approx(1, abs=0.01) and large["peak"] == pytest.approx(200 / 255, abs=0.01)
    for region, (top, left, height, width) in ((small, (80, 100, 8, 12)), (large, (10, 20, 30, 40))):
        got = [region[key] for key in ("top", "left", "height", "width")]
        np.testing.assert_allclose(
            got, [top, left, height, width], atol=6
        )  # in pixels of the original image, 128 x 192
        assert top <= region["peak_row"] < top + height and left <= region["peak_column"] < left + width
    listed = list(csv.DictReader((tmp_path / "regions.csv").read_text().splitlines()))
    assert [(row["region"], row["area"]) for row in listed] == [("1", str(small["area"])), ("2", str(large["area"]))]


def test_rate_replaces_that_of_the_calibration(calibration, folder, tmp_path):
    predict(BrightnessDetector(calibration), [folder / "good.png"], tmp_path, rate=0.1)
    about = json.loads((tmp_path / "scores.json").read_text())["calibration"]
    assert about["rate"] == 0.1 and about["threshold"] == calibration.with_rate(0.1).threshold < calibration.threshold
    with pytest.raises(
        ValueError, match=r"0\.05, the lowest that 19 calibration images can promise, got 0\.01, which needs 99"
    ):
        predict(BrightnessDetector(calibration), [folder], tmp_path / "out", rate=0.01)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("asked", [{"decide": True}, {"rate": 0.1}])
def test_decisions_need_a_calibration(folder, tmp_path, asked):
    with pytest.raises(ValueError, match="wanted a detector with a calibration, got one without: run recontrast"):
        predict(BrightnessDetector(), [folder], tmp_path / "out", **asked)
    assert not (tmp_path / "out").exists()
    predict(BrightnessDetector(), [folder], tmp_path, overlays=False)
    assert (tmp_path / "scores.csv").read_text().splitlines()[0] == "path,score,error"
    assert not (tmp_path / "regions.csv").exists()


def test_files_of_an_earlier_run_are_removed(calibration, folder, tmp_path):
    """Other files stay, and so does everything if the list in scores.json cannot be read."""
    detector = BrightnessDetector(calibration)
    predict(detector, [folder], tmp_path, maps="npy")
    assert (tmp_path / "regions.csv").is_file() and (tmp_path / "overlays" / "bad.png").is_file()
    for name in ("notes.txt", "maps/mine.npy"):
        (tmp_path / name).write_text("mine")
    predict(BrightnessDetector(), [folder / "good.png"], tmp_path, maps="tiff16", overlays=False)
    left = ["maps/good.tiff", "maps/mine.npy", "notes.txt", "scores.csv", "scores.json"]
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == left
    assert not (tmp_path / "overlays").exists()
    (tmp_path.parent / "outside.npy").write_text("mine")
    for former in ("[", "[]", '{"images": [3]}', '{"images": [{"map": ""}, {"map": "maps/../../outside.npy"}]}',
                   '{"images": [{"map": "notes.txt", "overlay": ["a"]}]}'):  # fmt: skip
        (tmp_path / "scores.json").write_text(former)
        predict(BrightnessDetector(), [folder / "good.png"], tmp_path, overlays=False, overwrite=True)
        assert (tmp_path / "notes.txt").is_file() and (tmp_path / "maps" / "good.tiff").is_file()
        assert (tmp_path.parent / "outside.npy").is_file()


def test_peak_is_kept_if_the_image_is_smaller_than_its_map():
    anomaly = np.zeros((64, 64), np.float32)
    anomaly[40, 50] = 1
    assert find_regions(anomaly, 0.5, (1, 1), RECIPE) == [Region(1, 0, 0, 1, 1, 1.0, 0, 0)]
    (thin,) = find_regions(anomaly, 0.5, (2, 128), RECIPE)
    assert (thin.top, thin.height, thin.area) == (1, 1, thin.width) and thin.left <= 100 <= thin.left + thin.width
    (small,) = find_regions(anomaly, 0.5, (40, 33), RECIPE)
    assert (small.peak, small.peak_row, small.peak_column) == (1.0, 25, 26)


def test_regions_are_8_connected_and_lie_in_the_crop():
    anomaly = np.zeros((32, 32), np.float32)
    anomaly[[3, 4], [5, 6]] = 1, 2
    anomaly[20, 20] = 3
    recipe = RECIPE.replace(size=64, crop=32)
    single, pair = find_regions(anomaly, 0.5, (64, 64), recipe)
    assert (single.area, single.top, single.left, single.peak) == (1, 36, 36, 3)
    assert (pair.area, pair.top, pair.left, pair.height, pair.width) == (2, 19, 21, 2, 2)
    assert (pair.peak, pair.peak_row, pair.peak_column) == (2, 20, 22)
    assert find_regions(anomaly, 3.0, (64, 64), recipe) == []
