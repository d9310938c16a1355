"""Builds the libraries with CMakeLists.txt and adds them to the package. Metadata: pyproject.toml.

The operator libraries use PyTorch's stable ABI: one build works with every torch >= 2.11. They are built into
recontrast/ in the checkout and copied from there, so that Python started in the checkout finds them too.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
PACKAGE = ROOT / "recontrast"
OLDEST = (2, 11)  # the first torch whose stable ABI has everything that csrc/ uses
# pip builds in an isolated environment, but purelib is the site-packages that it installs into.
SITE = Path(sysconfig.get_path("purelib"))


def installed_torch():
    """Directory of the torch installed in SITE, or None; exits if it is too old."""
    if not (SITE / "torch" / "version.py").exists():
        return None
    version = re.search(r"__version__ = '([^']+)'", (SITE / "torch" / "version.py").read_text()).group(1)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        sys.exit(f"recontrast needs torch >= {wanted}, got torch {version} in {SITE}: upgrade it, or use another venv")
    return SITE / "torch"


def program(name):
    """Path of cmake or ninja: from the Python package if it is installed, else from the PATH."""
    try:
        module = __import__(name)
        return str(Path(getattr(module, "CMAKE_BIN_DIR", None) or module.BIN_DIR) / name)
    except ImportError:
        path = shutil.which(name)
    return path or sys.exit(f"recontrast's build needs {name}, got none: pip install {name}")


class CMakeBuild(build_ext):
    """Builds with CMake instead of the compiler of setuptools."""

    def run(self):
        """Build ``_cpu.so``, ``_metrics.*.so`` and, if there is nvcc, ``_cuda.so`` into the package."""
        import pybind11

        torch = TORCH
        if torch is None:  # pip downloaded one for this build
            import torch as build_torch

            torch = Path(build_torch.__file__).parent
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        libraries = [PACKAGE / "_cpu.so", PACKAGE / "_cuda.so", PACKAGE / f"_metrics{suffix}"]
        for library in libraries:  # from an earlier build, perhaps with another compiler
            library.unlink(missing_ok=True)
        options = {
            "RECONTRAST_OUT": PACKAGE,
            "TORCH": torch,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "Python_EXECUTABLE": sys.executable,
            "CMAKE_MAKE_PROGRAM": program("ninja"),
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        # --fresh: the cache of an earlier `pip install .` names a ninja of an environment that is gone.
        cmake = program("cmake")
        subprocess.run([cmake, "--fresh", "-S", ROOT, "-B", self.build_temp, "-G", "Ninja", *defines], check=True)
        subprocess.run([cmake, "--build", self.build_temp], check=True)
        self.built = [library for library in libraries if library.exists()]
        if not self.inplace:
            for library in self.built:
                target = Path(self.build_lib).resolve() / "recontrast" / library.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(library, target)

    def get_outputs(self):
        return [str(Path(self.build_lib) / "recontrast" / library.name) for library in getattr(self, "built", [])]


TORCH = installed_torch()
setup(
    setup_requires=[] if TORCH else [f"torch>={'.'.join(map(str, OLDEST))}"],  # download torch only if there is none
    ext_modules=[Extension("recontrast._metrics", [])],  # makes setuptools run build_ext and tag the wheel per Python
    cmdclass={"build_ext": CMakeBuild},
)
