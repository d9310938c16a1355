"""An installation without PyTorch, timm, SciPy and scikit-learn: predict runs exported files, with the same results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import works
from saved_model import RECIPE, draw, save
from traced_once import traced_once

import recontrast
from recontrast import metrics
from recontrast.export.export import export

pytestmark = [
    # Raised by the imports of onnxscript and openvino.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:(onnx|onnxscript|onnx_ir|openvino).*"),
]
# Run before `recontrast`: Python does not find what such an installation lacks.
MISSING = """
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def find(name, path=None, target=None):
    missing = ("torch", "timm", "torchvision", "safetensors", "sklearn", "scipy", "triton")
    return None if name.partition(".")[0] in missing else find_spec(name, path, target)

PathFinder.find_spec = find
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A calibrated checkpoint, and the same detector in an .onnx and in an .xml file, traced once."""
    folder = tmp_path_factory.mktemp("files")
    images = draw(folder / "good", 12, seed=1)
    draw(folder / "images", 4, seed=2, spread=40.0)
    checkpoint = save(folder / "checkpoint.pt", RECIPE)
    works("calibrate", checkpoint, "--good", images, "--device", "cpu", "--false-alarm-rate", "0.2")

    with traced_once():
        for kind, name in (("onnx", "detector.onnx"), ("openvino", "detector.xml")):
            export(checkpoint, kind, folder / name)
    return folder


def run(code, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", MISSING + code, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def call_without(*arguments):
    return run("sys.argv[0] = 'recontrast'\nfrom recontrast.app.cli import main\nmain()", *arguments)


def read_results(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["detector.onnx", "detector.xml"])
def test_predict_writes_the_same_files(files, tmp_path, name):
    works("predict", files / name, files / "images", "--out", tmp_path / "with", "--maps", "npy", "--decide")
    done = call_without("predict", files / name, files / "images", "--out", tmp_path / "without", "--maps", "npy",
                        "--decide")  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = read_results(tmp_path / "without")
    assert results == read_results(tmp_path / "with") and {path.suffix for path in results} >= {".csv", ".npy", ".png"}


def test_python_interface(files):
    code = "import recontrast\np = recontrast.load(sys.argv[1]).predict(sys.argv[2])[0]\nprint(p.score, p.decision)"
    done = run(code, files / "detector.onnx", files / "images")
    expected = recontrast.load(files / "detector.onnx").predict(files / "images")[0]
    assert done.stdout.split() == [str(expected.score), expected.decision], done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("predict", "checkpoint.pt", "images", "--out", "x"),
        ("predict", "detector.onnx", "images", "--out", "x", "--device", "cuda"),
        ("train", "good"),
        ("evaluate", "checkpoint.pt", "good"),
        ("info",),
    ],
    ids=" ".join,
)
def test_other_commands_say_what_is_missing(files, tmp_path, arguments):
    done = call_without(*(str(files / word) if (files / word).exists() else word for word in arguments))
    assert done.returncode == 2 and "wanted the package torch for this command, got none installed" in done.stderr
    assert done.stderr.count("\n") == 1 and not (Path.cwd() / "x").exists()


def test_doctor_and_help():
    doctor = call_without("doctor")
    assert doctor.returncode == (metrics.REGIONS_BACKEND != "native")  # SciPy is hidden too, and one is promised
    assert "missing  torch" in doctor.stdout and "pip install torch" in doctor.stdout
    assert call_without("--help").returncode == 0
