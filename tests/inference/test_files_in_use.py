"""Files of a loaded detector can be replaced, on Windows too, and be copied over in place."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import small_detectors

from recontrast.inference.detector import open_detector


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_no_file_of_a_loaded_detector_is_mapped_or_open(tmp_path):
    """A file that is copied over in place would change the weights of a detector that runs, or end its process."""
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    writers = {"d.onnx": small_detectors.export_onnx, "d.xml": small_detectors.export_openvino,
               "d.pt2": small_detectors.export_pt2, "checkpoint.pt": small_detectors.save_checkpoint}  # fmt: skip
    images = [np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)]
    for name, write in writers.items():
        write(tmp_path / name)
        detector = open_detector(tmp_path / name, "cpu")
        scores = detector.predict(images).scores
        used = Path("/proc/self/maps").read_text()
        used += " ".join(os.path.realpath(f"/proc/self/fd/{handle}") for handle in os.listdir("/proc/self/fd"))
        assert str(tmp_path) not in used, name
        for file in tmp_path.iterdir():
            file.write_bytes(b"")
        assert detector.predict(images).scores == scores
        for file in tmp_path.iterdir():
            file.unlink()
