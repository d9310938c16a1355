"""Exported files are calibrated on their own scores, and decide by them, in every format."""

import csv
import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from command_line import call, fails, works
from PIL import Image
from saved_model import draw
from small_detectors import build_onnx, describe, export_onnx, export_openvino, export_pt2, save_onnx
from tiny import tiny_set

import recontrast
from recontrast.calibration.conformal import calibrate_maps
from recontrast.data.fingerprint import compute_fingerprint
from recontrast.data.image_files import ImageFiles
from recontrast.data.images import read_image
from recontrast.export import store_calibration as storing
from recontrast.inference.exported_detector import ExportedDetector

WRITERS = {"d.onnx": export_onnx, "d.xml": export_openvino, "d.pt2": export_pt2}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*"),
    pytest.mark.filterwarnings(
        "ignore:.*seem to show one scene|.*copies of another:recontrast.data.listing.DataWarning"
    ),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Folder of 30 images whose largest values differ."""
    return draw(tmp_path_factory.mktemp("good") / "good", 30, seed=3)


def run_scores(detector, folder):
    return np.concatenate([scores for _, scores in detector.run(ImageFiles(sorted(folder.iterdir())), 8)])


@pytest.mark.parametrize("name", WRITERS)
def test_calibration_is_stored_in_the_file_and_its_graph(name, good, tmp_path):
    path = WRITERS[name](tmp_path / name)
    files = sorted(tmp_path.iterdir())
    assert "no decisions" not in works("calibrate", path, "--good", good, "--false-alarm-rate", 0.1)
    scores = np.sort(run_scores(ExportedDetector(path), good))
    other = draw(tmp_path / "other", 12, seed=8, spread=30.0)
    for folder, rate in ((good, 0.1), (other, 0.2)):  # the second replaces the first
        if folder is other:
            works("calibrate", path, "--good", folder, "--false-alarm-rate", rate)
            scores = np.sort(run_scores(ExportedDetector(path), folder))
        detector = ExportedDetector(path)
        calibration = detector.calibration
        np.testing.assert_allclose(calibration.scores, scores, rtol=1e-6)
        assert calibration.rate == rate and calibration.weights == "0" * 64 and calibration.pixel_threshold is not None
        pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(good.iterdir())])
        outputs = detector.program(pixels)
        assert list(outputs) == ["map", "score", "p_value", "defect"] and outputs["defect"].dtype == np.bool_
        np.testing.assert_allclose(outputs["p_value"], calibration.p_values(outputs["score"]), rtol=1e-6)
        np.testing.assert_array_equal(outputs["defect"], calibration.is_defect(outputs["score"]))
        assert 0 < outputs["defect"].mean() < 1 or folder is other
    works("predict", path, good, "--out", tmp_path / "out", "--no-overlays", "--decide")
    rows = list(csv.DictReader((tmp_path / "out/scores.csv").read_text().splitlines()))
    assert [row["decision"] == "defect" for row in rows] == calibration.is_defect(run_scores(detector, good)).tolist()
    assert sorted(file for file in tmp_path.iterdir() if file.is_file()) == files


def test_sha256_beside_a_file_is_written_anew(good, tmp_path):
    path = export_openvino(tmp_path / "d.xml")
    files = [path, path.with_suffix(".bin")]
    for file in files:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        (tmp_path / f"{file.name}.sha256").write_text(f"{digest}  {file.name}\n")
    works("calibrate", path, "--good", good, "--false-alarm-rate", 0.1)
    for file in files:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert (tmp_path / f"{file.name}.sha256").read_text() == f"{digest}  {file.name}\n"
    assert ExportedDetector(path).calibration.count == 30


def save_perturbed(path, seed):
    """A file whose scores are moved and spread in another way than those of the small network."""
    from onnx import numpy_helper

    model = build_onnx()
    random = np.random.default_rng(seed)
    weight = next(item for item in model.graph.initializer if item.name == "weight")
    values = numpy_helper.to_array(weight) * 1.2 + random.normal(0, 0.05, (1, 3, 3, 3)).astype(np.float32)
    weight.CopyFrom(numpy_helper.from_array(values.astype(np.float32), "weight"))
    return save_onnx(path, model)


def test_promised_rate_holds_for_a_file_with_other_scores(tmp_path):
    """Over re-splits of good images: with the file's own scores, but not with those of the checkpoint."""
    images = draw(tmp_path / "images", 90, seed=5, spread=20.0)
    whole = run_scores(ExportedDetector(export_onnx(tmp_path / "whole.onnx")), images)
    perturbed = run_scores(ExportedDetector(save_perturbed(tmp_path / "perturbed.onnx", 1)), images)
    random, rate, shares = np.random.default_rng(0), 0.1, {"own": [], "foreign": []}
    for _ in range(400):
        order = random.permutation(90)
        kept, fresh = order[:49], order[49:]
        for name, scores in (("own", perturbed), ("foreign", whole)):
            calibration = calibrate_maps(
                [(np.zeros((49, 1, 1), np.float32), scores[kept])], 49, rate=rate, pixel_rate=0.1, source="", weights=""
            )
            shares[name].append(calibration.is_defect(perturbed[fresh]).mean())
    error = np.std(shares["own"]) / math.sqrt(400)
    assert abs(np.mean(shares["own"]) - rate) < 4 * error + 0.01
    assert np.mean(shares["foreign"]) > 0.5


