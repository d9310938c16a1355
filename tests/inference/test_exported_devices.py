"""Devices of exported files (ONNX Runtime's provider for CUDA by name, one sentence where it is missing), and calls."""

import sys
import types

import numpy as np
import pytest
from small_detectors import export_onnx, export_openvino

from recontrast.inference import exported_detector
from recontrast.inference.exported_detector import ExportedDetector

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*")]


def fake_runtime(monkeypatch, available, started):
    """An ONNX Runtime with these providers, which records those that a session asks for."""
    asked = []

    class Session:
        def __init__(self, content, options, providers):
            asked.extend(providers)

        def get_outputs(self):
            return [types.SimpleNamespace(name="map"), types.SimpleNamespace(name="score")]

        def get_providers(self):
            return started

        def run(self, names, inputs):
            return np.zeros((1, 4, 4), np.float32), np.zeros(1, np.float32)

    module = types.SimpleNamespace(
        get_available_providers=lambda: available, SessionOptions=types.SimpleNamespace, InferenceSession=Session
    )
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    return asked


def test_cuda_provider_is_asked_for_by_name(tmp_path, monkeypatch):
    path, both = export_onnx(tmp_path / "d.onnx"), ["CUDAExecutionProvider", "CPUExecutionProvider"]
    for device, index in (("cuda", 0), ("cuda:1", 1)):
        asked = fake_runtime(monkeypatch, both, both)
        ExportedDetector(path, device)
        assert asked == [("CUDAExecutionProvider", {"device_id": index}), "CPUExecutionProvider"]
    asked = fake_runtime(monkeypatch, both, both)
    ExportedDetector(path)
    assert asked == ["CPUExecutionProvider"]
    fake_runtime(monkeypatch, both, both[1:])
    with pytest.raises(ValueError, match="wanted device 'cuda', got a CUDAExecutionProvider that does not start"):
        ExportedDetector(path, "cuda")
    fake_runtime(monkeypatch, both[1:], both[1:])
    message = "wanted an ONNX Runtime with the CUDAExecutionProvider for device 'cuda', got one with CPUExecution"
    with pytest.raises(ValueError, match=message):
        ExportedDetector(path, "cuda")


def test_other_devices_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"wanted the CPU for an exported \.xml file, got device 'cuda'"):
        ExportedDetector(export_openvino(tmp_path / "d.xml"), "cuda")
    with pytest.raises(ValueError, match=r"wanted the CPU or CUDA for an \.onnx file, got device 'mps'"):
        ExportedDetector(export_onnx(tmp_path / "d.onnx"), "mps")


def test_many_images_take_several_calls(tmp_path, monkeypatch):
    """The graph holds several float copies of its input: views of a part share a call only if they are small."""
    detector, sizes = ExportedDetector(export_onnx(tmp_path / "d.onnx")), []
    images = np.random.default_rng(0).integers(0, 256, (5, 30, 40, 3), np.uint8)
    maps, scores = detector.score(images)
    program = detector.program
    monkeypatch.setattr(detector, "program", lambda *inputs: (sizes.append(len(inputs[0])), program(*inputs))[1])
    monkeypatch.setattr(exported_detector, "PIXELS_PER_CALL", 2 * 30 * 40 + 7)
    several_maps, several_scores = detector.score(images)
    assert sizes == [2, 2, 1]
    np.testing.assert_allclose(several_maps, maps, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(several_scores, scores, rtol=1e-4)
