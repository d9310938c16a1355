import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from saved_model import RECIPE, save

from recontrast.app.prediction.predict import predict
from recontrast.data import atomic, heatmaps
from recontrast.data.image_files import assign_result_names
from recontrast.inference.detector import map_extent


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def noise(path, *size, seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, np.uint8)).save(path, **options)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "checkpoint.pt", RECIPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    noise(root / "one.png", 40, 70, 3)
    noise(root / "one.jpg", 64, 64, seed=1)
    noise(root / "below" / "one.png", 64, 64, seed=2)
    noise(root / "below" / "two.tif", 128, 100, seed=3)
    return root


@pytest.fixture(scope="module")
def run(checkpoint, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, predict(checkpoint, [folder], out, maps="tiff16", threshold=0.5, batch=3, device="cpu")


def test_every_file_has_its_own_results(run):
    out, report = run
    assert not report.unread
    written = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    names = ["below/one", "below/two", "one.jpg", "one.png"]
    assert written == sorted(
        [f"maps/{n}.tiff" for n in names] + [f"overlays/{n}.png" for n in names] + ["scores.csv", "scores.json"]
    )
    for found in report.predictions:
        assert (out / found.map).is_file() and (out / found.overlay).is_file()


def test_csv_and_json_say_the_same(run, folder):
    out, report = run
    rows = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    about = json.loads((out / "scores.json").read_text())
    assert [r["path"] for r in rows] == [i["path"] for i in about["images"]] == [p.path for p in report.predictions]
    assert {Path(r["path"]) for r in rows} == {p for p in folder.rglob("*") if p.is_file()}
    for row, image, found in zip(rows, about["images"], report.predictions, strict=True):
        assert float(row["score"]) == image["score"] == pytest.approx(found.score, rel=1e-8)
        assert bool(int(row["flagged"])) == image["flagged"] == (found.score >= 0.5)
    assert about["threshold"] == 0.5 and about["score"] == "max" and about["trained_on"] == "tile"
    assert about["maps"] == {"format": "tiff16", "size": [64, 64], "range": [0.0, 12.0], "scale": 12 / 65535}


def test_maps_hold_the_scores(run, checkpoint, folder, tmp_path):
    out, report = run
    exact = predict(checkpoint, [folder], tmp_path, maps="npy", overlays=False)
    floats = predict(checkpoint, [folder], tmp_path / "32", maps="tiff32", overlays=False)
    for coarse, fine, middle in zip(report.predictions, exact.predictions, floats.predictions, strict=True):
        anomaly = np.load(tmp_path / fine.map)
        assert anomaly.dtype == np.float32 and anomaly.shape == (64, 64)
        assert anomaly.max() == pytest.approx(fine.score, rel=1e-6)
        stored = pixels(out / coarse.map)
        assert stored.dtype == np.uint16
        np.testing.assert_allclose(stored * (12 / 65535), anomaly, atol=12 / 65535 * 0.51 + 1e-5)
        np.testing.assert_array_equal(pixels(tmp_path / "32" / middle.map), anomaly)
        assert fine.overlay is None and fine.flagged is None
    assert not (tmp_path / "overlays").exists()


def test_scores_do_not_depend_on_batch_or_company(run, checkpoint, folder, tmp_path):
    alone = predict(checkpoint, [folder / "below" / "two.tif"], tmp_path, batch=1)
    (same,) = [p for p in run[1].predictions if p.path.endswith("two.tif")]
    assert alone.predictions[0].score == pytest.approx(same.score, rel=1e-5)
    assert (tmp_path / "overlays" / "two.png").is_file()


def test_overlays_have_the_size_of_the_original(run):
    out, _ = run
    assert pixels(out / "overlays" / "one.png.png").shape == (40, 70, 3)
    assert pixels(out / "overlays" / "below" / "two.png").shape == (128, 100, 3)
    low, high = json.loads((out / "scores.json").read_text())["overlay_range"]
    assert 0 <= low < high


def test_one_bad_file_among_many(checkpoint, folder, tmp_path):
    whole = noise(tmp_path / "in" / "whole.png", 64, 64)
    cut = tmp_path / "in" / "cut.png"
    cut.write_bytes(whole.read_bytes()[:900])
    (tmp_path / "in" / "text.png").write_text("no image")
    report = predict(checkpoint, [tmp_path / "in"], tmp_path / "out", maps="npy")
    assert [Path(found.path).name for found in report.predictions] == ["whole.png"]
    assert [Path(text.split(":")[0]).name for text in report.unread] == ["cut.png", "text.png"]
    assert all("wanted" in text and "\n" not in text for text in report.unread)
    assert sorted(p.name for p in (tmp_path / "out").rglob("*.*")) == [
        "scores.csv",
        "scores.json",
        "whole.npy",
        "whole.png",
    ]
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["unread"] == report.unread


def test_nothing_readable(checkpoint, tmp_path):
    (tmp_path / "in.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 1 images could be read: .*in\.png.* got an empty file"):
        predict(checkpoint, [tmp_path / "in.png"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values, message", [({"maps": "gif"}, "maps: .* got 'gif'"), ({"batch": 0}, "batch: .* got 0")]
)
def test_wrong_options(checkpoint, folder, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        predict(checkpoint, [folder], tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_disk_full(checkpoint, folder, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(atomic.os, "replace", full)
    with pytest.raises(OSError, match=r"cannot write .*out: No space left on device"):
        predict(checkpoint, [folder], tmp_path / "out", maps="npy")
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


def test_result_names():
    def names(*paths):
        return [name.as_posix() for name in assign_result_names([Path(path) for path in paths])]

    assert names("/a/x.png") == ["x"]
    assert names("/a/b/x.png", "/a/c/x.png", "/a/y.png") == ["b/x", "c/x", "y"]
    assert names("/a/x.png", "/a/x.jpg", "/a/y.jpg") == ["x.png", "x.jpg", "y"]
    assert names("/a/x.png", "/a/x.jpg", "/a/x.png.png") == ["x.png", "x.jpg", "x.png.png"]
    assert names("a/x.png", "./b/../b/x.png") == ["a/x", "b/x"]


def test_covered():
    recipe = RECIPE.replace(size=256, crop=224)
    assert map_extent((256, 256), recipe) == (16, 16, 224, 224)
    assert map_extent((512, 1024), recipe) == (32, 64, 448, 896)
    assert map_extent((1, 1), recipe) == (0, 0, 1, 1)
    assert map_extent((100, 300), RECIPE) == (0, 0, 100, 300)
    for height in range(1, 40):
        top, _, covers, _ = map_extent((height, 7), recipe)
        assert 0 <= top and covers >= 1 and top + covers <= height


def test_range_puts_the_threshold_in_the_middle():
    medians, peaks = [1.5, 5.5, 9.5], [3.0, 7.0, 11.0]
    assert heatmaps.colour_range(medians, peaks, None) == (5.5, 11)
    assert heatmaps.colour_range(medians, peaks, 7.0) == (5.5, 8.5)
    assert heatmaps.colour_range(medians, peaks, 1.0) == (5.5, 11)  # a threshold below the median sets no range


# ---- pictures ----------------------------------------------------------------


def test_colours_rise_evenly_in_lightness():
    table = heatmaps.colourise(np.linspace(0, 1, 256))
    assert table.shape == (256, 3) and table.dtype == np.uint8
    linear = np.where(table / 255 <= 0.04045, table / 255 / 12.92, ((table / 255 + 0.055) / 1.055) ** 2.4)
    y = linear @ [0.2126, 0.7152, 0.0722]
    lightness = np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)
    assert lightness[0] < 5 and lightness[-1] > 95
    assert (np.diff(lightness[::16]) > 2).all()
    np.testing.assert_array_equal(heatmaps.colourise(np.array([-1, np.nan, 2])), table[[0, 255, 255]])


def test_overlay_leaves_the_cold_and_covers_the_hot():
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 1), np.uint8).repeat(3, -1)
    np.testing.assert_array_equal(heatmaps.draw_overlay(image, np.zeros((8, 9))), image)
    hot = heatmaps.draw_overlay(image, np.ones((8, 9))).astype(int)
    assert (np.abs(hot - heatmaps.colourise(np.ones(1))) <= (1 - heatmaps.MAX_OPACITY) * 256).all()
    assert hot.std(axis=(0, 1)).min() > 5  # the picture shows through


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "file"
    with atomic.replace_file(path) as file:
        file.write(b"first")
    with pytest.raises(RuntimeError), atomic.replace_file(path) as file:
        file.write(b"sec")
        raise RuntimeError
    assert path.read_bytes() == b"first" and list(path.parent.iterdir()) == [path]
    with (
        pytest.raises(OSError, match=f"cannot write {path / 'below'}: (Not a directory|File exists)"),
        atomic.replace_file(path / "below"),
    ):
        pass
