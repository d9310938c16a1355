"""Exported files are compared with the SHA-256 in a file beside them, if there is one."""

import hashlib

import pytest
from small_detectors import export_onnx, export_openvino, export_pt2

from recontrast.inference.exported_detector import ExportedDetector


@pytest.mark.parametrize("kind", ["onnx", "pt2", "xml"])
def test_sha256_beside_an_exported_file(tmp_path, kind):
    if kind != "pt2":
        pytest.importorskip("onnx")
        pytest.importorskip({"onnx": "onnxruntime", "xml": "openvino"}[kind])
    path = {"onnx": export_onnx, "pt2": export_pt2, "xml": export_openvino}[kind](tmp_path / f"d.{kind}")
    files = [path, path.with_suffix(".bin")] if kind == "xml" else [path]
    for file in files:
        sidecar = file.with_name(f"{file.name}.sha256")
        sidecar.write_text(f"{hashlib.sha256(file.read_bytes()).hexdigest()} *{file.name}\n")
        assert ExportedDetector(path).category == "tile"
        sidecar.write_text("0" * 64)
        with pytest.raises(ValueError, match=rf"{file.name}: wanted the SHA-256 in {sidecar.name}, got "):
            ExportedDetector(path)
        sidecar.unlink()
