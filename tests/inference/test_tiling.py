"""Tiles, their weights, blended maps, and the files that large maps are written to."""

import os
import shutil

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from recontrast import checkpoint as checkpoints
from recontrast import metrics
from recontrast.anomaly_map import AnomalyMap
from recontrast.data import datasets, heatmaps, images, large_maps
from recontrast.data.cache import ImageCache
from recontrast.data.tiles import Tiles, count_tiles, tile_starts, tile_weights
from recontrast.evaluation.evaluate import evaluate
from recontrast.inference.infer import infer
from recontrast.inference.tiling import score_map, score_tiled_image
from recontrast.recipes.recipe import Recipe
from recontrast.training.train import build_model, train

RECIPE = Recipe(backbone="test_resnet", weights="random", tile=64, encoder_bn="eval", steps=2, batch=4)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(RECIPE, "tile").eval()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 70), st.data())
def test_tiles_cover_and_weights_add_up_to_one(length, tile, data):
    overlap = data.draw(st.integers(0, tile - 1))
    first, each = tile_weights(length, tile, overlap)
    assert first == tile_starts(length, tile, tile - overlap) == sorted(set(first))
    assert first[-1] + tile == max(length, tile) and (each > 0).all()
    total = np.zeros(max(length, tile))
    for start, window in zip(first, each, strict=True):
        total[start : start + tile] += window
    np.testing.assert_allclose(total, 1, rtol=2e-7)


def test_weights_are_smallest_at_the_border_of_a_tile():
    _, each = tile_weights(1000, 256, 64)
    assert (each[0][:192] == 1).all() and each[0][-1] < 2e-4 and each[1][0] < 2e-4
    assert each[1][32] == pytest.approx(0.5, abs=0.02)


def test_tiles_are_parts_of_the_image_and_small_images_are_mirrored():
    pixels = noise(100, 70, 3)
    tiles = Tiles(pixels, 32, 24)
    assert len(tiles) == count_tiles((100, 70), 32, 24) == 4 * 3
    for i, (y, x) in enumerate(tiles.corners):
        np.testing.assert_array_equal(tiles[[i]][0], pixels[y : y + 32, x : x + 32])
    assert tiles.corners[-1] == (68, 38)
    small = Tiles(noise(5, 40, 3), 32, 32)
    assert len(small) == 2 and small[[0]].shape == (1, 32, 32, 3)
    np.testing.assert_array_equal(small[[0]][0, 5:10], noise(5, 40, 3)[::-1, :32])


@pytest.mark.parametrize("tile, stride", [(0, 1), (8, 0), (8, 9)])
def test_wrong_tiles(tile, stride):
    with pytest.raises(ValueError, match=f"wanted a tile of at least 1 px .* got {tile} and {stride}"):
        tile_starts(20, tile, stride)


@pytest.mark.parametrize("overlap", [-1, 8, 9])
def test_wrong_overlap(overlap):
    with pytest.raises(ValueError, match=rf"overlap: wanted from 0 to 7 px .*, got {overlap}"):
        tile_weights(20, 8, overlap)


@pytest.mark.parametrize("where", [None, "cache"])
def test_cache_of_tiles(tmp_path, where):
    shapes = [(50, 40, 3), (20, 33, 3), (64, 64, 3)]
    files = [save(tmp_path / f"in/{i}.png", noise(*s, seed=i)) for i, s in enumerate(shapes)]
    directory = where and tmp_path / where
    progress = []
    cache = ImageCache(files, 8, directory=directory, tile=32, stride=24, on_progress=lambda *now: progress.append(now))
    tiles_by_file = [Tiles(images.read_image(f), 32, 24) for f in files]
    expected = np.concatenate([t[range(len(t))] for t in tiles_by_file])
    assert cache.shape == expected.shape and progress[-1] == (3, 3)
    np.testing.assert_array_equal(cache[:], expected)
    if directory:
        tilings = [{"tile": 32}, {"tile": 16, "stride": 8}, {}]
        paths = {ImageCache(files, 8, directory=directory, **tiling).path for tiling in tilings}
        assert len(paths | {cache.path}) == 4, "the cache file of each tiling must have its own name"
        assert ImageCache(files, 9, directory=directory, tile=32, stride=24).path == cache.path


def test_single_tile_equals_whole_image_and_no_overlap_gives_a_mosaic(model):
    pixels = noise(64, 64, 3)
    (whole,) = (maps for maps, _ in infer(model, pixels[None], RECIPE))
    np.testing.assert_allclose(score_tiled_image(model, pixels, RECIPE)[0], whole[0], rtol=1e-5)
    pixels = noise(128, 192, 3, seed=1)
    mosaic = score_tiled_image(model, pixels, RECIPE, overlap=0, batch=4)[0]
    (part,) = (maps for maps, _ in infer(model, pixels[None, 64:, 64:128], RECIPE))
    np.testing.assert_allclose(mosaic[64:, 64:128], part[0], rtol=1e-4, atol=1e-5)


