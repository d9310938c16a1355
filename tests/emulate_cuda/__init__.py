"""Compiles csrc/*.cu for the CPU with an emulated CUDA runtime, as operators ``torch.ops.recontrast_emulated``."""

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = shutil.which("g++")
NAMESPACE = "recontrast_emulated"


def build(folder: Path) -> Path:
    """Compile the emulated library into ``folder`` and return its path."""
    package = Path(torch.__file__).parent
    target = re.search(r"TORCH_TARGET_VERSION=\w+", (ROOT / "CMakeLists.txt").read_text()).group()
    flags = ["-std=c++20", "-O1", "-fPIC", "-w", "-U_FORTIFY_SOURCE", "-fno-math-errno", "-ffp-contract=off"]
    flags += ["-DTORCH_STABLE_ONLY", f"-D{target}", f"-I{HERE}", "-isystem", package / "include"]
    # Calls a hook of traffic.cpp before each access to memory; vectors are accessed as a whole.
    hooks = ["-fsanitize=kernel-address", "-fno-tree-sra"]
    for name, value in (("instrumentation-with-call-threshold", 0), ("stack", 0), ("globals", 0)):
        hooks += ["--param", f"asan-{name}={value}"]
    commands = [[*flags, "-c", HERE / "traffic.cpp"]]
    for source in sorted((ROOT / "csrc").glob("*.cu")):
        commands.append([*flags, *hooks, "-include", HERE / "registry.h", "-x", "c++", "-c", source])
    runs = []
    for command in commands:
        out = ["-o", folder / f"{Path(command[-1]).stem}.o"]
        runs.append(subprocess.Popen([COMPILER, *command, *out], stderr=subprocess.PIPE, text=True))
    for run in runs:
        errors = run.communicate()[1]
        if run.returncode:
            raise RuntimeError(errors)
    library = folder / "emulated.so"
    libraries = [package / "lib/libtorch.so", package / "lib/libtorch_cpu.so"]
    link = [COMPILER, "-shared", "-Wl,--no-as-needed", "-o", library, *folder.glob("*.o"), *libraries]
    subprocess.run(link, check=True)
    return library


class Emulator(NamedTuple):
    """The operators, and ``emulate(processors, backwards)``, which sets the multiprocessors and the thread order."""

    operators: Any
    emulate: Callable[[int, bool], None]
    library: Path


def load(folder: Path) -> Emulator:
    """Compile the kernels and register them as operators."""
    from recontrast.ops import SCHEMAS

    library = build(folder)
    for name, schema in SCHEMAS.items():
        torch.library.define(f"{NAMESPACE}::{name}", schema)
    torch.ops.load_library(library)
    emulate = ctypes.CDLL(str(library)).emulate
    emulate.argtypes = (ctypes.c_int, ctypes.c_bool)
    return Emulator(getattr(torch.ops, NAMESPACE), emulate, library)


def twice(emulated, function, processors=4):
    """The result of ``function``, which must not depend on the order of threads."""
    results = []
    for backwards in (False, True):
        emulated.emulate(processors, backwards)
        result = function(emulated.operators)
        results.append([result] if isinstance(result, torch.Tensor) else list(result))
    for forwards, reversed_order in zip(*results, strict=True):
        assert torch.equal(forwards.nan_to_num(7.0), reversed_order.nan_to_num(7.0))
    return results[0]
