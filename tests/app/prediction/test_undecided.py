"""An image whose anomaly map is not finite: score NaN, decision "undecided", named, exit status 2, the others whole.

A white image stands for one: the patched preprocessing turns its pixels into NaN.
"""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import call, fails, works
from PIL import Image
from saved_model import RECIPE, draw, save
from tiny import tiny_set

import recontrast
from recontrast import ReContrastDetector
from recontrast.app.prediction import parquet_parts
from recontrast.app.prediction.ray_predict import Worker
from recontrast.data.image_files import ImageFiles
from recontrast.inference import infer, tiling
from recontrast.inference.detector import CheckpointDetector, run_checked

REASON = "wanted a finite anomaly map, got NaN or infinite values: it has no score and is undecided"


@pytest.fixture(autouse=True)
def _white_images_become_nan(monkeypatch):
    normalise = infer.normalise

    def normalise_and_spoil(pixels, *args, **kwargs):
        x = normalise(pixels, *args, **kwargs)
        is_white = (pixels == 255).flatten(1).all(dim=1)
        return torch.where(is_white.view(-1, 1, 1, 1).to(x.device), torch.nan, x)

    monkeypatch.setattr(infer, "normalise", normalise_and_spoil)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = draw(tmp_path_factory.mktemp("images") / "new", 3, seed=5)
    Image.new("RGB", (64, 64), "white").save(folder / "001w.png")  # between the others
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    path = save(folder / "checkpoint.pt", RECIPE)
    good = draw(folder / "good", 9, seed=1)
    works("calibrate", path, "--good", good, "--false-alarm-rate", "0.2", "--pixel-rate", "0.2", "--device", "cpu")
    return path


def read_csv(path):
    with path.open(newline="") as file:
        return {Path(row["path"]).name: row for row in csv.DictReader(file)}