def test_blended_map_is_the_weighted_sum_of_tiles_for_any_batch_size(model):
    pixels = noise(100, 150, 3, seed=2)
    blended = score_tiled_image(model, pixels, RECIPE, overlap=24, batch=5)[0]
    np.testing.assert_allclose(
        blended, score_tiled_image(model, pixels, RECIPE, overlap=24, batch=1)[0], rtol=1e-3, atol=1e-5
    )
    expected = np.zeros(pixels.shape[:2])
    (tops, rows), (lefts, columns) = tile_weights(100, 64, 24), tile_weights(150, 64, 24)
    for y, row in zip(tops, rows, strict=True):
        for x, column in zip(lefts, columns, strict=True):
            (maps,) = (m for m, _ in infer(model, pixels[None, y : y + 64, x : x + 64], RECIPE))
            expected[y : y + 64, x : x + 64] += maps[0].numpy() * np.outer(row, column)
    np.testing.assert_allclose(blended, expected, rtol=1e-3, atol=1e-5)


def test_image_smaller_than_a_tile_is_reflected(model):
    pixels = noise(40, 90, 3)
    mirrored = np.concatenate([pixels, pixels[::-1][:24]])
    np.testing.assert_allclose(
        score_tiled_image(model, pixels, RECIPE)[0], score_tiled_image(model, mirrored, RECIPE)[0][:40], rtol=1e-4
    )
    assert score_tiled_image(model, noise(1, 1, 3), RECIPE)[0].shape == (1, 1)


@pytest.mark.parametrize("tile, overlap, name", [(16, 0, "tile"), (80, 8, "tile"), (64, 64, "overlap"), (64, -1, "ov")])
def test_tile_and_overlap_must_suit_the_network(model, tile, overlap, name):
    with pytest.raises(ValueError, match=rf"^{name}.*wanted .* got {overlap if name[0] == 'o' else tile}"):
        score_tiled_image(model, noise(90, 90, 3), RECIPE.replace(tile=tile), overlap=overlap)[0]


def test_recipe_without_a_tile_is_refused(model):
    with pytest.raises(ValueError, match="wanted a recipe with a tile, got one of whole resized images"):
        score_tiled_image(model, noise(90, 90, 3), RECIPE.replace(tile=None))[0]


@pytest.mark.parametrize("rule", ["max", "mean", 1.0, 0.37, 0.01, 1e-9])
@pytest.mark.parametrize("ties", [False, True])
def test_score_equals_that_of_anomaly_map(rule, ties, monkeypatch):
    monkeypatch.setattr("recontrast.inference.blend.BLOCK_PIXELS", 500)
    values = torch.randn(1, 83, 61) if not ties else torch.randint(-3, 9, (1, 83, 61)).float()
    expected = AnomalyMap([8], 64).score(values.double(), rule)
    assert score_map(values[0].numpy(), rule) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kind", ["tiff16", "tiff32", "npy"])
@pytest.mark.parametrize("shape", [(700, 515), (3, 2)])
def test_maps_are_read_back(tmp_path, kind, shape):
    anomaly = np.random.default_rng(0).random(shape, np.float32) * 12
    path = tmp_path / "below" / "map"
    large_maps.save_map(path, anomaly, kind, 12.0)
    assert os.listdir(path.parent) == ["map"]
    if kind == "npy":
        return np.testing.assert_array_equal(np.load(path), anomaly)
    expected = anomaly if kind == "tiff32" else heatmaps.to_uint16(anomaly, 12.0)
    with tifffile.TiffFile(path) as file:
        assert file.pages[0].is_tiled and (file.pages[0].tilelength, file.pages[0].tilewidth) == (256, 256)
        np.testing.assert_array_equal(file.asarray(), expected)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("kind", ["tiff16", "tiff32", "npy"])
def test_disk_full(tmp_path, monkeypatch, kind):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(OSError, match=r"map.tiff: could not be written \(No space left on device\): wanted .* bytes"):
        large_maps.save_map(tmp_path / "map.tiff", np.zeros((300, 300), np.float32), kind, 1.0)
    assert os.listdir(tmp_path) == []


