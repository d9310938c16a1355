"""recontrast._metrics under AddressSanitizer and UBSan: a separate build, fuzzed by fuzz_metrics.py in a subprocess."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 4  # of fuzzing; the seed is fixed, so failures are reproducible


@pytest.fixture(scope="module")
def sanitized():
    """Environment that loads libasan before Python."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++, whose libasan is preloaded")
    # libasan intercepts exceptions of libstdc++, which Python would load too late.
    libraries = [
        subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("g++ has no libasan")
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",  # Python itself does not free everything
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99",
        "PYTHONMALLOC": "malloc",  # Python's pools would hide reads past the end of an array
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="module")
def module(sanitized, tmp_path_factory):
    """Path of the module, built with the sanitizers."""
    pybind11 = pytest.importorskip("pybind11")
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    build = tmp_path_factory.mktemp("sanitized")
    if cmake is None:
        pytest.skip("no cmake")
    options = {
        "RECONTRAST_SANITIZE": "ON",
        "RECONTRAST_OUT": build,
        "CMAKE_CXX_COMPILER": shutil.which("g++"),
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    } | ({"CMAKE_MAKE_PROGRAM": ninja} if ninja else {})
    generator = ["-G", "Ninja"] if ninja else []
    defines = [f"-D{name}={value}" for name, value in options.items()]
    for command in (
        [cmake, "-S", ROOT, "-B", build / "cmake", *generator, *defines],
        [cmake, "--build", build / "cmake"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    built = build / f"_metrics{sysconfig.get_config_var('EXT_SUFFIX')}"
    code = built.read_bytes()
    assert b"__asan_report_load" in code and b"__ubsan_handle" in code, "built without the sanitizers"
    return built


def python(sanitized, *arguments):
    return subprocess.run([sys.executable, *arguments], env=sanitized, capture_output=True, text=True, timeout=600)


def test_sanitizer_detects_errors(sanitized):
    """Reading past the end of an array is an error; otherwise the next test could not fail."""
    done = python(
        sanitized, "-c", "import ctypes, numpy; a = numpy.zeros(9999, 'u1'); ctypes.string_at(a.ctypes.data, 10000)"
    )
    assert done.returncode == 99
    assert "heap-buffer-overflow" in done.stderr


def test_boundary(sanitized, module):
    done = python(sanitized, ROOT / "tests" / "fuzz_metrics.py", module, "0", str(SECONDS))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert int(done.stdout.split()[0]) >= 50
