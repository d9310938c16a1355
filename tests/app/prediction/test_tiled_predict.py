"""`recontrast predict` with tiles: full maps, overlays, one sentence for what does not go together, little memory."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from typer.testing import CliRunner

from recontrast import checkpoint as checkpoints
from recontrast.app.cli import app
from recontrast.app.prediction.predict import predict
from recontrast.calibration.conformal import Calibration
from recontrast.checkpoint import digest
from recontrast.data import images, large_maps
from recontrast.inference.detector import OPENERS, CheckpointDetector, open_detector
from recontrast.inference.tiling import score_map, score_tiled_image
from recontrast.recipes.recipe import Recipe
from recontrast.training.train import build_model

RECIPE = Recipe(backbone="test_resnet", weights="random", tile=64, encoder_bn="eval", score=0.01)


def save(path, recipe):
    torch.manual_seed(0)
    model = build_model(recipe, "tile")
    about = {"size": None, "crop": None, "mean": list(model.mean), "std": list(model.std)}
    weights = model.state_dict()
    scores = tuple(np.linspace(0, 1e-3, 9).tolist())  # an untrained network's are far higher
    found = Calibration(scores, 0.1, scores[-1], 1e-3, 0.01, False, "chosen by hand", digest(weights, recipe))
    return checkpoints.save(path, checkpoints.Checkpoint(
        1, "tile", recipe, model.config, about, {"count": 1, "digest": ""}, weights, calibration=found))  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "checkpoint.pt", RECIPE)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save(tmp_path_factory.mktemp("whole") / "checkpoint.pt", RECIPE.replace(tile=None, size=64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for name, shape in (("a", (150, 100, 3)), ("b", (30, 90, 3)), ("c", (64, 64))):
        pixels = np.random.default_rng(len(name)).integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
    return root


def fails(*words):
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 2, done.output
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.output
    return lines[0]


def test_maps_scores_and_overlays_are_of_the_full_image(checkpoint, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(large_maps, "OVERLAY_PIXELS", 10_000)
    monkeypatch.setattr(large_maps.find_reduction, "__defaults__", (10_000,))
    (folder / "d.png").write_bytes(b"no image")
    report = predict(checkpoint, [folder], tmp_path, maps="tiff32", batch=3, device="cpu")
    (folder / "d.png").unlink()
    detector = CheckpointDetector(checkpoint, "cpu")
    sizes = {"a": (75, 50), "b": (30, 90), "c": (64, 64)}  # of overlays: 150 x 100 is more than the limit
    assert [Path(p.path).stem for p in report.predictions] == list(sizes) and len(report.unread) == 1
    for found, (name, size) in zip(report.predictions, sizes.items(), strict=True):
        anomaly = tifffile.imread(tmp_path / found.map)
        pixels = images.read_image(found.path)
        np.testing.assert_allclose(
            anomaly, score_tiled_image(detector.model, pixels, RECIPE, batch=3)[0], rtol=1e-4, atol=1e-6
        )
        assert found.score == pytest.approx(score_map(anomaly, 0.01), rel=1e-5)
        assert images.image_size(tmp_path / found.overlay) == size, name
        assert found.decision.defect and found.decision.regions[0].peak == pytest.approx(anomaly.max(), rel=1e-6)
    about = json.loads((tmp_path / "scores.json").read_text())
    assert about["tile"] == {"size": 64, "overlap": 16} and about["maps"]["size"] == "as the image"


def test_command_line(checkpoint, folder, tmp_path):
    words = ["predict", checkpoint, folder, "--out", tmp_path, "--maps", "tiff16", "--tile", 96, "--overlap", 32]
    done = CliRunner().invoke(app, [str(w) for w in words])
    assert done.exit_code == 0, done.output
    about = json.loads((tmp_path / "scores.json").read_text())
    assert about["tile"] == {"size": 96, "overlap": 32} and about["calibration"] is None, "other tiles, other scores"
    lost = "its calibration is for tiles of 64 px that share 16 px, not for tiles of 96 px that share 32 px"
    assert lost in done.stderr
    refused = CliRunner().invoke(app, [*map(str, words), "--decide"])
    assert refused.exit_code == 2 and lost in refused.stderr
    assert tifffile.imread(tmp_path / "maps" / "a.tiff").shape == (150, 100)


@pytest.mark.parametrize("options, wanted", [
    (["--tile", 48], "tile: wanted at least 32 px and a multiple of it (the network's stride), got 48"),
    (["--tile", 16], "tile: wanted at least 32 px and a multiple of it (the network's stride), got 16"),
    (["--overlap", 64], "overlap: wanted from 0 to 63 px (tiles of 64 px), got 64"),
    (["--overlap", -1], "overlap: wanted from 0 to 63 px (tiles of 64 px), got -1"),
    (["--tile", 0], "wanted tiles for a detector that was trained on them (64 px, at the images' own scale), got 0"),
])  # fmt: skip
def test_wrong_tiles_leave_nothing(checkpoint, folder, tmp_path, options, wanted):
    assert wanted in fails("predict", checkpoint, folder, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options, got", [(["--tile", 64], "got 64 px"), (["--overlap", 8], "got an overlap of 8 px")])
def test_a_detector_of_whole_images_is_not_run_in_tiles(whole, folder, tmp_path, options, got):
    said = fails("predict", whole, folder, "--out", tmp_path / "out", *options)
    assert "wanted none for a detector that was trained on whole images resized to 64 x 64 px" in said and got in said
    assert not (tmp_path / "out").exists()


def test_tiles_are_for_checkpoints(monkeypatch, tmp_path):
    monkeypatch.setitem(OPENERS, ".other", lambda path, device: "opened")
    assert open_detector(tmp_path / "a.other") == "opened"
    with pytest.raises(ValueError, match="wanted a checkpoint where tile or overlap is given, got a file of another"):
        open_detector(tmp_path / "a.other", tile=64)


def test_output_that_cannot_be_written(checkpoint, folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in fails("predict", checkpoint, folder, "--out", tmp_path / "file" / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    report = predict(checkpoint, [folder], tmp_path / "out", maps="tiff32", overlays=False, device="cpu")
    assert len(report.incomplete) == len(report.predictions) == 3  # the scores are whole
    assert "a.tiff: could not be written (No space left on device): wanted" in report.incomplete[0]
    assert not list((tmp_path / "out").rglob("*.tiff"))


CHILD = """
import sys
from pathlib import Path
import numpy as np
import torch
from recontrast.app.prediction import predict as module
from recontrast.distances import point_distances
from recontrast.inference import tiling
from recontrast.recipes.recipe import Recipe

