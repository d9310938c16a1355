"""Examples in other languages, and the client: the scores and decisions of `predict`."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from client import serving
from command_line import works
from PIL import Image
from small_detectors import export_onnx, export_openvino

from recontrast.inference.detector import open_detector

ROOT = Path(__file__).parents[2]


def run(*command, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("environment", {})}
    process = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=600, env=environment, **options
    )
    return process.returncode, process.stdout, process.stderr


@pytest.fixture(scope="module")
def pictures(images, tmp_path_factory):
    """The images as binary PPM files, one with a comment in its header."""
    folder = tmp_path_factory.mktemp("ppm")
    paths = []
    for path in images:
        picture = Image.open(path).convert("RGB")
        paths.append(folder / f"{path.stem}.ppm")
        picture.save(paths[-1])
    content = paths[0].read_bytes()
    assert content.startswith(b"P6\n64 64\n255\n")
    paths[0].write_bytes(content.replace(b"P6\n64 64\n", b"P6 # a camera\n64\t64\n", 1))
    return paths


def check_lines(lines, pictures, detector):
    """Compare lines of path, score, p-value and decision with those of Python."""
    predictions = detector.predict(pictures, batch=1)
    assert len(lines) == len(pictures)
    for line, path, wanted in zip(lines, pictures, predictions, strict=True):
        name, score, p_value, decision = line.split()
        assert name == str(path) and float(score) == pytest.approx(wanted.score, rel=1e-5)
        assert float(p_value) == pytest.approx(wanted.p_value, abs=1 / 40 + 1e-6)  # one rank, where scores tie
        assert decision == wanted.decision
    assert {wanted.decision for wanted in predictions} == {"good", "defect"}


def test_client(calibrated, images, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"x")
    token = "a-token-of-the-tests"
    with serving({"main": calibrated}, token=token) as client:
        command = [sys.executable, ROOT / "examples/client.py", f"http://127.0.0.1:{client.port}"]
        code, printed, errors = run(*command, *images, environment={"RECONTRAST_TOKEN": token})
        assert code == 0 and not errors
        lines = [line.split() for line in printed.splitlines()]
        for path, (name, score, p_value, decision) in zip(images, lines, strict=True):
            answer = client.predict(path.read_bytes())
            assert (name, float(score)) == (str(path), answer["score"])
            assert (float(p_value), decision) == (answer["p_value"], answer["decision"])
        code, _, errors = run(*command, broken, environment={"RECONTRAST_TOKEN": token})
        assert code == 1 and "got a file that starts with" in errors and "Traceback" not in errors
        code, _, errors = run(*command, broken, environment={"RECONTRAST_TOKEN": ""})
        assert code == 1 and "wanted Bearer" in errors


def calibrate(path, checkpoint):
    """Calibrate an exported file on the good images of the calibrated checkpoint."""
    works("calibrate", path, "--good", checkpoint.parent / "good", "--false-alarm-rate", "0.05")
    return path


def test_cpp(calibrated, pictures, tmp_path):
    utilities = pytest.importorskip("openvino.utils")
    if shutil.which("cmake") is None or not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs cmake and a C++ compiler")
    exported = calibrate(export_openvino(tmp_path / "detector.xml"), calibrated)
    build = tmp_path / "build"
    cmake = ["cmake", "-S", ROOT / "examples/cpp", "-B", build, f"-DOpenVINO_DIR={utilities.get_cmake_path()}"]
    for command in (cmake, ["cmake", "--build", build]):
        code, printed, errors = run(*command)
        assert code == 0, printed + errors
    program = build / "inspect_image"
    code, printed, errors = run(program, exported, *pictures)
    assert code == 0 and not errors, errors
    check_lines(printed.splitlines(), pictures, open_detector(exported))
    whole = pictures[0].read_bytes()
    for content in (b"", b"P5\n1 1\n255\n0", b"P6\n", b"P6\n-1 2\n255\n", whole[:-1], b"P6\n9999999 1\n255\n"):
        (tmp_path / "bad.ppm").write_bytes(content)
        code, _, errors = run(program, exported, tmp_path / "bad.ppm")
        assert code == 1 and errors.startswith("inspect_image: ") and "bad.ppm: wanted" in errors
    assert run(program)[0] == 2
    assert run(program, tmp_path / "nowhere.xml", pictures[0])[0] == 1


def test_csharp(calibrated, pictures, tmp_path):
    if shutil.which("dotnet") is None:
        pytest.skip("needs the .NET SDK")
    exported = calibrate(export_onnx(tmp_path / "detector.onnx"), calibrated)
    project = shutil.copytree(ROOT / "examples/csharp", tmp_path / "csharp")
    code, printed, errors = run("dotnet", "build", "-c", "Release", "-o", tmp_path / "out", project)
    assert code == 0, printed + errors
    code, printed, errors = run(tmp_path / "out" / "InspectImage", exported, *pictures)
    assert code == 0, errors
    check_lines(printed.splitlines(), pictures, open_detector(exported))
    assert all(math.isfinite(float(line.split()[1])) for line in printed.splitlines())
