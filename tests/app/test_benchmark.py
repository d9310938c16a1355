"""``recontrast benchmark``: figures of each way, the recommendation, and refusals."""

import json

import pytest
import torch
from command_line import fails, works
from saved_model import draw, save
from small_detectors import RECIPE, build_onnx, describe, export_onnx, export_openvino, save_checkpoint, save_onnx

from recontrast.app import benchmark_job
from recontrast.app.benchmark_job import Timing, recommend
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.runtime.device import is_bfloat16_fast

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*")]


@pytest.mark.parametrize("is_fast", [is_bfloat16_fast(torch.device("cpu")), False])
def test_checkpoint_and_files_are_timed(tmp_path, monkeypatch, is_fast):
    """Also on a processor without bfloat16, on which it is not listed."""
    if not is_fast:
        monkeypatch.setattr(benchmark_job, "is_bfloat16_fast", lambda device: False)
    checkpoint = save_checkpoint(tmp_path / "c.pt")
    files = [export_onnx(tmp_path / "d.onnx"), export_openvino(tmp_path / "d.xml")]
    before = sorted(tmp_path.iterdir())
    options = ["--batches", "1,3", "--seconds", 0.05, "--device", "cpu", "--out", tmp_path / "figures.json"]
    output = works("benchmark", checkpoint, "--file", files[0], "--file", files[1], *options)
    figures = json.loads((tmp_path / "figures.json").read_text())
    names = ["torch float32", "torch bfloat16", "ONNX Runtime d.onnx", "OpenVINO d.xml", "OpenVINO d.xml, bfloat16"]
    assert [entry["name"] for entry in figures] == [name for name in names if is_fast or "bfloat16" not in name]
    for entry in figures:
        for batch, values in entry["batches"].items():
            assert values["calls"] >= 3 and 0 < values["p50"] <= values["p99"]
            images = values["images_per_second"]  # of the median call, which lies between the two
            assert 0.999 * int(batch) / values["p99"] <= images <= 1.001 * int(batch) / values["p50"]
    assert figures[0]["change"] == 0 and set(figures[0]["batches"]) == {"1", "3"}
    assert figures[-1]["change"] > 0.5  # another network
    assert "recommended at batch 1: torch" in output and "p99 ms" in output
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "figures.json"])


def test_files_alone_are_compared_with_the_first(tmp_path):
    files = [export_onnx(tmp_path / "d.onnx"), export_openvino(tmp_path / "d.xml")]
    output = works("benchmark", files[0], "--file", files[1], "--batches", 2, "--seconds", 0.02)
    assert "recommended at batch 2: " in output and "torch" not in output


def test_every_way_of_this_machine_is_timed(tmp_path, monkeypatch):
    """Files in float32 and int8 are written to a temporary folder; OpenVINO runs one of them in bfloat16 too."""
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(benchmark_job, "is_bfloat16_fast", lambda device: True)
    checkpoint = save(tmp_path / "c.pt", RECIPE)
    good = draw(tmp_path / "good", 12, seed=3)  # whose scores int8 keeps, see tests/export/test_low_precision.py
    before = sorted(tmp_path.rglob("*"))
    options = ["--export", "--images", good, "--batches", 1, "--seconds", 0.02, "--device", "cpu", "--tolerance", 0.5]
    output = works("benchmark", checkpoint, *options, "--out", tmp_path / "figures.json")
    figures = {entry["name"]: entry for entry in json.loads((tmp_path / "figures.json").read_text())}
    assert list(figures) == [
        "torch float32", "torch bfloat16", "ONNX Runtime onnx.onnx", "ONNX Runtime onnx-int8.onnx",
        "OpenVINO openvino.xml", "OpenVINO openvino.xml, bfloat16", "OpenVINO openvino-int8.xml",
    ]  # fmt: skip
    assert "left out" not in output
    assert figures["OpenVINO openvino.xml"]["change"] < 1e-3
    assert "recommended at batch 1: " in output
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "figures.json"])


def test_openvino_computes_in_the_precision_that_is_asked_for(tmp_path):
    path = export_openvino(tmp_path / "d.xml")
    for precision, wanted in ((None, "f32"), ("float32", "f32"), ("bfloat16", "bf16")):
        model = ExportedDetector(path, precision=precision).program._model
        hint = model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        assert hint in (wanted, "f32")  # a processor without bfloat16 ignores the hint
        assert hint == wanted or not is_bfloat16_fast(torch.device("cpu"))


def test_recommendation():
    slow, close, far = (Timing(name, {1: [seconds] * 3}, None, change) for name, seconds, change in (
        ("torch float32", 0.4, 0.0), ("OpenVINO a.xml", 0.2, 1e-6), ("OpenVINO b.xml", 0.1, 0.1)))  # fmt: skip
    assert recommend([slow, close], 1) == "recommended at batch 1: OpenVINO a.xml: 5.0 images/s, 2.00 x torch float32"
    assert "; faster: OpenVINO b.xml: 10.0 images/s, 4.00 x" in recommend([slow, close, far], 1)
    assert recommend([slow, close, far], 1, 0.2).startswith("recommended at batch 1: OpenVINO b.xml")
    timing = Timing("a", {1: [i / 100 for i in range(1, 101)]})
    assert (timing.latency(1, 0.5), timing.latency(1, 0.99)) == (0.5, 0.99)


def test_bad_input_is_one_sentence(tmp_path):
    path = export_onnx(tmp_path / "d.onnx")
    for options, message in [
        (["--batches", "0"], "--batches: wanted numbers of at least 1 image, got '0'"),
        (["--batches", "a"], "--batches: wanted comma-separated integers"),
        (["--seconds", "0"], "--seconds: wanted a time above 0"),
        (["--file", tmp_path / "c.pt"], "--file: wanted a file that ends in .onnx, .xml or .pt2"),
        (["--file", tmp_path / "none.onnx"], "none.onnx"),
        (["--formats", "onnx"], "--formats: wanted a checkpoint to export"),
        (["--export"], "--export: wanted a checkpoint to export"),
        (["--tolerance", "0"], "--tolerance: wanted a finite number above 0"),
    ]:
        assert message in fails("benchmark", path, *options)
    other = save_onnx(tmp_path / "other.onnx", build_onnx(), describe(recipe=RECIPE.replace(size=48).to_dict()))
    assert "wanted files of one detector, got images of another size" in fails("benchmark", path, "--file", other)
    tiled = save(tmp_path / "tiled.pt", RECIPE.replace(tile=32))
    assert "wanted a detector of whole images to time" in fails("benchmark", tiled, "--device", "cpu")
