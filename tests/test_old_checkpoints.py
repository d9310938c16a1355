"""Checkpoints that recontrast 0.1.0 wrote: they load, score, decide, go on training and export as they did then.

How they were made: tests/data/checkpoints-0.1.0/make.py. Only the command line and torch are used here.
"""

import json
import lzma
import pickletools
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import works
from tiny import tiny_set

FILES = Path(__file__).parent / "data" / "checkpoints-0.1.0"
EXPECTED = json.loads((FILES / "expected.json").read_text())
# Relative. With instructions up to SSE4.1 or AVX2, or with the reference kernels, scores change by up to 1.5e-6, losses
# by up to 9e-7 and scores after training on by up to 2.3e-6. Exported files may differ by 1e-4 from their checkpoint.
SCORE_TOLERANCE = 2e-5
LOSS_TOLERANCE = 1e-5
RESUMED_TOLERANCE = 5e-5
EXPORT_TOLERANCE = 1e-4
# The classes that torch.save writes for tensors and state dicts. None belongs to this package, so modules can move.
ALLOWED_CLASSES = {
    "collections.OrderedDict",
    "torch.ByteStorage",
    "torch.FloatStorage",
    "torch.LongStorage",
    "torch._utils._rebuild_tensor_v2",
}
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """The images that the checkpoints were trained and tested on."""
    root = tmp_path_factory.mktemp("images")
    tiny_set(root, **EXPECTED["data"])
    return root


@pytest.fixture(scope="module")
def checkpoint_files(tmp_path_factory):
    """Both checkpoints, unpacked, by name."""
    folder = tmp_path_factory.mktemp("unpacked")
    paths = {name: folder / name / "checkpoint.pt" for name in ("resumable", "calibrated")}
    for name, path in paths.items():
        path.parent.mkdir()
        path.write_bytes(lzma.decompress((FILES / f"{name}.pt.xz").read_bytes()))
    return paths


def classes_in_pickle(data):
    """Every class or function that a pickle names, as "module.name"."""
    strings, classes = [], set()
    for operation, argument, _ in pickletools.genops(data):
        if operation.name == "GLOBAL":
            classes.add(argument.replace(" ", "."))
        elif operation.name == "STACK_GLOBAL":
            classes.add(".".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
    return classes


def predict(detector, images, out):
    """Entries of scores.json by image, relative to the test folder."""
    works("predict", detector, images / "nut/test", "--out", out, "--decide", "--maps", "npy", "--device", "cpu")
    entries = json.loads((out / "scores.json").read_text())["images"]
    return {Path(entry["path"]).relative_to(images / "nut/test").as_posix(): entry for entry in entries}


def check_decisions(predicted, tolerance):
    assert predicted.keys() == EXPECTED["images"].keys()
    for name, expected in EXPECTED["images"].items():
        assert predicted[name]["score"] == pytest.approx(expected["score"], rel=tolerance), name
        assert predicted[name]["p_value"] == pytest.approx(expected["p_value"], rel=1e-6), name
        assert predicted[name]["decision"] == expected["decision"], name


def test_expected_decisions_are_of_both_kinds():
    """The expected scores are far enough from each other to tell one p-value from the next in spite of rounding."""
    images = EXPECTED["images"]
    assert {entry["decision"] for entry in images.values()} == {"good", "defect"}
    calibration = np.array(EXPECTED["calibration_scores"])
    for entry in images.values():
        assert np.abs(calibration / entry["score"] - 1).min() > 20 * SCORE_TOLERANCE
        count = 1 + int((calibration >= entry["score"]).sum())
        assert entry["p_value"] == pytest.approx(count / (len(calibration) + 1))


@pytest.mark.parametrize("name", ["resumable", "calibrated"])
def test_file_names_no_class_of_the_package(checkpoint_files, name):
    with zipfile.ZipFile(checkpoint_files[name]) as archive:
        (member,) = [entry for entry in archive.namelist() if entry.endswith("/data.pkl")]
        assert classes_in_pickle(archive.read(member)) <= ALLOWED_CLASSES


@pytest.mark.parametrize("name, step", [("resumable", EXPECTED["saved_step"]), ("calibrated", EXPECTED["steps"])])
def test_content_loads_with_weights_only(checkpoint_files, name, step):
    content = torch.load(checkpoint_files[name], weights_only=True)
    assert content["version"] == EXPECTED["version"] == "0.1.0"
    assert content["recontrast_checkpoint"] == 1 and content["step"] == step
    assert content["images"]["digest"] == EXPECTED["images_digest"]
    assert (content["calibration"] is None) == (name == "resumable")


def test_scores_maps_and_decisions_are_the_same(checkpoint_files, images, tmp_path):
    predicted = predict(checkpoint_files["calibrated"], images, tmp_path)
    check_decisions(predicted, SCORE_TOLERANCE)
    for name, expected in EXPECTED["images"].items():
        anomaly_map = np.load(tmp_path / predicted[name]["map"])
        assert anomaly_map.mean(dtype=np.float64) == pytest.approx(expected["map_mean"], rel=SCORE_TOLERANCE)
        assert anomaly_map[tuple(expected["map_peak"])] == pytest.approx(expected["score"], rel=SCORE_TOLERANCE)


def test_resumes_to_the_same_losses_and_calibration(checkpoint_files, images, tmp_path):
    resumed = tmp_path / "run"
    works(
        "train", images, "--resume", checkpoint_files["resumable"], "--out", resumed, "--device", "cpu", "--no-evaluate"
    )
    log = [json.loads(line) for line in (resumed / "log.jsonl").read_text().splitlines()]
    losses = {str(entry["step"]): entry["loss"] for entry in log}
    assert losses == pytest.approx(EXPECTED["losses"], rel=LOSS_TOLERANCE)
    content = torch.load(resumed / "checkpoint.pt", weights_only=True)
    assert content["step"] == EXPECTED["steps"]
    calibration = content["calibration"]
    assert calibration["rate"] == EXPECTED["rate"]
    for name, expected in (
        ("scores", EXPECTED["calibration_scores"]),
        ("threshold", EXPECTED["threshold"]),
        ("pixel_threshold", EXPECTED["pixel_threshold"]),
    ):
        assert calibration[name] == pytest.approx(expected, rel=RESUMED_TOLERANCE), name


def test_exported_detector_decides_the_same(checkpoint_files, images, tmp_path):
    pytest.importorskip("onnxruntime")
    detector = tmp_path / "detector.onnx"
    works("export", checkpoint_files["calibrated"], "--format", "onnx", "--out", detector)
    check_decisions(predict(detector, images, tmp_path / "predicted"), EXPORT_TOLERANCE)