@pytest.mark.parametrize("maps", ["tiff16", "npy"])
def test_predict_names_the_image_and_keeps_the_others(checkpoint, images, tmp_path, maps):
    result = call("predict", checkpoint, images, "--out", tmp_path, "--maps", maps, "--threshold", "0.1",
                  "--device", "cpu")  # fmt: skip
    assert result.exit_code == 2, result.output
    assert [line for line in result.stderr.splitlines() if "001w.png" in line] == [
        f"recontrast: {images / '001w.png'}: {REASON}"
    ]
    assert "4 images scored" in result.stdout and "1 undecided" in result.stdout
    rows = read_csv(tmp_path / "scores.csv")
    row = rows.pop("001w.png")
    assert (row["score"], row["flagged"], row["p_value"], row["decision"], row["regions"]) == (
        "nan", "", "nan", "undecided", "",
    )  # fmt: skip
    assert all(math.isfinite(float(other["score"])) and other["decision"] != "undecided" for other in rows.values())
    text = (tmp_path / "scores.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    entry = content["images"][2]
    assert (entry["score"], entry["p_value"], entry["decision"]) == (None, None, "undecided")
    assert "flagged" not in entry and "regions" not in entry
    assert all(math.isfinite(value) for value in content["overlay_range"])
    if maps == "tiff16":
        with Image.open(tmp_path / entry["map"]) as file:
            assert (np.asarray(file) == 65535).all()
    else:
        assert np.isnan(np.load(tmp_path / entry["map"])).all()
    with Image.open(tmp_path / entry["overlay"]) as file:
        assert len(file.getcolors()) == 1  # the hottest colour everywhere

    alone = tmp_path / "alone"
    works("predict", checkpoint, *sorted(images.glob("00[012].png")), "--out", alone, "--device", "cpu")
    assert {name: row["score"] for name, row in read_csv(alone / "scores.csv").items()} == {
        name: row["score"] for name, row in rows.items()
    }


def test_predict_of_undecided_images_alone(checkpoint, images, tmp_path):
    result = call("predict", checkpoint, images / "001w.png", "--out", tmp_path, "--device", "cpu")
    assert result.exit_code == 2 and REASON in result.stderr
    assert read_csv(tmp_path / "scores.csv")["001w.png"]["decision"] == "undecided"


def test_python_api_warns(checkpoint, images):
    detector = recontrast.load(checkpoint, device="cpu")
    with pytest.warns(UserWarning, match="001w.png: wanted a finite anomaly map") as caught:
        predictions = detector.predict(images)
    assert [warning.filename for warning in caught] == [__file__]
    white = predictions[2]
    assert (white.decision, white.error, white.regions) == ("undecided", None, None)
    assert math.isnan(white.score) and math.isnan(white.p_value)
    assert list(predictions.undecided) == [white]
    assert white not in predictions.defects
    assert {prediction.decision for prediction in predictions if prediction is not white} <= {"good", "defect"}
    white.draw()
    predictions[0].draw()


def test_parquet_rows_of_a_ray_worker(checkpoint, images, tmp_path):
    paths = [str(path) for path in sorted(images.glob("*.png"))]
    worker = Worker(1)
    worker._load(checkpoint, tmp_path, 2, "cpu", "id", 0.1, None)
    parquet_parts.write_part(tmp_path, parquet_parts.Part("part-0.parquet", tuple(paths)), worker.rows(paths), {})
    summary = parquet_parts.summarise(tmp_path, paths)
    assert summary.undecided == [f"{images / '001w.png'}: {REASON}"]
    assert (summary.scored, summary.decided, summary.unread) == (4, 3, [])
    names = ["score", "decision", "flagged", "p_value"]
    table = parquet_parts._read_columns(tmp_path / "part-0.parquet", names)
    assert math.isnan(table["score"][2]) and math.isnan(table["p_value"][2])
    assert (table["decision"][2], table["flagged"][2]) == ("undecided", None)


def test_calibrate_refuses_the_image(checkpoint, images):
    before = checkpoint.read_bytes()
    sentence = fails("calibrate", checkpoint, "--good", images, "--false-alarm-rate", "0.5", "--device", "cpu")
    assert f"{images / '001w.png'}: wanted a finite anomaly map of a good image" in sentence
    assert f"{images / '001w.png'}: wanted a finite" in fails(
        "calibrate", checkpoint, "--check", images, "--device", "cpu"
    )
    assert checkpoint.read_bytes() == before


def test_evaluate_refuses_the_image(checkpoint, tmp_path):
    samples = tiny_set(tmp_path, "tile")
    white = next(sample.path for sample in samples if sample.split == "test")
    Image.new("RGB", (64, 64), "white").save(white)
    detector = CheckpointDetector(checkpoint, "cpu")
    with pytest.raises(ValueError, match=f"{white.name}: wanted a finite anomaly map"):
        recontrast.evaluation.evaluate.evaluate(detector.model, samples, RECIPE)


def test_estimator_warns_and_predicts_zero(checkpoint, images):
    detector = ReContrastDetector.from_checkpoint(checkpoint, device="cpu")
    paths = sorted(images.glob("*.png"))
    with pytest.warns(UserWarning, match=r"image 2 \(counted from 0\): wanted a finite anomaly map"):
        labels = detector.predict(paths)
    assert labels[2] == 0 and set(labels[[0, 1, 3]]) <= {-1, 1}
    assert np.isnan(detector.score_samples(paths)).tolist() == [False, False, True, False]
    assert np.isnan(detector.p_values(paths)).tolist() == [False, False, True, False]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_detectors_that_ignore_nan_are_checked(value):
    """Such as files exported by earlier versions, or a detector of the user's."""
    maps = np.random.default_rng(0).random((3, 8, 9), np.float32)
    maps[1, 3, 4] = value
    detector = SimpleNamespace(run=lambda files, batch: iter([(maps, np.float32([1, 2, 3]))]))
    ((_, scores),) = run_checked(detector, ImageFiles([]), 16)
    assert scores.dtype == np.float32
    np.testing.assert_array_equal(scores, [1, np.nan, 3])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("how", ["max", "mean", 0.01])
def test_score_of_a_blended_map(value, how):
    anomaly = np.random.default_rng(0).random((50, 70), np.float32)
    assert math.isfinite(tiling.score_map(anomaly, how))
    anomaly[20, 30] = value
    assert math.isnan(tiling.score_map(anomaly, how))


def test_one_tile_that_is_not_finite_makes_the_image_undecided(checkpoint):
    """Blending spreads NaN no further than the tile, but the score is of the whole image."""
    detector = CheckpointDetector(checkpoint, "cpu")
    pixels = np.random.default_rng(0).integers(0, 200, (128, 192, 3), np.uint8)
    pixels[:64, 128:] = 255
    recipe = RECIPE.replace(tile=64)
    anomaly = tiling.score_tiled_image(detector.model, pixels, recipe, overlap=0)[0]
    assert np.isnan(anomaly[:64, 128:]).all() and np.isfinite(anomaly[:, :128]).all()
    assert math.isnan(tiling.score_map(anomaly, "max"))
