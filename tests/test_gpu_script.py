"""`benchmarks/gpu.sh` on a machine without a GPU: stubs that write down their calls replace what needs one."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/gpu.sh"
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("bash") is None, reason="THE SCRIPT NEEDS BASH AND GNU PROGRAMS"
)
# Real only for the script's own two programs: the notes, and the name of the device.
PYTHON = """#!{bash}
echo "python blocking=${{CUDA_LAUNCH_BLOCKING:-}} backend=${{RECONTRAST_BACKEND:-}} $*" >> {calls}
case "$*" in
  "- cuda") cat > /dev/null; echo h200-stub ;;
  "- cpu") cat > /dev/null; echo cpu-stub ;;
  "- "*) exec {python} "$@" ;;
  *get_device_capability*) echo 90 ;;
  *dirname*) echo /torch ;;
  *pytest*) if [ -e {folder}/fails ] && [[ "$*" == *tests/test_loss.py* ]]; then
      printf 'FAILED tests/test_loss.py::test_a[cuda] - boom\\nFAILED tests/test_loss.py::test_b - x\\n'
      echo "2 failed, 3 passed in 1s"
      exit 1
    fi
    echo "5 passed in 1s" ;;
  *"gpu.py loss"*) if [ -e {folder}/slow ]; then sleep 30; fi ;;
esac
"""
STUB = '#!{bash}\necho "{name} $*" >> {calls}\n{body}'


@pytest.fixture
def tree(tmp_path):
    """A copy of the script in a tree without kernels, and stubs in a folder of their own."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "recontrast").mkdir()
    (tmp_path / "bin").mkdir()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc/a.cu").touch()
    shutil.copy(SCRIPT, tmp_path / "benchmarks/gpu.sh")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    (tmp_path / "recontrast/_cuda.so").write_text("old")
    add_stub(tmp_path, "python3", None)
    add_stub(tmp_path, "cmake", f'[[ "$*" == *--build* ]] && touch {tmp_path}/recontrast/_cuda.so; true\n')
    add_stub(tmp_path, "nvcc", f"touch {tmp_path}/recontrast/_cuda.so\n")
    for name in ("ncu", "compute-sanitizer"):
        add_stub(tmp_path, name, 'echo "ERROR SUMMARY: 0 errors"\n')
    return tmp_path


def add_stub(tree, name, body):
    values = {"bash": shutil.which("bash"), "calls": tree / "calls", "python": sys.executable, "folder": tree}
    path = tree / "bin" / name
    path.write_text(PYTHON.format(**values) if body is None else STUB.format(name=name, body=body, **values))
    path.chmod(0o755)


def run(tree, *stages, **variables):
    """Run the script; return its output, the calls of the stubs and the stages in the results."""
    environment = {"HOME": str(tree), "PATH": f"{tree / 'bin'}:/usr/bin:/bin", "PYTHON": str(tree / "bin/python3")}
    (tree / "calls").unlink(missing_ok=True)
    out = tree / "out"
    out.mkdir(exist_ok=True)
    done = subprocess.run(
        ["bash", tree / "benchmarks/gpu.sh", *stages],
        env=environment | {"OUT": str(out), "CUDA_HOME": str(tree)} | variables,
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    results = out / "h200-stub.json"
    record = json.loads(results.read_text()) if results.exists() else {}
    return done.stdout + done.stderr, (tree / "calls").read_text().splitlines(), record.get("stages", {})


def measured(calls):
    return [
        call.partition("benchmarks/gpu.py ")[2].split()[0]
        for call in calls
        if call.startswith("python") and "benchmarks/gpu.py" in call
    ]


def test_two_parts(tree):
    output, calls, stages = run(tree, "first")
    assert measured(calls) == ["map", "loss", "table"], output
    assert list(stages) == ["build", "test", "map", "loss"]
    assert all(note.startswith("status 0 ") for note in stages.values())
    assert any(call.startswith("cmake --build") for call in calls)
    assert not any(call.startswith("nvcc") for call in calls)
    (tree / "recontrast/_cuda.so").write_text("built in the first part")
    output, calls, stages = run(tree, "rest")
    assert not any(call.startswith(("cmake", "nvcc")) for call in calls)
    assert (tree / "recontrast/_cuda.so").read_text() == "built in the first part"
    assert measured(calls)[:5] == ["train", "norms", "evaluate", "profile", "rivals"]
    # What the first part has noted is kept.
    assert {"build", "loss", "train", "ncu", "whole", "triton loss", "sanitize", "races"} <= set(stages)
    order = [call.split()[0] for call in calls if call.startswith(("ncu", "compute-sanitizer"))]
    assert order == ["ncu", "compute-sanitizer", "compute-sanitizer"]
    assert sum("backend=triton" in call for call in calls if "gpu.py" in call) == 3


def test_kernels_are_built_without_cmake(tree):
    add_stub(tree, "cmake", "exit 1\n")
    output, calls, stages = run(tree, "build")
    (compiled,) = (call for call in calls if call.startswith("nvcc"))
    assert "-shared" in compiled and "-arch=sm_90" in compiled and "csrc/a.cu" in compiled
    assert "TORCH_TARGET_VERSION=0x" in compiled and "-isystem /torch/include" in compiled
    assert "compiled by nvcc alone" in output
    assert "status 1" in stages["build"]
    add_stub(tree, "nvcc", "exit 1\n")
    output, _, stages = run(tree, "build")
    assert "NO NATIVE KERNELS" in stages["build"]
    assert not (tree / "recontrast/_cuda.so").exists()  # no old library is measured


def test_first_failure_is_run_again_alone(tree):
    (tree / "fails").touch()
    _, calls, stages = run(tree, "test")
    first, again = (call for call in calls if "pytest" in call)
    assert "blocking= " in first
    assert "blocking=1 " in again
    assert "tests/test_loss.py::test_a[cuda]" in again and "test_cosine" not in again
    assert "2 failed, 3 passed" in stages["test"]
    assert "test again" in stages


def test_time_that_is_left(tree):
    """No stage starts without time left; LIMIT is cut to what one command on a lent machine may take."""
    _, calls, stages = run(tree, "map", "loss", LIMIT="27")
    assert measured(calls) == ["table"]
    assert stages == {"map": "no time left", "loss": "no time left"}
    _, calls, _ = run(tree, "loss", LIMIT="9999")
    (call,) = (call for call in calls if "gpu.py loss" in call)
    assert call.endswith("--seconds 75")


def test_a_stage_that_takes_too_long_is_ended(tree):
    (tree / "slow").touch()
    _, calls, stages = run(tree, "loss", "train", LIMIT="32")
    assert "status 124" in stages["loss"] or "status 137" in stages["loss"]
    assert stages["train"] == "no time left"
    assert measured(calls)[-1] == "table"


def test_results_of_a_full_run_start_anew(tree):
    results = tree / "benchmarks/results"
    results.mkdir()
    (results / "h200-stub.json").write_text('{"stages": {"old": "status 0"}}')
    _, _, stages = run(tree, "map")
    assert "old" in stages
    _, _, stages = run(tree, "first")
    assert "old" not in stages


def test_measured_stages_exist():
    lines = [line.split() for line in SCRIPT.read_text().replace('"', "").splitlines()]
    stages = {words[-1] for words in lines if words[:1] == ["measure"]}
    program = (ROOT / "benchmarks/gpu.py").read_text()
    assert {"map", "loss", "train", "rivals"} <= stages
    for name in (stages - {"ours", "reference"}) | {"kernels"}:
        assert f'"{name}":' in program
    assert os.access(SCRIPT, os.X_OK)
