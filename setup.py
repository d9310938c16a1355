"""Builds the libraries with CMakeLists.txt and adds them to the package. Metadata: pyproject.toml.

``RECONTRAST_BUILD`` decides what is built: "native" all of them, or the installation fails; "python" none, for a
package of Python files alone; "auto", the default, what this machine can build. The file ``_build.json`` in the package
says what is missing and why, which `recontrast.backend` reports.

The operator libraries use PyTorch's stable ABI: one build works with every torch >= 2.11. They are built into
recontrast/ in the checkout and copied from there, so that Python started in the checkout finds them too.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
PACKAGE = ROOT / "recontrast"
OLDEST = (2, 11)  # the first torch whose stable ABI has everything that csrc/ uses
# pip builds in an isolated environment, but purelib is the site-packages that it installs into.
SITE = Path(sysconfig.get_path("purelib"))
MODES = ("auto", "native", "python")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
LIBRARIES = {"_cpu": PACKAGE / "_cpu.so", "_cuda": PACKAGE / "_cuda.so", "_metrics": PACKAGE / f"_metrics{SUFFIX}"}


def read_mode():
    """Return ``RECONTRAST_BUILD``; exits if it has another value than those of `MODES`."""
    mode = os.environ.get("RECONTRAST_BUILD") or "auto"
    if mode not in MODES:
        sys.exit(f"RECONTRAST_BUILD: wanted one of {', '.join(MODES)}, got {mode!r}")
    return mode


def read_torch_version():
    """Return the version of the torch installed in SITE, or None."""
    try:
        return re.search(r"__version__ = '([^']+)'", (SITE / "torch" / "version.py").read_text()).group(1)
    except FileNotFoundError:
        return None


def find_obstacles():
    """Return library -> why it cannot be built on this machine."""
    if MODE == "python":
        return dict.fromkeys(LIBRARIES, "RECONTRAST_BUILD=python chose a package without compiled kernels")
    obstacles = {}
    usual = ["c++", "g++", "clang++", *(["cl", "clang-cl"] if sys.platform == "win32" else [])]
    compilers = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else usual
    if not any(map(shutil.which, compilers)):
        obstacles = dict.fromkeys(LIBRARIES, f"no C++ compiler was found ({', '.join(compilers)})")
    elif not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        obstacles["_metrics"] = "the headers of Python were not found (python3-dev)"
    if sys.platform == "win32" and "_cpu" not in obstacles:
        reason = "its vector types need GCC or Clang, and PyTorch is built with MSVC on Windows"
        obstacles |= {"_cpu": reason, "_cuda": reason}
    old = TORCH_VERSION and tuple(int(part) for part in re.findall(r"\d+", TORCH_VERSION)[:2]) < OLDEST
    if old and "_cpu" not in obstacles:
        reason = f"it needs torch >= {'.'.join(map(str, OLDEST))}, got torch {TORCH_VERSION} in {SITE}"
        obstacles |= {"_cpu": reason, "_cuda": reason}
    if MODE == "native" and obstacles:
        library, reason = next(iter(obstacles.items()))
        sys.exit(f"RECONTRAST_BUILD=native: {library} cannot be built: {reason}")
    return obstacles


def program(name):
    """Path of cmake or ninja: from the Python package if it is installed, else from the PATH."""
    try:
        module = __import__(name)
        return str(Path(getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR) / name)
    except ImportError:
        path = shutil.which(name)
    return path or sys.exit(f"recontrast's build needs {name}, got none: pip install {name}")


def write_record(missing):
    """Write which libraries are missing and why; a record of an earlier build is replaced."""
    version = re.search(r'__version__ = "([^"]+)"', (PACKAGE / "__init__.py").read_text()).group(1)
    record = {"version": version, "mode": MODE, "missing": missing}
    (PACKAGE / "_build.json").write_text(json.dumps(record, indent=1) + "\n")


class BuildPython(build_py):
    """Copies the Python files, after a record of what is not built."""

    def run(self):
        if "_cpu" in OBSTACLES and "_metrics" in OBSTACLES:  # else CMakeBuild writes it
            for library in LIBRARIES.values():  # of an earlier build
                library.unlink(missing_ok=True)
            write_record(OBSTACLES)
        super().run()


class CMakeBuild(build_ext):
    """Builds with CMake instead of the compiler of setuptools."""

    def run(self):
        """Build ``_cpu.so``, ``_metrics.*.so`` and, if there is nvcc, ``_cuda.so`` into the package."""
        for library in LIBRARIES.values():  # from an earlier build, perhaps with another compiler
            library.unlink(missing_ok=True)
        options = {
            "RECONTRAST_OUT": PACKAGE,
            "RECONTRAST_METRICS": "OFF" if "_metrics" in OBSTACLES else "ON",
            "RECONTRAST_OPERATORS": "OFF" if "_cpu" in OBSTACLES else "ON",
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_MAKE_PROGRAM": program("ninja"),
        }
        if "_cpu" not in OBSTACLES:
            options["TORCH"] = find_torch()
        if "_metrics" not in OBSTACLES:
            import pybind11

            options["pybind11_DIR"] = pybind11.get_cmake_dir()
        missing = {**OBSTACLES, **self._compile([f"-D{name}={value}" for name, value in options.items()])}
        write_record(missing)
        self.built = [library for library in (*LIBRARIES.values(), PACKAGE / "_build.json") if library.exists()]
        if not self.inplace:
            for library in self.built:
                target = Path(self.build_lib).resolve() / "recontrast" / library.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(library, target)

    def _compile(self, defines):
        """Run CMake; return library -> why it was not built. With "native", a failure is raised."""
        # --fresh: the cache of an earlier `pip install .` names a ninja of an environment that is gone.
        configure = [program("cmake"), "--fresh", "-S", ROOT, "-B", self.build_temp, "-G", "Ninja", *defines]
        compile = [program("cmake"), "--build", self.build_temp]
        is_strict = MODE == "native"
        done = subprocess.run(configure, check=is_strict)
        if done.returncode == 0:  # -k 0: a library that does not compile does not keep others from it
            done = subprocess.run(compile if is_strict else [*compile, "--", "-k", "0"], check=is_strict)
        failed = "it did not compile (pip install -v shows the messages of the compiler)"
        missing = {name: failed for name, library in LIBRARIES.items() if not library.exists()}
        if "_cuda" in missing and "_cpu" not in missing and done.returncode == 0:
            missing["_cuda"] = "no CUDA compiler (nvcc) was found"
        return {name: reason for name, reason in missing.items() if name not in OBSTACLES}

    def get_outputs(self):
        return [str(Path(self.build_lib) / "recontrast" / library.name) for library in getattr(self, "built", [])]


def find_torch():
    """Return the directory of torch: that of SITE, or the one that pip downloaded for this build."""
    if TORCH_VERSION:
        return SITE / "torch"
    import torch

    return Path(torch.__file__).parent


MODE, TORCH_VERSION = read_mode(), read_torch_version()
OBSTACLES = find_obstacles()
needs_torch = "_cpu" not in OBSTACLES and not TORCH_VERSION  # download torch only if there is none
setup(
    setup_requires=[f"torch>={'.'.join(map(str, OLDEST))}"] if needs_torch else [],
    # An extension makes setuptools run build_ext and tag the wheel per Python and platform.
    ext_modules=[] if {"_cpu", "_metrics"} <= set(OBSTACLES) else [Extension("recontrast._metrics", [])],
    cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
)
