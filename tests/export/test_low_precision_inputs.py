"""Files of less than float32 of detectors with a window, a region of interest or tiles: scores and decisions."""

import csv
import json

import numpy as np
import pytest
import tifffile
from command_line import works
from PIL import Image
from saved_model import save
from traced_once import traced_once

import recontrast
from recontrast.data.roi import encode_mask
from recontrast.export.quantize_samples import read_evenly
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.recipes.recipe import Recipe

REGION = np.zeros((60, 60), bool)
REGION[10:50, 5:30] = True
WINDOW = {"window": (8000.0, 11_000.0)}
RECIPE = Recipe(backbone="test_resnet", weights="random", size=32, encoder_bn="eval", levels=2)
# By name: what the detector has, and which files are written of it.
DETECTORS = {
    "window": RECIPE.replace(**WINDOW),
    "region": RECIPE.replace(roi=encode_mask(REGION)),
    "window and region": RECIPE.replace(roi=encode_mask(REGION), score=0.02, **WINDOW),
    "tiles": RECIPE.replace(tile=32),
    "tiles with a window": RECIPE.replace(tile=32, stride=24, **WINDOW),
    "tiles with a region": RECIPE.replace(tile=32, roi=encode_mask(REGION)),
    "tiles with a window and a region": RECIPE.replace(tile=32, stride=24, roi=encode_mask(REGION), **WINDOW),
}
ALL = [("onnx", "int8"), ("openvino", "int8"), ("onnx", "float16"), ("openvino", "float16"), ("openvino", "bfloat16")]
CASES = [("window", *case) for case in ALL]
CASES += [
    (name, *case) for name in ("region", "tiles", "tiles with a region") for case in (ALL[0], ALL[1], ALL[2], ALL[4])
]
CASES += [(name, *ALL[0]) for name in ("window and region", "tiles with a window", "tiles with a window and a region")]
SUFFIX = {"onnx": ".onnx", "openvino": ".xml"}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*"),
    pytest.mark.filterwarnings("ignore:.*seem to show one scene:recontrast.data.listing.DataWarning"),
]


def draw(folder, count, *, deep, seed):
    """Write images of 60 x 60 px, of 16 bits or 8, with more noise from one to the next."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        waves = np.sin(np.arange(60) / 3) + random.normal(0, 0.05 + 0.04 * index, (60, 60))
        if deep:
            tifffile.imwrite(folder / f"{index}.tif", (9500 + 600 * waves).clip(0, 65535).astype(np.uint16))
        else:
            Image.fromarray((120 + 50 * waves).clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folder of good images, by whether they have 16 bits."""
    root = tmp_path_factory.mktemp("images")
    return {deep: draw(root / str(deep), 12, deep=deep, seed=2) for deep in (False, True)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Checkpoint of each detector; each is traced once, in the order of `CASES`."""
    return {name: save(tmp_path_factory.mktemp("run") / "checkpoint.pt", recipe) for name, recipe in DETECTORS.items()}


@pytest.fixture(scope="module")
def graphs():
    """Graphs of each detector that were traced so far."""
    return {}


@pytest.mark.parametrize(("name", "kind", "precision"), CASES)
def test_file_scores_and_decides(name, kind, precision, checkpoints, graphs, images, tmp_path):
    recipe, checkpoint = DETECTORS[name], checkpoints[name]
    good, path = images[recipe.window is not None], tmp_path / f"d{SUFFIX[kind]}"
    options = ("--format", kind, "--precision", precision, "--images", good, "--out", path)
    with traced_once() as own:
        own |= graphs.setdefault(name, {})
        works("export", checkpoint, *options)
        graphs[name] |= own
    detector, wanted = ExportedDetector(path), recontrast.load(checkpoint, device="cpu")
    assert detector.description["precision"] == precision and detector.recipe == recipe
    report = json.loads((tmp_path / "d.json").read_text())
    assert report["change"]["images"] == 12 + (0 if precision == "int8" else 8)
    assert {part["precision"] for part in report["parts"]} == ({"int8"} if precision == "int8" else set())
    scores, expected = detector.predict(good).scores, wanted.predict(good).scores
    np.testing.assert_allclose(scores, expected, rtol=report["tolerance"])
    largest = np.abs(np.array(scores) / expected - 1).max()
    if precision == "int8":
        assert largest == pytest.approx(report["change"]["largest"], rel=0.01)
    else:  # drawn images were compared too
        assert largest <= 1.01 * report["change"]["largest"]
    works("calibrate", path, "--good", good, "--false-alarm-rate", 0.25)
    again = ExportedDetector(path)
    assert again.description["precision"] == precision and again.calibration.count == 12
    np.testing.assert_allclose(again.calibration.scores, sorted(scores), rtol=1e-5)
    fresh = draw(tmp_path / "fresh", 16, deep=recipe.window is not None, seed=9)
    works("predict", path, fresh, "--out", tmp_path / "out", "--no-overlays", "--decide", "--maps", "npy")
    rows = list(csv.DictReader((tmp_path / "out/scores.csv").read_text().splitlines()))
    decisions = [row["decision"] == "defect" for row in rows]
    assert decisions == again.calibration.is_defect([float(row["score"]) for row in rows]).tolist()
    assert 0 < sum(decisions) < 16
    if recipe.roi is not None:
        size = (32, 32) if recipe.tile is None else (60, 60)
        inside = np.asarray(Image.fromarray(REGION).resize(size, Image.Resampling.NEAREST))
        for file in (tmp_path / "out/maps").iterdir():
            assert not np.load(file)[~inside].any()


@pytest.mark.parametrize("name", DETECTORS)
def test_ranges_are_those_of_what_the_graph_takes(name, images):
    recipe = DETECTORS[name]
    paths = sorted(images[recipe.window is not None].iterdir())
    samples = read_evenly(paths, recipe, 50)
    pixels, masks = samples.images, samples.masks
    assert pixels.dtype == (np.uint8 if recipe.window is None else np.float32) and pixels.shape[1:] == (32, 32, 3)
    assert len(pixels) == (12 if recipe.tile is None else 12 * 4)  # of 4 or 9 tiles of each image
    assert (masks is None) == (recipe.tile is None or recipe.roi is None)
    assert masks is None or (masks.shape == (48, 32, 32) and masks.any(axis=(1, 2)).all() and not masks.all())
    assert samples.every(5).images.shape == (len(pixels[::5]), 32, 32, 3)
    assert len({image.tobytes() for image in pixels}) == len(pixels)
    if recipe.tile is not None:
        assert len(read_evenly(paths, recipe, 5).images) == 5
        paths[3].with_name("bad.png").write_bytes(b"no picture")
        with pytest.raises(ValueError, match=r"bad.png"):
            read_evenly([*paths, paths[3].with_name("bad.png")], recipe, 50)
        paths[3].with_name("bad.png").unlink()