torch.set_num_threads(1)


class Network(torch.nn.Module):  # as quick as can be: what is measured is what lies around the network
    stride, mean, std, frozen = 32, (0.5,) * 3, (0.5,) * 3, None

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def map_sizes(self, size):
        return [(size[0] // 16, size[1] // 16)]

    align_corners = True

    def distances(self, images, views):
        features = torch.nn.functional.avg_pool2d(images, 16)
        return point_distances([(features, features.flip(1))]), None


class Detector:
    recipe = Recipe(tile=512, score=0.001)
    calibration, calibration_note, category, max_map_value, overlap = None, None, "large", 2.0, 64
    model = Network()

    def run(self, files, batch):
        return tiling.infer_tiled(self.model, files, self.recipe, self.overlap, batch)


status = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
before = status()
report = module.predict(Detector(), [Path(sys.argv[1])], Path(sys.argv[2]), maps=sys.argv[3], batch=4)
print(before, status(), report.predictions[0].score)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_is_bounded_by_image_and_map(tmp_path):
    """25 megapixels: 75 MB decoded and 100 MB of map; PIL holds 100 MB while it decodes."""
    random = np.random.default_rng(0)
    pixels = np.tile(random.integers(0, 256, (500, 500, 3), np.uint8), (10, 10, 1))
    Image.fromarray(pixels).save(tmp_path / "large.tif")
    del pixels
    run = [sys.executable, "-c", CHILD, str(tmp_path / "large.tif"), str(tmp_path / "out"), "tiff32"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    before, most, score = map(float, done.stdout.split())
    assert most - before < 500, f"{most - before:.0f} MB beyond the {before:.0f} MB of an idle process"
    anomaly = tifffile.imread(tmp_path / "out/maps/large.tiff")
    assert anomaly.shape == (5000, 5000)
    assert np.sort(anomaly.ravel())[-25000:].mean(dtype=np.float64) == pytest.approx(score, rel=1e-6)
