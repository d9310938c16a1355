"""Files of less than float32: size, scores, parts that stay in float, reports, calibration, refusals."""

import json
import os

import numpy as np
import pytest
from command_line import fails, works
from PIL import Image
from saved_model import draw, save
from tiny import tiny_set
from traced_once import traced_once

import recontrast
from recontrast.calibration.conformal import calibrate_maps
from recontrast.data.own_files import is_own
from recontrast.export.export import export
from recontrast.export.low_precision import Change, convert, open_model
from recontrast.export.quantize import list_layers, measure_ranges, quantize, store_half_weights
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.recipes.recipe import Recipe

RECIPE = Recipe(backbone="test_resnet", weights="random", size=32, encoder_bn="eval")
CASES = [("onnx", "int8"), ("openvino", "int8"), ("onnx", "float16"), ("openvino", "float16"), ("openvino", "bfloat16")]
SUFFIX = {"onnx": ".onnx", "openvino": ".xml"}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*"),
    pytest.mark.filterwarnings("ignore:.*seem to show one scene:recontrast.data.listing.DataWarning"),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("good") / "good", 12, seed=3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "checkpoint.pt", RECIPE)


@pytest.fixture(scope="module")
def model(run, tmp_path_factory):
    """The graph in float32, as an ONNX model. All exports of this file use it."""
    with traced_once() as graphs:
        export(run, "onnx", tmp_path_factory.mktemp("model") / "d.onnx", precision="float16")
        yield graphs["model", False]


@pytest.mark.parametrize(("kind", "precision"), CASES)
def test_file_keeps_the_scores_within_the_tolerance(kind, precision, model, run, good, tmp_path):
    path = tmp_path / f"d{SUFFIX[kind]}"
    output = works("export", run, "--format", kind, "--precision", precision, "--images", good, "--out", path)
    detector = ExportedDetector(path)
    assert detector.description["precision"] == precision and detector.calibration is None
    report = json.loads((tmp_path / "d.json").read_text())
    assert f"{precision} beside float32" in output and report["precision"] == precision
    assert report["change"]["images"] == 12 + (0 if precision == "int8" else 8)
    assert report["change"]["largest"] <= report["tolerance"] and report["images_per_second"][1] > 0
    ratio = report["megabytes"][1] / report["megabytes"][0]
    assert ratio < {"int8": 0.5, "float16": 0.6, "bfloat16": 1.01}[precision]
    page = (tmp_path / "d.md").read_text()
    assert page.startswith("# Exported detector: d.") and "largest relative difference" in page
    assert all(is_own(tmp_path / f"d.{end}") for end in ("md", "json"))
    names = {"d.md", "d.json", path.name} | ({"d.bin"} if kind == "openvino" else set())
    assert {file.name for file in tmp_path.iterdir()} == names
    if precision == "int8":
        assert {part["name"] for part in report["parts"]} >= {"encoder", "frozen", "bottleneck", "decoder"}
        assert any(part["precision"] == "int8" for part in report["parts"])
    if (kind, precision) in CASES[1:3]:  # the calibration of such a file is its own
        works("calibrate", path, "--good", good, "--false-alarm-rate", 0.1)
        again = ExportedDetector(path)
        assert again.description["precision"] == precision and again.calibration.count == 12
        image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
        np.testing.assert_allclose(again.score(image)[1], detector.score(image)[1], rtol=1e-6)


