"""Exported detectors of tiles: the scores, maps and decisions of the checkpoint, in every format and command."""

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from command_line import fails, works
from exported_tiles import KINDS, compare, export_all, predict, write_photographs
from PIL import Image
from saved_model import draw
from test_without_torch import call_without
from tiny import tiny_set

import recontrast
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.recipes.recipe import Recipe

RECIPE = Recipe(backbone="test_resnet", weights="random", size=32, tile=32, encoder_bn="eval", levels=2)
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*"),
    pytest.mark.filterwarnings("ignore:.*seem to show one scene:recontrast.data.listing.DataWarning"),
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Images larger than a tile, of a tile, smaller in one and in both directions."""
    sizes = [(75, 50), (32, 32), (20, 70), (9, 5), (64, 64)]
    return write_photographs(tmp_path_factory.mktemp("photographs"), sizes)


@pytest.fixture(scope="module")
def files(photographs, tmp_path_factory):
    """Folder of a checkpoint and its file in each format, see `export_all`."""
    return export_all(tmp_path_factory.mktemp("files"), RECIPE, photographs)


def test_a_fixed_number_of_tiles_is_filled_with_tiles(files, photographs):
    """Calls of fewer tiles than the program takes would be filled up with copies."""
    detector, sizes = ExportedDetector(files / "tiles.onnx"), []
    program, pixels = detector.program, np.asarray(Image.open(photographs / "0.png"))
    wanted, score = detector.score_tiled(pixels, 2, release=False)
    detector.program = lambda *inputs: (sizes.append(len(inputs[0])), program(*inputs))[1]
    detector.input_batch = 4
    got = detector.score_tiled(pixels, 2, release=False)
    np.testing.assert_allclose(got[0], wanted, rtol=1e-4, atol=1e-6)
    assert sizes == [4, 4] and got[1] == pytest.approx(score, rel=1e-4)  # for 6 tiles


def test_predictions_equal_those_of_the_checkpoint(files, photographs, tmp_path):
    wanted = predict(files / "checkpoint.pt", photographs, tmp_path / "wanted")
    assert {row["decision"] for row in wanted[0]} == {"good", "defect"}
    for suffix in KINDS.values():
        compare(predict(files / f"tiles{suffix}", photographs, tmp_path / suffix), wanted)
    done = call_without("predict", files / "tiles.onnx", photographs, "--out", tmp_path / "without")
    assert done.returncode == 0, done.stderr
    ours, theirs = ((tmp_path / name / "scores.csv").read_text() for name in ("without", ".onnx"))
    assert ours == theirs


def test_lines_of_the_guide_give_the_scores_of_predict(files, photographs, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/export.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "tiles.onnx" in block]
    (tmp_path / "tiles.onnx").write_bytes((files / "tiles.onnx").read_bytes())
    paths = sorted(map(str, photographs.iterdir()))
    done = subprocess.run([sys.executable, "-c", block, *paths], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = recontrast.load(files / "checkpoint.pt", device="cpu").predict(paths).scores
    for line, path, score in zip(done.stdout.splitlines(), paths, scores, strict=True):
        assert line.startswith(f"{path} ") and float(line.split()[-1]) == pytest.approx(score, rel=1e-4)


def test_evaluation_equals_that_of_the_checkpoint(files, tmp_path):
    tiny_set(tmp_path / "data")
    ours, theirs = (recontrast.evaluate(files / name, tmp_path / "data", device="cpu", batch=4)
                    for name in ("tiles.onnx", "checkpoint.pt"))  # fmt: skip
    wanted = asdict(theirs.mean)
    assert wanted["p_auroc"] is not None
    for name, value in asdict(ours.mean).items():
        if isinstance(value, float):
            assert value == pytest.approx(wanted[name], abs=1e-3), name
    for ours_scored, theirs_scored in zip(ours.scored, theirs.scored, strict=True):
        assert ours_scored.score == pytest.approx(theirs_scored.score, rel=1e-4)


@pytest.mark.parametrize("suffix", KINDS.values())
def test_file_is_calibrated_on_its_own_scores(suffix, files, tmp_path):
    path = tmp_path / f"d{suffix}"
    for part in {suffix, suffix.replace("xml", "bin")}:
        path.with_suffix(part).write_bytes((files / f"tiles{part}").read_bytes())
    good = draw(tmp_path / "good", 9, seed=7, spread=30.0)
    works("calibrate", path, "--good", good, "--false-alarm-rate", 0.2)
    detector = ExportedDetector(path)
    assert detector.overlap == 8 and "32 px tiles" in repr(detector)
    assert detector.calibration.rate == 0.2 and list(detector.program.description["calibration"]["scores"])
    scores = sorted(prediction.score for prediction in detector.predict(good))
    np.testing.assert_allclose(sorted(detector.calibration.scores), scores, rtol=1e-6)


def test_refusals(files, tmp_path):
    with pytest.raises(ValueError, match=r"roi: wanted none for an exported file of tiles without a region, got one"):
        recontrast.load(files / "tiles.onnx", roi=np.ones((9, 9), bool))
    images = draw(tmp_path / "images", 1, seed=1)
    message = fails("predict", files / "tiles.onnx", images, "--out", tmp_path / "out", "--tile", 64)
    assert "wanted a checkpoint where tile or overlap is given" in message
