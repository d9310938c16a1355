"""Exported detectors of tiles with a region of interest: the scores, maps and decisions of the checkpoint.

The masks of tiles are an input of the graph, so that one file takes every region.
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import call, fails, works
from exported_tiles import KINDS, compare, export_all, predict, write_photographs
from PIL import Image
from saved_model import draw, save
from tensorrt_operators import check_supported
from test_without_torch import call_without
from tiny import tiny_set

import recontrast
from recontrast.anomaly_map import AnomalyMap
from recontrast.data.roi import EACH, decode_mask, encode_mask
from recontrast.export.tile_region import TileRegion
from recontrast.export.verify import draw_masks
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.inference.infer import infer
from recontrast.inside import build_pooling_matrix, pool_inside, score_inside
from recontrast.recipes.recipe import Recipe

# Tiles lie at 0, 24 and 43 of 75 rows, and at 0 and 18 of 50 columns.
REGION = np.zeros((75, 50), bool)
REGION[5:50, 20:47] = True
REGION[60:64, 30:41] = True
REGION[25:30, 22:40] = False
RECIPE = Recipe(
    backbone="test_resnet", weights="random", size=32, tile=32, encoder_bn="eval", levels=2, score=0.02,
    roi=encode_mask(REGION),
)  # fmt: skip
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*"),
    pytest.mark.filterwarnings("ignore:.*seem to show one scene:recontrast.data.listing.DataWarning"),
    pytest.mark.filterwarnings("ignore:.*the mask of .* is resized"),
]


def draw_regions():
    """Regions by name: in one tile alone, of one pixel, of all pixels, thin, and scattered."""
    regions = {name: np.zeros((75, 50), bool) for name in ("one tile", "one pixel", "all", "thin", "scattered")}
    regions["one tile"][2:20, 3:16] = True
    regions["one pixel"][70, 48] = True
    regions["all"][:] = True
    regions["thin"][:, 33] = True
    regions["scattered"] = np.random.default_rng(5).random((75, 50)) < 0.03
    return regions


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Images of the region's aspect ratio: larger than a tile, smaller in one direction and in both."""
    sizes = [(75, 50), (150, 101), (45, 30), (9, 6), (113, 75)]
    return write_photographs(tmp_path_factory.mktemp("photographs"), sizes)


@pytest.fixture(scope="module")
def files(photographs, tmp_path_factory):
    """Folder of a checkpoint and its file in each format, see `export_all`."""
    return export_all(tmp_path_factory.mktemp("files"), RECIPE, photographs, [photographs / "1.png"])


def test_predictions_equal_those_of_the_checkpoint(files, photographs, tmp_path):
    wanted = predict(files / "checkpoint.pt", photographs, tmp_path / "wanted")
    assert {row["decision"] for row in wanted[0]} == {"good", "defect"}
    assert not wanted[1]["0.npy"][~REGION].any() and wanted[1]["0.npy"][REGION].all()
    for suffix in KINDS.values():
        compare(predict(files / f"tiles{suffix}", photographs, tmp_path / suffix), wanted)
    done = call_without("predict", files / "tiles.onnx", photographs, "--out", tmp_path / "without")
    assert done.returncode == 0, done.stderr
    ours, theirs = ((tmp_path / name / "scores.csv").read_text() for name in ("without", ".onnx"))
    assert ours == theirs


@pytest.mark.parametrize("suffix", KINDS.values())
def test_file_takes_other_regions(suffix, files, photographs):
    for name, region in draw_regions().items():
        if suffix != ".onnx" and name not in ("one tile", "scattered"):
            continue
        detector, own = (
            recontrast.load(files / file, "cpu", roi=region) for file in (f"tiles{suffix}", "checkpoint.pt")
        )
        assert detector.calibration is None and detector.recipe == own.recipe != detector.stored_recipe
        assert detector.calibration_note.partition(":")[2] == own.calibration_note.partition(":")[2]
        for got, wanted in zip(detector.predict(photographs), own.predict(photographs), strict=True):
            assert got.score == pytest.approx(wanted.score, rel=1e-4) and got.decision is None
            np.testing.assert_allclose(got.anomaly_map, wanted.anomaly_map, rtol=1e-4, atol=1e-5)
    assert recontrast.load(files / f"tiles{suffix}", roi=REGION).calibration is not None  # the same one