@pytest.mark.parametrize("kind", SUFFIX)
def test_promised_rates_hold_for_a_file_of_int8(kind, model, run, good, tmp_path):
    """Over re-splits of good images whose scores are the file's own; the command stores what such a split gives."""
    path = tmp_path / f"d{SUFFIX[kind]}"
    export(run, kind, path, precision="int8", images=sorted(good.iterdir()))
    images = sorted(draw(tmp_path / "images", 90, seed=5, spread=20.0).iterdir())
    detector, whole = ExportedDetector(path), recontrast.load(run, device="cpu")
    found = detector.predict(images)
    maps, scores = np.stack([one.anomaly_map for one in found]), np.array(found.scores, np.float32)
    changes = np.abs(scores / np.array(whole.predict(images).scores) - 1)
    assert changes.max() > 1e-4 and len(set(scores.tolist())) == 90  # the scores are those of int8, without ties
    random, rate, splits, kept = np.random.default_rng(0), 0.1, 400, 49
    alarms, flagged = np.zeros(splits), np.zeros(splits)
    for index in range(splits):
        order = random.permutation(90)
        first, fresh = order[:kept], order[kept:]
        calibration = calibrate_maps(
            [(maps[first], scores[first])], kept, rate=rate, pixel_rate=rate, source="", weights=""
        )
        alarms[index] = calibration.is_defect(scores[fresh]).mean()
        flagged[index] = (maps[fresh] > calibration.pixel_threshold).mean()
    for shares in (alarms, flagged):
        assert shares.mean() <= rate + 4 * shares.std() / splits**0.5
    assert alarms.mean() >= rate - 4 * alarms.std() / splits**0.5  # 5 of 50: not by a threshold that is too high
    for index in first:
        (tmp_path / "good").mkdir(exist_ok=True)
        os.link(images[index], tmp_path / "good" / images[index].name)
    works("calibrate", path, "--good", tmp_path / "good", "--false-alarm-rate", rate, "--pixel-rate", rate)
    decided = ExportedDetector(path)
    assert decided.calibration.threshold == pytest.approx(calibration.threshold, rel=1e-6)
    outputs = decided.program(np.stack([np.asarray(Image.open(images[index])) for index in fresh]))
    wanted = calibration.is_defect(scores[fresh])
    np.testing.assert_array_equal(outputs["defect"], wanted)
    assert 0 < wanted.sum() < 20


def test_report_gives_the_change_of_metrics(model, run, good, tmp_path):
    tiny_set(tmp_path / "data")
    options = ("--format", "onnx", "--precision", "int8", "--images", good, "--out", tmp_path / "d.onnx")
    output = works("export", run, *options, "--data", tmp_path / "data")
    metrics = json.loads((tmp_path / "d.json").read_text())["metrics"]
    assert {"i_auroc", "p_auroc", "aupro"} <= set(metrics) and "i_auroc: " in output
    assert "| i_auroc |" in (tmp_path / "d.md").read_text()


def test_other_scores_are_refused_and_leave_no_file(model, run, good, tmp_path):
    for precision, tolerance in (("int8", 1e-7), ("float16", 1e-9)):
        options = ("--precision", precision, "--images", good, "--tolerance", tolerance)
        message = fails("export", run, "--format", "onnx", *options, "--out", tmp_path / "d.onnx")
        assert f"wanted scores within {tolerance:g} of" in message and "nothing was written" in message
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", SUFFIX)
def test_parts_that_hurt_stay_in_float(kind, model, good):
    images = sorted(good.iterdir())
    _, parts = convert(model, kind, "int8", images, RECIPE, 10.0)
    assert {part.precision for part in parts} == {"int8"}
    least = min(part.effect for part in parts if part.effect > 0)
    changed, kept = convert(model, kind, "int8", images, RECIPE, 1.01 * max(least, 1e-6))
    left = {part.name for part in kept if part.precision == "float32"}
    assert left and max(parts, key=lambda part: part.effect).name in left
    stored = {weight.name for weight in changed.graph.initializer if weight.data_type == 3}  # int8
    for layer in list_layers(model):
        assert (layer.weight in stored) == (layer.group not in left)


def test_resize_and_map_stay_in_float(model):
    layers = {layer.node for layer in list_layers(model)}
    others = [node for node in model.graph.node if node.op_type in ("MatMul", "Conv") and node.name not in layers]
    assert len(layers) > 20 and {node.op_type for node in others} == {"MatMul"} and others[-1].output[0] == "map"
    weights = {weight.name: weight for weight in store_half_weights(model).graph.initializer}
    assert weights["rows"].data_type == 1 and weights[list_layers(model)[0].weight].data_type == 10


