"""Detectors of tiles of parts with several views: each view is cut into tiles, and the maps of the views are joined."""

import json

import numpy as np
import pytest
from command_line import fails, works
from part_views import PATCHCORE, PATTERN, write_set
from PIL import Image

import recontrast
from recontrast import checkpoint as checkpoints
from recontrast.data.cache import ImageCache
from recontrast.data.tiles import PartTiles, Tiles
from recontrast.data.views import Views

TILES = ["--tile", 32, "--set", "stride=16"]


@pytest.fixture(scope="module", params=[PATTERN, "pages"], ids=["files", "pages"])
def run(request, tmp_path_factory):
    """A calibrated run on tiles; of pages, maps are means in a region of interest."""
    root = tmp_path_factory.mktemp("tiles")
    pages = request.param == "pages"
    write_set(root / "nut", pages)
    options = ["--views-from", request.param, *PATCHCORE, *TILES, "--holdout", 0.4]
    if pages:
        mask = np.zeros((64, 64), np.uint8)
        mask[:, :40] = 255
        Image.fromarray(mask).save(root / "roi.png")
        options += ["--set", "view_map=mean", "--roi", root / "roi.png"]
    works("train", root / "nut", "--out", root / "run", *options)
    return root


def test_training_learns_the_tiles_of_all_views(run):
    saved = checkpoints.load(run / "run/checkpoint.pt")
    assert saved.images["count"] == 7 * 2 * 9 and len(saved.images["each"]) == 7 * 16  # tiles, and parts
    assert saved.calibration.count == 5 and len(saved.calibration.appearance) == 5
    text = fails("calibrate", run / "run", "--good", run / "nut/train/good", "--false-alarm-rate", 0.1)
    assert "got 7 of 12 that were" in text  # parts are known by the tiles of all views


def test_map_of_a_part_joins_the_maps_of_its_views(run, tmp_path):
    detector, single = (recontrast.load(run / "run", "cpu") for _ in range(2))
    recipe = detector.recipe
    single.recipe = recipe.of_single_images
    pages = recipe.views_from == "pages"
    joined = detector.predict(run / "nut/test/square")
    assert len(joined) == 3
    for one in joined:
        views = recipe.image_views.read(tmp_path / one.name)
        maps = np.stack([prediction.anomaly_map for prediction in single.predict(list(views))])
        expected = maps.mean(0) if pages else maps.max(0)
        np.testing.assert_allclose(one.anomaly_map, expected, rtol=1e-5, atol=1e-7)
        assert one.score == pytest.approx(expected.max()) and one.anomaly_map.shape == (64, 64)
        assert one.decision is not None and (not pages or not one.anomaly_map[:, 40:].any())


def test_other_commands_count_parts(run, tmp_path):
    works("evaluate", run / "run", run / "nut", "--out", tmp_path / "e", "--save-maps", "--device", "cpu")
    (row,) = [r for r in json.loads((tmp_path / "e/results.json").read_text())["rows"] if r["category"] == "nut"]
    assert (row["images"], row["defects"]) == (6, 3) and row["p_auroc"] > 0.9
    assert "6 parts scored" in works("predict", run / "run", run / "nut/test", "--out", tmp_path / "p",
                                      "--device", "cpu")  # fmt: skip
    works("report", run / "run", run / "nut", "--out", tmp_path / "report.html", "--device", "cpu")


def test_exported_tiles_score_parts_as_the_checkpoint_does(run, tmp_path):
    pytest.importorskip("onnxruntime")
    words = ["export", run / "run", "--format", "onnx", "--out", tmp_path / "nut.onnx"]
    works(*words, "--images", run / "nut/test/good")
    wanted, got = (
        recontrast.load(path, "cpu").predict(run / "nut/test") for path in (run / "run", tmp_path / "nut.onnx")
    )
    for one, other in zip(wanted, got, strict=True):
        np.testing.assert_allclose(other.anomaly_map, one.anomaly_map, rtol=1e-4, atol=1e-5)
        assert other.score == pytest.approx(one.score, rel=1e-4) and other.decision == one.decision


def test_tiles_of_parts(tmp_path):
    rng = np.random.default_rng(0)
    views = rng.integers(0, 255, (2, 40, 24, 3), dtype=np.uint8)
    for name, view in zip("ab", views, strict=True):
        Image.fromarray(view).save(tmp_path / f"1_{name}.png")
    source = Views(r"_(a|b)\.", ("a", "b"))
    cache = ImageCache([tmp_path / "1_a.png"], 16, tile=16, stride=8, views=source)
    expected = np.concatenate([Tiles(view, 16, 8)[range(8)] for view in views])
    np.testing.assert_array_equal(cache[:], expected)
    np.testing.assert_array_equal(PartTiles(views, 16, 8)[range(16)], expected)
    np.testing.assert_array_equal(list(cache.read_views(0)), views)
    assert len(PartTiles(views, 16, 8)) == len(cache) == 16