def test_commands_keep_the_promise_of_a_perturbed_file(tmp_path):
    """The calibration that the command stores is the one of the perturbed scores."""
    path = save_perturbed(tmp_path / "d.onnx", 1)
    good, fresh = (draw(tmp_path / name, 39, seed=seed) for name, seed in (("good", 5), ("fresh", 6)))
    works("calibrate", path, "--good", good, "--false-alarm-rate", 0.05)
    defects = sum(prediction.decision == "defect" for prediction in recontrast.load(path).predict(fresh))
    assert defects <= 7  # of 39 at 0.05: a larger number has a probability below 0.001
    result = works("calibrate", path, "--check", fresh)
    assert "calibration" in result


@pytest.fixture(scope="module")
def windowed(tmp_path_factory):
    """Folder of 12 float images whose largest values differ, and of detectors of them with the window 290 to 400."""
    folder, random = tmp_path_factory.mktemp("windowed"), np.random.default_rng(4)
    (folder / "good").mkdir()
    for index in range(12):
        samples = random.normal(300, random.uniform(2, 20), (40, 48)).astype(np.float32)
        Image.fromarray(samples).save(folder / f"good/{index:02}.tif")
    for name, write in WRITERS.items():
        write(folder / name, window=(290.0, 400.0))
    return folder


@pytest.mark.parametrize("name", WRITERS)
def test_detector_with_a_window(name, windowed, tmp_path):
    """Its images are floats, also where its graph is traced again."""
    path, images = windowed / name, windowed / "good"
    works("calibrate", path, "--good", images, "--false-alarm-rate", 0.3)
    works("predict", path, images, "--out", tmp_path / "out", "--no-overlays", "--decide")
    rows = list(csv.DictReader((tmp_path / "out/scores.csv").read_text().splitlines()))
    detector = ExportedDetector(path)
    scores, calibration = run_scores(detector, images), detector.calibration
    np.testing.assert_allclose(calibration.scores, np.sort(scores), rtol=1e-6)
    np.testing.assert_allclose([float(row["score"]) for row in rows], scores, rtol=1e-5)
    decisions = [row["decision"] == "defect" for row in rows]
    assert decisions == calibration.is_defect(scores).tolist() and 0 < sum(decisions) < 12
    pixels = np.stack([read_image(file, window=(290.0, 400.0)) for file in sorted(images.iterdir())])
    outputs = detector.program(pixels)
    np.testing.assert_array_equal(outputs["defect"], calibration.is_defect(outputs["score"]))
    np.testing.assert_allclose(outputs["p_value"], calibration.p_values(outputs["score"]), rtol=1e-6)


