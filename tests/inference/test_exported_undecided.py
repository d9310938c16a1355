"""Exported files whose map is not finite for one image: undecided in every format, and the others are decided.

The networks take the square root of a negative number for a white image, as a network whose values overflow would give
NaN for some images.
"""

import csv
import json

import numpy as np
import pytest
import torch
from command_line import call
from PIL import Image
from saved_model import draw
from small_detectors import Network, build_onnx, describe, save_onnx

import recontrast
from recontrast.calibration.conformal import calibrate_maps
from recontrast.inference import onnx_file, openvino_file
from recontrast.inference.file_checks import CHECKSUM_KEY, KEY, NO_CHECKSUM, compute_sha256, write_checksum

LIMIT = 0.001  # below the difference between white and the next grey value, 1 / 255
RUNTIMES = {"onnx": ["onnx", "onnxruntime"], "xml": ["onnx", "openvino"], "pt2": []}


def describe_calibrated():
    batches = [(np.full((9, 4, 4), 0.1, np.float32), np.linspace(-1, 0, 9, dtype=np.float32))]
    calibration = calibrate_maps(batches, 9, rate=0.2, pixel_rate=0.2, source="drawn", weights="0" * 64)
    return describe(calibration=calibration.to_dict())


class SpoiledNetwork(Network):
    """`Network` with a map of NaN for a white image."""

    def forward(self, image):
        maps, _ = super().forward(image)
        gap = 1 - (image / 255).flatten(1).amin(1)
        maps = maps * (gap - LIMIT).sqrt()[:, None, None]
        return maps, maps.flatten(1).amax(1)


def build_spoiled_onnx():
    from onnx import TensorProto, helper, numpy_helper

    model = build_onnx()
    for node in model.graph.node:
        for outputs, name in ((node.output, "map"), (node.input, "map")):
            for index, value in enumerate(outputs):
                if value == name and node.op_type != "ReduceMax":
                    outputs[index] = "plain"
    constants = {"all": np.array([1, 2, 3]), "one": np.float32([1]), "limit": np.float32([LIMIT])}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    nodes = [
        helper.make_node("ReduceMin", ["scaled", "all"], ["low"], keepdims=0),
        helper.make_node("Sub", ["one", "low"], ["gap"]),
        helper.make_node("Sub", ["gap", "limit"], ["rest"]),
        helper.make_node("Sqrt", ["rest"], ["root"]),
        helper.make_node("Unsqueeze", ["root", "axes"], ["factor"]),
        helper.make_node("Mul", ["plain", "factor"], ["map"]),
    ]
    score = model.graph.node.pop()
    model.graph.node.extend([*nodes, score])
    assert score.op_type == "ReduceMax" and TensorProto.FLOAT == 1
    return model


def save_spoiled(path):
    if path.suffix == ".pt2":
        lengths = {0: torch.export.Dim("n"), 1: torch.export.Dim("h"), 2: torch.export.Dim("w")}
        network = SpoiledNetwork().requires_grad_(False)
        example = torch.zeros(2, 32, 40, 3, dtype=torch.uint8)
        program = torch.export.export(network, (example,), dynamic_shapes=(lengths,))
        torch.export.save(program, path, extra_files={f"{KEY}.json": describe_calibrated()})
    elif path.suffix == ".onnx":
        save_onnx(path, build_spoiled_onnx(), describe_calibrated())
    else:
        import openvino

        intermediate = path.with_name("intermediate.onnx")
        intermediate.write_bytes(build_spoiled_onnx().SerializeToString())
        model = openvino.convert_model(intermediate)
        intermediate.unlink()
        model.set_rt_info(describe_calibrated(), KEY)
        openvino.save_model(model, path, compress_to_fp16=False)
        model.set_rt_info(compute_sha256(path.with_suffix(".bin")), openvino_file.WEIGHTS_KEY)
        model.set_rt_info(NO_CHECKSUM, CHECKSUM_KEY)
        openvino.save_model(model, path, compress_to_fp16=False)
        write_checksum(path, openvino_file.CHECKSUM_PREFIX)
    return path


@pytest.mark.parametrize("kind", RUNTIMES)
def test_image_without_a_finite_map_is_undecided(tmp_path, kind):
    for name in RUNTIMES[kind]:
        pytest.importorskip(name)
    path = save_spoiled(tmp_path / f"detector.{kind}")
    folder = draw(tmp_path / "images", 3, seed=5)
    Image.new("RGB", (64, 64), "white").save(folder / "001w.png")  # between the others, in the same batch
    result = call("predict", path, folder, "--out", tmp_path / "out", "--maps", "npy")
    assert result.exit_code == 2 and "1 undecided" in result.stdout, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("recontrast: ")]
    assert "001w.png: wanted a finite anomaly map, got NaN or infinite values: it has no score and is undecided" in line
    rows = list(csv.DictReader((tmp_path / "out/scores.csv").read_text().splitlines()))
    assert [row["decision"] for row in rows] == ["defect", "defect", "undecided", "defect"]
    assert [row["score"] for row in rows].count("nan") == 1
    assert all(float(row["score"]) > 0 for row in rows if row["decision"] == "defect")
    images = json.loads((tmp_path / "out/scores.json").read_text())["images"]
    assert images[2]["score"] is None and images[2]["p_value"] is None and images[2]["decision"] == "undecided"
    assert np.isnan(np.load(tmp_path / "out/maps/001w.npy")).any()
    with pytest.warns(UserWarning, match="001w.png: wanted a finite anomaly map"):
        predictions = recontrast.load(path).predict(folder)
    assert [prediction.decision for prediction in predictions] == ["defect", "defect", "undecided", "defect"]
    assert np.isnan(predictions.undecided.scores).all() and len(predictions.undecided) == 1


def test_formats_are_all_here():
    from recontrast.inference.programs import PROGRAMS

    assert {f".{kind}" for kind in RUNTIMES} == set(PROGRAMS) and onnx_file.CHECKSUM_PREFIX
