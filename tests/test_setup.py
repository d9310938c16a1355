"""Tests of what setup.py builds on which machine."""

import json
import os
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
SHOW = """
import json, runpy, sys, sysconfig, setuptools
keep = {}
setuptools.setup = keep.update
include = sys.argv[1]
if include:
    get_path = sysconfig.get_path
    sysconfig.get_path = lambda name, *rest: include if name == "include" else get_path(name, *rest)
variables = runpy.run_path("setup.py")
extensions = [extension.name for extension in keep["ext_modules"]]
print(json.dumps([variables["OBSTACLES"], extensions, keep["setup_requires"]]))
"""


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """Return the Python and the site-packages folder of an empty virtual environment."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return python, Path(site)


def run_setup(empty, version="2.11.0", mode="", has_compiler=True, include=""):
    """Run setup.py with torch ``version`` in site-packages, if any, and the setuptools of the caller."""
    python, site = empty
    shutil.rmtree(site / "torch", ignore_errors=True)
    if version:
        (site / "torch").mkdir()
        (site / "torch" / "version.py").write_text(f"__version__ = '{version}'\ndebug = False\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(setuptools.__file__).parents[1]), "PYTHONWARNINGS": "ignore"}
    environment |= {"RECONTRAST_BUILD": mode, "CXX": COMPILER or "" if has_compiler else "compiler-that-is-not-there"}
    command = [python, "-c", SHOW, include]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def plan(empty, **machine):
    process = run_setup(empty, **machine)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


has_compiler = pytest.mark.skipif(
    COMPILER is None or not (Path(sysconfig.get_path("include")) / "Python.h").exists(),
    reason="needs a C++ compiler and the headers of Python",
)


@has_compiler
@pytest.mark.parametrize("version", ["2.11.0", "2.14.1+cu130", "3.0.0"])
def test_everything_is_built_with_a_newer_torch(empty, version):
    assert plan(empty, version=version) == [{}, ["recontrast._metrics"], []]


@has_compiler
def test_torch_is_downloaded_where_there_is_none(empty):
    assert plan(empty, version=None) == [{}, ["recontrast._metrics"], ["torch>=2.11"]]


@has_compiler
@pytest.mark.parametrize("version", ["2.10.1+cpu", "2.6.0", "2.9.0a0"])
def test_only_metrics_are_built_with_an_older_torch(empty, version):
    obstacles, extensions, required = plan(empty, version=version)
    reason = f"it needs torch >= 2.11, got torch {version} in {empty[1]}"
    assert obstacles == {"_cpu": reason, "_cuda": reason}
    assert (extensions, required) == (["recontrast._metrics"], [])


def test_nothing_is_built_or_downloaded_without_a_compiler(empty):
    reason = "no C++ compiler was found (compiler-that-is-not-there)"
    expected = [dict.fromkeys(["_cpu", "_cuda", "_metrics"], reason), [], []]
    assert plan(empty, version=None, has_compiler=False) == expected


@has_compiler
def test_metrics_need_the_headers_of_python(empty, tmp_path):
    obstacles, extensions, _ = plan(empty, include=str(tmp_path))
    assert obstacles == {"_metrics": "the headers of Python were not found (python3-dev)"}
    assert extensions == ["recontrast._metrics"]  # the operators are built


def test_python_mode_builds_nothing(empty):
    obstacles, extensions, required = plan(empty, version=None, mode="python")
    assert set(obstacles) == {"_cpu", "_cuda", "_metrics"}
    assert (extensions, required) == ([], [])


def test_native_mode_needs_everything(empty):
    process = run_setup(empty, mode="native", has_compiler=False)
    reason = "no C++ compiler was found (compiler-that-is-not-there)"
    assert process.stderr == f"RECONTRAST_BUILD=native: _cpu cannot be built: {reason}\n"
    process = run_setup(empty, version="2.10.0", mode="native")
    assert process.returncode == 1
    assert "RECONTRAST_BUILD=native: _cpu cannot be built: " in process.stderr


def test_unknown_mode_is_one_sentence(empty):
    process = run_setup(empty, mode="fast")
    assert process.returncode == 1
    assert process.stderr == "RECONTRAST_BUILD: wanted one of auto, native, python, got 'fast'\n"