@pytest.mark.parametrize("name", WRITERS)
def test_failures_change_nothing(name, good, tmp_path, monkeypatch):
    path = WRITERS[name](tmp_path / name)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(storing, "check_decisions", lambda *_: (_ for _ in ()).throw(ValueError("wanted equal, got")))
    assert "wanted equal" in fails("calibrate", path, "--good", good, "--false-alarm-rate", 0.1)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_bad_input_is_one_sentence(good, tmp_path):
    path, given = export_onnx(tmp_path / "d.onnx"), ["--good", good, "--false-alarm-rate", 0.1]
    few = draw(tmp_path / "few", 4, seed=1)
    assert "which needs 9 good images" in fails("calibrate", path, "--good", few, "--false-alarm-rate", 0.1)
    assert "wanted a checkpoint where views" in fails("calibrate", path, *given, "--views", "trained")
    assert "wanted a checkpoint where views" in fails("evaluate", path, good, "--views", "trained")
    assert "wanted a calibration to compare with, got none" in fails("calibrate", path, "--check", few)
    assert "no such file" in fails("calibrate", tmp_path / "none.onnx", *given)
    prints = "".join(compute_fingerprint(read_image(file, size=32)) for file in sorted(good.iterdir())[:2])
    about = {"count": 2, "digest": "", "each": prints}
    save_onnx(path, build_onnx(), describe(images=about))
    message = fails("calibrate", path, *given)
    assert "that were not trained on, got 2 of 30 that were" in message
    save_onnx(path, build_onnx(), describe(images={"each": 3}))
    assert "images: wanted a description of images" in fails("calibrate", path, *given)
    path.write_bytes(b"damaged")
    for command in ("calibrate", "evaluate"):
        arguments = given if command == "calibrate" else [good]
        assert "d.onnx" in fails(command, path, *arguments)


def test_calibration_of_other_weights_is_refused(good, tmp_path):
    path = export_onnx(tmp_path / "d.onnx")
    works("calibrate", path, "--good", good, "--false-alarm-rate", 0.1)
    calibration = replace(ExportedDetector(path).calibration, weights="1" * 64)
    with pytest.raises(ValueError, match="wanted a calibration of its weights"):
        storing.store_calibration(path, calibration)


@pytest.mark.parametrize("name", WRITERS)
def test_evaluation_of_a_file(name, good, tmp_path):
    """The same metrics as those of its maps and scores, with decisions, tables, maps and streaming."""
    path = WRITERS[name](tmp_path / name)
    tiny_set(tmp_path / "data")
    works("calibrate", path, "--good", good, "--false-alarm-rate", 0.1)
    output = works("evaluate", path, tmp_path / "data", "--out", tmp_path / "out", "--save-maps", "--batch", 4)
    assert "at the promised false-alarm rate of 0.1" in output
    rows = list(csv.DictReader((tmp_path / "out/scores.csv").read_text().splitlines()))
    assert len(rows) == 6 and len(list((tmp_path / "out/maps").rglob("*.tiff"))) == 6
    detector = ExportedDetector(path)
    for row in rows:
        pixels = read_image(row["path"], size=32)
        assert float(row["score"]) == pytest.approx(detector.program(pixels[None])["score"][0], rel=1e-6)
    exact = json.loads((tmp_path / "out/results.json").read_text())["rows"][0]
    streamed = recontrast.evaluate(path, tmp_path / "data", streaming=True).mean
    assert streamed.p_auroc == pytest.approx(exact["p_auroc"], abs=0.01) and streamed.i_auroc == exact["i_auroc"]
    (tmp_path / "data/nut/test/good/bad.png").write_bytes(b"no picture")
    result = call("evaluate", path, tmp_path / "data")
    assert result.exit_code == 2 and "bad.png" in result.output


def test_api_calibrates_an_exported_file(good, tmp_path):
    path = export_onnx(tmp_path / "d.onnx")
    detector = recontrast.calibrate(path, good, false_alarm_rate=0.1)
    assert isinstance(detector, ExportedDetector) and detector.calibration.count == 30
    assert detector.predict(good, false_alarm_rate=0.5)[0].p_value is not None