def test_missing_tifffile(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(ImportError, match=r"pip install tifffile"):
        large_maps.save_map(tmp_path / "map.tiff", np.zeros((3, 3), np.float32), "tiff16", 1.0)


def test_reduced_images():
    assert [large_maps.find_reduction(s, 100) for s in [(10, 10), (10, 11), (20, 20), (1, 1000), (21, 20)]] == [
        1,
        2,
        2,
        10,
        3,
    ]
    pixels, anomaly = noise(10, 7, 3), np.random.default_rng(1).random((10, 7), np.float32)
    small = large_maps.reduce_blocks(pixels, 4, "mean")
    assert small.shape == (3, 2, 3) and small.dtype == np.uint8
    np.testing.assert_array_equal(small[2, 1], np.rint(pixels[8:, 4:].mean((0, 1))))
    hot = large_maps.reduce_blocks(anomaly, 4, "max")
    assert hot.max() == anomaly.max() and hot[0, 1] == anomaly[:4, 4:].max()


def test_overlay_by_strips(monkeypatch):
    monkeypatch.setattr(large_maps, "STRIP_PIXELS", 100)
    pixels, anomaly = noise(40, 30, 3), np.random.default_rng(1).random((40, 30), np.float32)
    np.testing.assert_array_equal(large_maps.draw_overlay(pixels, anomaly), heatmaps.draw_overlay(pixels, anomaly))


@pytest.mark.parametrize("values, message", [
    ({"crop": 32}, r"crop: wanted none if tile is given \(64\), got 32"),
    ({"stride": 65}, r"stride: wanted at most tile \(64\), got 65"),
    ({"tile": None, "stride": 8}, r"stride: wanted at most tile \(None\), got 8"),
    ({"tile": 0}, "tile: wanted none or a whole number of pixels, got 0"),
])  # fmt: skip
def test_wrong_recipes(values, message):
    with pytest.raises(ValueError, match=message):
        RECIPE.replace(**values)


@pytest.fixture(scope="module")
def category(tmp_path_factory):
    """Category with images of several sizes and masks at the original size."""
    root = tmp_path_factory.mktemp("data") / "tile"
    for i, shape in enumerate([(64, 64, 3), (100, 70, 3), (50, 90, 3)]):
        save(root / f"train/good/{i}.png", noise(*shape, seed=i))
        save(root / f"test/good/{i}.png", noise(*shape, seed=10 + i))
        save(root / f"test/hole/{i}.png", noise(*shape, seed=20 + i))
        mask = np.zeros(shape[:2], np.uint8)
        mask[: 20 + i, 30:] = 255
        save(root / f"ground_truth/hole/{i}_mask.png", mask)
    return datasets.load(root)["tile"]


def test_training_on_tiles(category, tmp_path):
    recipe = RECIPE.replace(stride=32)
    result = train(recipe, category, out=tmp_path, device="cpu", cache_dir=tmp_path / "cache")
    assert len(result.losses) == 2
    stored = checkpoints.load(result.checkpoint)
    assert stored.recipe.tile == 64 and stored.preprocessing["size"] is None and stored.preprocessing["tile"] == 64
    expected_count = sum(count_tiles(images.image_size(s.path), 64, 32) for s in category if s.split == "train")
    assert stored.images["count"] == expected_count == 1 + 3 * 2 + 1 * 2
    with pytest.raises(ValueError, match=r"got another .*stride: 32 and None"):
        train(RECIPE, category, out=tmp_path, device="cpu", resume=result.checkpoint)


def test_invalid_tile_is_refused_before_a_file_is_written(category, tmp_path):
    with pytest.raises(ValueError, match=r"at least 32 px and multiples of it .* got 48x48"):
        train(RECIPE.replace(tile=48), category, out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def _aupro(maps, masks, limit=0.3):
    """AUPRO by its definition, for images with at most one region."""
    levels = -np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]

    def share(values):
        return np.searchsorted(np.sort(-values), levels, "right") / values.size

    rate = share(np.concatenate([m[~k] for m, k in zip(maps, masks, strict=True)]))
    overlap = np.mean([share(m[k]) for m, k in zip(maps, masks, strict=True) if k.any()], axis=0)
    x = np.append(0, np.append(rate[rate < limit], limit))
    y = np.append(0, np.append(overlap[rate < limit], np.interp(limit, rate, overlap)))
    return float(((x[1:] - x[:-1]) * (y[1:] + y[:-1])).sum() / 2 / limit)


def test_evaluation_uses_whole_maps_at_the_original_scale(category, model):
    result = evaluate(model, category, RECIPE, batch=3)
    tests = [s for s in category if s.split == "test"]
    maps = [score_tiled_image(model, images.read_image(s.path), RECIPE, batch=3)[0] for s in tests]
    masks = [
        np.zeros(m.shape, bool) if s.mask is None else images.read_mask(s.mask)
        for s, m in zip(tests, maps, strict=True)
    ]
    row = result.rows[0]
    flat = [np.concatenate([x.ravel() for x in group]) for group in (maps, masks)]
    assert row.p_auroc == pytest.approx(metrics.auroc(*flat), abs=row.bounds["p_auroc"] + 1e-9)
    assert row.p_ap == pytest.approx(metrics.ap(*flat), abs=row.bounds["p_ap"] + 1e-9)
    by_image = [metrics.aupro(m, k, mode="per-image") for m, k in zip(maps, masks, strict=True) if k.any()]
    assert row.aupro_per_image == pytest.approx(np.mean(by_image), abs=1e-6)
    assert [s.score for s in result.scored] == pytest.approx([float(m.max()) for m in maps], rel=1e-5)
    assert row.aupro == pytest.approx(_aupro(maps, masks), abs=row.bounds["aupro"] + 1e-6)
    assert "the size of the images, from tiles of 64 x 64 px" in result.to_markdown()
