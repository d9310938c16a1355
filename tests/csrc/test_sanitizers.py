"""_metrics and norm_act of _cpu under AddressSanitizer and UBSan: separate builds, fuzzed in subprocesses.

The scripts are fuzz_metrics.py and fuzz_norm_act.py.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from recontrast import ops

ROOT = Path(__file__).parents[2]
SECONDS, WHOLE = 4, 300  # of fuzzing, ordinarily and with `pytest -m campaign`; failures are reproducible by the seed


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


def build(folder, name, **options):
    """Build one library with the sanitizers, and return its path."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if cmake is None:
        pytest.skip("no cmake")
    options |= {
        "RECONTRAST_SANITIZE": "ON",
        "RECONTRAST_OUT": folder,
        "CMAKE_CXX_COMPILER": shutil.which("g++"),
        "Python_EXECUTABLE": sys.executable,
    } | ({"CMAKE_MAKE_PROGRAM": ninja} if ninja else {})
    generator = ["-G", "Ninja"] if ninja else []
    defines = [f"-D{name}={value}" for name, value in options.items()]
    for command in (
        [cmake, "-S", ROOT, "-B", folder / "cmake", *generator, *defines],
        [cmake, "--build", folder / "cmake"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    code = (folder / name).read_bytes()
    assert b"__asan_report_load" in code and b"__ubsan_handle" in code, "built without the sanitizers"
    return folder / name


@pytest.fixture(scope="module")
def metrics(sanitized, tmp_path_factory):
    """Path of _metrics, built with the sanitizers."""
    directory = pytest.importorskip("pybind11").get_cmake_dir()
    name = f"_metrics{sysconfig.get_config_var('EXT_SUFFIX')}"
    return build(tmp_path_factory.mktemp("metrics"), name, RECONTRAST_OPERATORS="OFF", pybind11_DIR=directory)


@pytest.fixture(scope="module")
def operators(sanitized, tmp_path_factory):
    """Path of _cpu with norm_act alone, built with the sanitizers."""
    if ops.BACKEND["cpu"] != "native":
        pytest.skip("THE KERNELS WERE NOT COMPILED")
    return build(tmp_path_factory.mktemp("operators"), "_cpu.so", RECONTRAST_METRICS="OFF")


def python(sanitized, *arguments):
    return subprocess.run([sys.executable, *arguments], env=sanitized, capture_output=True, text=True, timeout=600)


def test_sanitizer_detects_errors(sanitized):
    """Reading past the end of an array is an error; otherwise the next test could not fail."""
    done = python(
        sanitized, "-c", "import ctypes, numpy; a = numpy.zeros(9999, 'u1'); ctypes.string_at(a.ctypes.data, 10000)"
    )
    assert done.returncode == 99
    assert "heap-buffer-overflow" in done.stderr


def fuzz(request, sanitized, script, library):
    """Run a script that makes random calls of a library, and check that it ends well."""
    seconds = WHOLE if request.config.option.markexpr == "campaign" else SECONDS
    done = python(sanitized, ROOT / "tests" / script, library, "0", str(seconds))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert int(done.stdout.split()[0]) >= 50


@pytest.mark.campaign
def test_metrics(request, sanitized, metrics):
    fuzz(request, sanitized, "fuzz_metrics.py", metrics)


@pytest.mark.campaign
@pytest.mark.timeout(900)  # the build takes minutes on a busy machine
def test_norm_act(request, sanitized, operators):
    fuzz(request, sanitized, "fuzz_norm_act.py", operators)
