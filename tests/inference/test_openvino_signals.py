"""Signals after OpenVINO networks have been loaded and released in any order: a handler still runs."""

import subprocess
import sys

import pytest
from small_detectors import export_openvino

pytest.importorskip("openvino")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*")

CODE = """
import signal, sys
from pathlib import Path
from recontrast.inference.programs import OpenVinoProgram

first, second = (OpenVinoProgram(Path(sys.argv[1])) for _ in range(2))
for name in sys.argv[2:]:
    del globals()[name]
signal.signal(signal.SIGTERM, lambda number, frame: print("handled"))
signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.parametrize("order", [("first", "second"), ("second", "first"), ("first",), ()], ids="-".join)
def test_a_handler_runs_after_networks_are_released(order, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(export_openvino(tmp_path / "d.xml")), *order]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "handled\n"), result