def test_other_region_on_the_command_line(files, photographs, tmp_path):
    """A mask, and a folder with one for each image: as with the checkpoint, and no calibration holds for them."""
    Image.fromarray(~REGION).convert("L").save(tmp_path / "other.png")
    masks = draw_masks(sorted(photographs.iterdir()), RECIPE.roi)
    (tmp_path / "each").mkdir()
    for mask in masks.values():
        mask.rename(tmp_path / "each" / mask.name)
    for name in ("other.png", "each"):
        wanted, got = (
            predict(files / file, photographs, tmp_path / f"{name} of {file}", "--roi", tmp_path / name)
            for file in ("checkpoint.pt", "tiles.onnx")
        )
        compare(got, wanted)
        assert not any(row.get("decision") for row in got[0])
    words = ("predict", files / "tiles.onnx", photographs, "--roi", tmp_path / "other.png")
    assert "its calibration is for another region of interest" in call(*words, "--out", tmp_path / "p").output
    assert "calibration is for another region" in fails(*words, "--out", tmp_path / "q", "--decide")
    done = call_without(*words, "--out", tmp_path / "without")
    assert done.returncode == 0, done.stderr
    good = draw(tmp_path / "good", 9, seed=7)
    with pytest.raises(ValueError, match=r"wanted one with the region of interest of its checkpoint or file"):
        recontrast.calibrate(recontrast.load(files / "tiles.onnx", roi=~REGION), good, false_alarm_rate=0.2)


def test_tiles_outside_are_not_computed(files, monkeypatch):
    detector = ExportedDetector(files / "tiles.onnx", roi=draw_regions()["one tile"])
    run, counts = detector.program, []

    def count(images, inside):
        assert inside.any(axis=(1, 2)).all()
        counts.append(len(images))
        return run(images, inside)

    detector.program = count
    detector.predict(np.zeros((75, 50, 3), np.uint8))
    assert sum(counts) == 1