def build_network():
    """A network with each kind of layer, as an ONNX model, and its input."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)

    def weight(name, *shape):
        return numpy_helper.from_array(random.normal(0, 0.5, shape).astype(np.float32), f"network.model.{name}")

    weights = [
        weight("encoder.a.weight", 8, 3, 3, 3), weight("encoder.a.bias", 8), weight("encoder.b.weight", 8, 1, 3, 3),
        weight("encoder.b.bias", 8), weight("decoder.c.weight", 8, 6, 2, 2), weight("decoder.c.bias", 6),
        weight("decoder.d.weight", 6, 10), weight("heads.e.weight", 4, 10), weight("heads.e.bias", 4),
        numpy_helper.from_array(np.array([2, 3]), "axes"),
    ]  # fmt: skip
    prefix = "network.model."
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], "transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", prefix + "encoder.a.weight", prefix + "encoder.a.bias"], ["a"], "a"),
        helper.make_node("Relu", ["a"], ["ra"], "ra"),
        helper.make_node("Conv", ["ra", prefix + "encoder.b.weight", prefix + "encoder.b.bias"], ["b"], "b", group=8),
        helper.make_node("ConvTranspose", ["b", prefix + "decoder.c.weight", prefix + "decoder.c.bias"], ["c"], "c",
                         strides=[2, 2]),
        helper.make_node("ReduceMean", ["c", "axes"], ["mean"], "mean", keepdims=0),
        helper.make_node("MatMul", ["mean", prefix + "decoder.d.weight"], ["d"], "d"),
        helper.make_node("Gemm", ["d", prefix + "heads.e.weight", prefix + "heads.e.bias"], ["score"], "e", transB=1),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes, "network", [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", "h", "w", 3])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["n", 4])], weights,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("kind", SUFFIX)
def test_every_kind_of_layer(kind):
    """Rounded values are close to those in float, and the mean over images closer: the bias is corrected."""
    network = build_network()
    layers = list_layers(network)
    assert [layer.group for layer in layers] == ["encoder", "encoder", "decoder", "decoder", "heads"]
    assert layers[0].target == "ra" and layers[1].target == "b"
    images = np.random.default_rng(1).integers(0, 256, (12, 20, 24, 3), np.uint8)
    ranges = measure_ranges(network, {name for x in layers for name in (x.source, x.target)}, images)
    assert ranges["ra"].low == 0 and ranges["b"].mean.shape == (8,)
    quantized = quantize(network, layers, ranges, outputs=kind == "onnx", transposed=kind == "openvino")
    operators = [node.op_type for node in quantized.graph.node]
    assert operators.count("DequantizeLinear") > len(layers) and "QuantizeLinear" in operators
    wanted, got = (open_model(item, kind)(images) for item in (network, quantized))
    spread = np.abs(wanted).max()
    assert 0 < np.abs(got - wanted).max() < 0.05 * spread
    assert np.abs((got - wanted).mean(0)).max() < 0.02 * spread
    half = open_model(store_half_weights(network), kind)(images)
    assert 0 < np.abs(half - wanted).max() < 2e-3 * spread


def test_change_of_scores():
    change = Change.measure(np.array([1.0, 2.0, 4.0]), np.array([1.1, 2.0, 4.0]))
    assert change.largest == pytest.approx(0.1) and change.typical == 0 and change.rank_correlation == 1
    assert Change.measure(np.array([1.0, 2.0]), np.array([1.0, np.nan])).largest == np.inf


def test_bad_input_is_one_sentence(run, good, tmp_path):
    few = draw(tmp_path / "few", 7, seed=1)
    out = tmp_path / "d.onnx"
    for options, message in [
        (["onnx", "--precision", "int8"], "--images: wanted at least 8 good images, from which int8 takes the ranges"),
        (["onnx", "--precision", "int8", "--images", few], "got 7"),
        (["onnx", "--precision", "bfloat16"], "--precision bfloat16: wanted --format openvino, got onnx"),
        (["onnx", "--precision", "int4"], "--precision: wanted float32, float16, bfloat16, int8, got 'int4'"),
        (["onnx", "--tolerance", "-1"], "--tolerance: wanted a finite number above 0, got -1"),
        (["onnx", "--data", few], "--data: wanted --precision float16, bfloat16 or int8 with it"),
    ]:
        assert message in fails("export", run, "--format", *options, "--out", out)
    message = fails("export", run, "--format", "pt2", "--precision", "float16", "--out", tmp_path / "d.pt2")
    assert "--precision float16: wanted --format onnx or openvino, got pt2" in message
    (few / "bad.png").write_bytes(b"no picture")
    assert "bad.png" in fails("export", run, "--format", "onnx", "--precision", "int8", "--images", few, "--out", out)
    (tmp_path / "d.md").write_text("notes of mine")
    message = fails("export", run, "--format", "onnx", "--precision", "int8", "--images", good, "--out", out)
    assert "d.md" in message and (tmp_path / "d.md").read_text() == "notes of mine"
