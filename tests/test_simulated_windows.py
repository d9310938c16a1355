"""Every command where the system refuses what Windows refuses, see `simulate_windows`.

This shows that nothing of the package needs a call that Windows lacks, and that no open file is replaced or removed. It
does not show that the package runs on Windows.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import SMALL
from small_detectors import build_onnx, save_onnx
from tiny import tiny_set

TESTS = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks up open files in /proc")


def run(*arguments, status=0):
    done = subprocess.run(
        [sys.executable, TESTS / "simulate_windows.py", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a data set and a trained, calibrated run."""
    folder = tmp_path_factory.mktemp("windows")
    tiny_set(folder / "data", train=24)
    tiny_set(folder / "more", train=24, seed=5)
    run("train", folder / "data" / "nut", "--out", folder / "run", "--holdout", "0.8", *SMALL)
    return folder


def leftovers(folder):
    return [path for path in folder.rglob(".recontrast*")]


def test_run_is_complete_and_can_be_replaced_and_resumed(work):
    names = {path.name for path in (work / "run").iterdir()}
    assert {"checkpoint.pt", "log.jsonl", "recipe.yaml"} <= names
    assert not leftovers(work)
    arguments = ("train", work / "data" / "nut", "--out", work / "other", *SMALL)
    run(*arguments)
    run(*arguments, "--overwrite")
    run(*arguments, "--resume", "--steps", "3", status=2)  # another recipe: one sentence
    assert not leftovers(work)


def test_results_of_every_command(work):
    run("calibrate", work / "run", "--good", work / "more" / "nut" / "train" / "good", "--false-alarm-rate", "0.2")
    run("evaluate", work / "run", work / "data", "--save-maps", "--out", work / "evaluation")
    for _ in range(2):  # the second call replaces the results of the first
        run(
            "predict",
            work / "run",
            work / "data" / "nut" / "test",
            "--out",
            work / "out",
            "--maps",
            "npy",
        )
    assert (work / "out" / "scores.csv").exists()
    run("report", work / "run", work / "data" / "nut", "--out", work / "report.html")
    run("prepare", "--help")
    run("info")
    assert not leftovers(work)


def test_export(work):
    """The two files of OpenVINO, which come by way of ONNX, and a small file of ONNX."""
    file = work / "detector.xml"
    run("export", work / "run", "--format", "openvino", "--out", file)
    save_onnx(work / "small.onnx", build_onnx())
    for path in (file, work / "small.onnx"):
        run("predict", path, work / "data" / "nut" / "test", "--out", work / f"exported-{path.suffix[1:]}")
    assert not leftovers(work)


SERVED = """
import sys
from pathlib import Path
import simulate_windows
simulate_windows.simulate()
import small_detectors
from command_line import works
from recontrast.inference.detector import open_detector
from recontrast.service.detectors import ServedDetector

folder, good = Path(sys.argv[1]), sys.argv[2]
folder.mkdir()
writers = {"d.onnx": small_detectors.export_onnx, "d.xml": small_detectors.export_openvino,
           "d.pt2": small_detectors.export_pt2}
for name, write in writers.items():
    served = ServedDetector("d", write(folder / name), lambda path: open_detector(path, "cpu"), print)
    former = served.current
    works("calibrate", folder / name, "--good", good, "--false-alarm-rate", 0.2)
    assert not served.reload_if_changed() and served.reload_if_changed()
    assert served.current.sha256 != former.sha256 and served.current.detector.calibration.count == 24
    assert former.detector.calibration is None
"""


def test_files_are_replaced_while_a_service_runs_them(work):
    """A new calibration of each kind of exported file; none of its files is open or mapped."""
    done = subprocess.run(
        [sys.executable, "-c", SERVED, work / "served", work / "more/nut/train/good"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not leftovers(work)


def test_leftovers_of_a_killed_command_are_removed(work):
    killed = work / "run" / ".recontrast-0123456789abcdef.tmp"
    killed.mkdir()
    (killed / ".recontrast-folder.lock").touch()
    (work / "run" / ".recontrast-fedcba9876543210.tmp").touch()
    for path in (killed / ".recontrast-folder.lock", work / "run" / ".recontrast-fedcba9876543210.tmp"):
        os.utime(path, (0, 0))
    run("calibrate", work / "run", "--good", work / "more" / "nut" / "train" / "good", "--false-alarm-rate", "0.2")
    assert not leftovers(work)


def test_tests_of_files_and_processes():
    """Tests of what differs most between the systems; those that call what Windows lacks themselves are skipped."""
    names = ("atomic", "cache", "locks", "regular_file", "synthetic", "unfinished")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:xdist", "-p", "no:cacheprovider", "-p",
         "simulate_windows", *(f"tests/data/test_{name}.py" for name in names)],
        env=environment | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fork does not exist on this system" in done.stdout
