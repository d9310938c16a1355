"""Tests of the torch version check in setup.py."""

import os
import subprocess
import venv
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """Return the Python and the site-packages folder of an empty virtual environment."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return python, Path(site)


def run_setup(empty, version):
    """Run ``setup.py --version`` with torch ``version`` in site-packages and the setuptools of the caller."""
    python, site = empty
    (site / "torch").mkdir(exist_ok=True)
    (site / "torch" / "version.py").write_text(f"__version__ = '{version}'\ndebug = False\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(setuptools.__file__).parents[1]), "PYTHONWARNINGS": "ignore"}
    command = [python, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("version", ["2.10.1+cpu", "1.13.1", "2.9.0a0"])
def test_older_torch_is_refused_in_one_sentence(empty, version):
    process = run_setup(empty, version)
    assert process.returncode != 0
    message = f"recontrast needs torch >= 2.11, got torch {version} in {empty[1]}: upgrade it, or use another venv"
    assert process.stderr.strip().splitlines() == [message]


@pytest.mark.parametrize("version", ["2.11.0", "2.14.1+cu130", "3.0.0"])
def test_newer_torch_is_accepted(empty, version):
    process = run_setup(empty, version)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split()[-1].count(".") == 2  # only the version: torch was not downloaded