def test_lines_of_the_guide_give_the_scores_of_predict(files, photographs, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/export.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "tiles.onnx" in block]
    shutil.copy(files / "tiles.onnx", tmp_path)
    paths = sorted(map(str, photographs.iterdir()))
    done = subprocess.run([sys.executable, "-c", block, *paths], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    predictions = recontrast.load(files / "checkpoint.pt", device="cpu").predict(paths)
    for line, path, prediction in zip(done.stdout.splitlines(), paths, predictions, strict=True):
        largest = prediction.anomaly_map.max()  # what the lines print, the score "max"
        assert line.startswith(f"{path} ") and float(line.split()[-1]) == pytest.approx(largest, rel=1e-4)


def test_evaluation_equals_that_of_the_checkpoint(files, tmp_path):
    tiny_set(tmp_path / "data")
    other = np.zeros((64, 64), bool)
    other[10:50, 5:61] = True
    ours, theirs = (
        recontrast.evaluate(recontrast.load(files / name, "cpu", roi=other), tmp_path / "data", batch=4)
        for name in ("tiles.onnx", "checkpoint.pt")
    )
    wanted = asdict(theirs.mean)
    assert wanted["p_auroc"] is not None and ours.roi == theirs.roi
    for name, value in asdict(ours.mean).items():
        if isinstance(value, float):
            assert value == pytest.approx(wanted[name], abs=1e-3), name
    for ours_scored, theirs_scored in zip(ours.scored, theirs.scored, strict=True):
        assert ours_scored.score == pytest.approx(theirs_scored.score, rel=1e-4)
    Image.fromarray(other).convert("L").save(tmp_path / "other.png")
    output = call("evaluate", files / "tiles.onnx", tmp_path / "data", "--roi", tmp_path / "other.png",
                  "--out", tmp_path / "e").output  # fmt: skip
    assert "warning" in output and "its calibration is for another region of interest" in output
    assert json.loads((tmp_path / "e/results.json").read_text())["rows"][0]["p_auroc"] == pytest.approx(
        wanted["p_auroc"], abs=1e-3
    )


@pytest.mark.parametrize("suffix", KINDS.values())
def test_file_is_calibrated_on_its_own_scores(suffix, files, tmp_path):
    path = tmp_path / f"d{suffix}"
    for part in {suffix, suffix.replace("xml", "bin")}:
        path.with_suffix(part).write_bytes((files / f"tiles{part}").read_bytes())
    good, random = tmp_path / "good", np.random.default_rng(7)
    good.mkdir()
    for index in range(9):
        pixels = 110 + random.normal(0, 30, (75, 50, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(good / f"{index}.png")
    works("calibrate", path, "--good", good, "--false-alarm-rate", 0.2)
    detector = ExportedDetector(path)
    assert detector.overlap == 8 and detector.has_masks and detector.recipe == RECIPE
    assert detector.calibration.rate == 0.2 and list(detector.program.description["calibration"]["scores"])
    assert detector.description["preprocessing"]["inside"].startswith("bool (N, 32, 32): ")
    scores = sorted(prediction.score for prediction in detector.predict(good))
    np.testing.assert_allclose(sorted(detector.calibration.scores), scores, rtol=1e-6)
    shutil.copy(files / "checkpoint.pt", tmp_path)
    again = recontrast.calibrate(tmp_path / "checkpoint.pt", good, false_alarm_rate=0.2, device="cpu").calibration
    assert detector.calibration.threshold == pytest.approx(again.threshold, rel=1e-4)
    assert detector.calibration.pixel_threshold == pytest.approx(again.pixel_threshold, rel=1e-4)


def test_number_of_tiles_in_a_call_can_be_fixed(files, photographs, tmp_path):
    works("export", files / "checkpoint.pt", "--format", "onnx", "--input-batch", 3, "--out", tmp_path / "d.onnx")
    detector = ExportedDetector(tmp_path / "d.onnx")
    wanted = recontrast.load(files / "checkpoint.pt", "cpu").predict(photographs).scores
    np.testing.assert_allclose(detector.predict(photographs).scores, wanted, rtol=1e-4)


def test_onnx_file_is_in_what_tensorrt_supports(files):
    check_supported(files / "tiles.onnx")


def test_scores_of_tiles_are_those_of_the_checkpoint(files):
    random = np.random.default_rng(3)
    tiles = random.integers(0, 256, (4, 32, 32, 3), np.uint8)
    masks = random.random((4, 32, 32)) < np.array([0.5, 0.02, 1, 0.9])[:, None, None]
    own = recontrast.load(files / "checkpoint.pt", "cpu")
    ((maps, scores),) = infer(own.model, tiles, own.recipe, rois=masks)
    for suffix in KINDS.values():
        got = ExportedDetector(files / f"tiles{suffix}").score(tiles, masks)
        np.testing.assert_allclose(got[0], maps, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(got[1], scores, rtol=1e-4)


def test_images_of_another_shape_are_refused(files, tmp_path):
    Image.new("RGB", (75, 50)).save(tmp_path / "wide.png")
    for name in ("tiles.onnx", "checkpoint.pt"):
        with pytest.raises(ValueError, match=r"roi: wanted a mask of the size of .*wide.png"):
            recontrast.load(files / name, "cpu").predict(tmp_path / "wide.png")
    message = fails("export", files / "checkpoint.pt", "--format", "onnx", "--out", tmp_path / "d.onnx", "--images",
                    tmp_path / "wide.png")  # fmt: skip
    assert "wide.png" in message and not (tmp_path / "d.onnx").exists()


def test_refusals(tmp_path):
    each = save(tmp_path / "checkpoint.pt", RECIPE.replace(roi=EACH))
    message = fails("export", each, "--format", "onnx", "--out", tmp_path / "d.onnx")
    assert "wanted a detector with one region of interest to export, got one with a mask for each image" in message
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("how", ["max", "mean", 0.001, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("out", [(32, 32), (30, 47)])
def test_graph_weighs_and_scores_as_the_map_does(out, how):
    """Also where points divide the pixels unevenly, and where a map is not finite."""
    random = torch.Generator().manual_seed(0)
    amap = AnomalyMap([(8, 8), (5, 7)], out, method="matmul")
    inside = torch.rand(7, *out, generator=random) < torch.tensor([0, 0.002, 0.05, 0.3, 0.7, 1, 0.5])[:, None, None]
    region = TileRegion(amap, how)
    for ours, theirs in zip(region.weigh(inside), amap.weigh_inside(inside), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)
    maps = torch.where(inside, torch.rand(7, *out, generator=random) - 0.1, 0)
    maps[6, 3:9, 3:9][inside[6, 3:9, 3:9]] = torch.nan
    torch.testing.assert_close(region.score(maps, inside), score_inside(maps, inside, how), equal_nan=True)


def test_pooling_by_products_is_that_of_cells():
    random = torch.Generator().manual_seed(1)
    for height, width, h, w in ((32, 32, 8, 4), (30, 47, 7, 5), (9, 5, 9, 5), (7, 13, 1, 13), (5, 6, 8, 7)):
        inside = torch.rand(3, height, width, generator=random) < 0.1
        down, across = build_pooling_matrix(height, h), build_pooling_matrix(width, w)
        assert torch.equal((down @ inside.float() @ across.mT) > 0, pool_inside(inside, (h, w)))


def test_drawn_masks(tmp_path):
    """In turn half an ellipse and the region of the recipe, which leaves no pixel of a small image."""
    paths = []
    for index, shape in enumerate([(40, 60), (75, 50), (1, 1), (2, 3)]):
        paths.append(tmp_path / f"{index}.png")
        Image.new("RGB", shape[::-1]).save(paths[-1])
    masks = [np.asarray(Image.open(path)) > 0 for path in draw_masks(paths, RECIPE.roi).values()]
    assert masks[0].shape == (40, 60) and 0.2 < masks[0].mean() < 0.8
    np.testing.assert_array_equal(masks[1], decode_mask(RECIPE.roi))
    assert all(mask.any() for mask in masks)
