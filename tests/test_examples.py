"""Tests of the examples: each runs in its own process on the demo's data, as a user would run it, but shorter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recontrast import ops
from recontrast.data.synthetic import make_demo

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
# tests/export/test_export.py and tests/service/test_examples.py run these.
NEEDS_A_FILE = ("onnx_production", "client")
# Options that shorten an example, if it has them.
SHORT = {"--steps": "2", "--size": "64"}
# Patterns of the output. An example without an entry must print something; all must exit with 0 and an empty stderr.
OUTPUTS = {
    "own_loop": r"step 1: loss [\d.]+\n(.*\n)*64 test images: I-AUROC [\d.]+",
    "own_architecture": r"\| brick \| 64 \| [\d.]+ \|(.*\n)*.*mean of the pairs, blur zero5, score 0.01",
    "losses_in_your_model": r"Dinomaly's rule: loss [\d.]+ -> [\d.]+, I-AUROC .*\nINP-Former's rule: loss",
    "scikit_learn": r"AUROC [\d.]+\n(.*\n)*maps: \(2, 64, 64\)\n(.*\n)*read from the disk, it scores the same: True",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_demo(tmp_path_factory.mktemp("examples") / "data", train=12, test=8, size=64)


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.stem not in NEEDS_A_FILE], ids=lambda path: path.stem
)
def test_example_runs(path, data, tmp_path):
    options = {**SHORT, "--data": str(data)}
    arguments = [word for name, value in options.items() if f'"{name}"' in path.read_text() for word in (name, value)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    if ops.BACKEND["cpu"] == "torch":
        environment["PYTHONWARNINGS"] += ",ignore:recontrast runs"
    process = subprocess.run(
        [sys.executable, str(path), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0 and not process.stderr, process.stdout + process.stderr
    assert re.search(OUTPUTS.get(path.stem, r"\S"), process.stdout), process.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_documented_and_public(path):
    """The first lines give the command, the README lists the file, and it uses public names only."""
    text = path.read_text()
    command = f"python examples/{path.name}"
    assert command in text.split("import", 1)[0] or "torchrun" in text.split("import", 1)[0]
    assert path.name in (ROOT / "examples" / "README.md").read_text()
    assert not re.search(r"recontrast\.app|recontrast\.\w*\._|import _", text)
    assert len(text.splitlines()) <= 120
