"""The C++ sources are valid for other systems: syntax and types alone, since nothing of it can run here.

MinGW has Windows' C library, clang with libc++ what macOS has, and GCC for aarch64 the other processor of the wheels.
"""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
COMPILERS = {
    "windows": ("x86_64-w64-mingw32-g++-posix",),
    "libc++": ("clang++-16", "-stdlib=libc++"),
    "aarch64": ("aarch64-linux-gnu-g++",),
}
OPERATORS = sorted((ROOT / "csrc").glob("*.cpp"))
METRICS = sorted((ROOT / "csrc/metrics").glob("*.cpp"))


def check(system, source, *options):
    command, *others = COMPILERS[system]
    if shutil.which(command) is None:
        assert not os.environ.get("RECONTRAST_COMPILERS"), f"wanted the compiler {command}, got none"
        pytest.skip(f"no {command} on this machine")
    # CMake's standard has the extensions of GNU; wide vectors are passed only between inlined functions.
    fixed = ["-std=gnu++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    done = subprocess.run([command, *others, *fixed, *options, source], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("source", OPERATORS, ids=lambda path: path.stem)
@pytest.mark.parametrize("system", COMPILERS)
def test_operators(system, source):
    include = Path(torch.__file__).parent / "include"
    stable = ("-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020b000000000000")
    check(system, source, "-isystem", include, *stable)


@pytest.mark.parametrize("source", METRICS, ids=lambda path: path.stem)
@pytest.mark.parametrize("system", COMPILERS)
def test_metrics(system, source):
    options = []
    if source.name == "metrics.cpp":  # the module, with Python's headers, which are those of this system
        if system != "libc++":
            pytest.skip("needs Python's headers of that system")
        pybind11 = pytest.importorskip("pybind11")
        options = ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
    check(system, source, *options)
