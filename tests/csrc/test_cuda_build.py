"""Every CUDA source compiles for every architecture of the wheel, and no kernel spills registers."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
ARCHITECTURES = (80, 90, 120)  # A100; H100, H200; RTX 50
NVCC = shutil.which("nvcc") or shutil.which(
    "nvcc", path=os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")
)
CMAKE = (ROOT / "CMakeLists.txt").read_text()

PTXAS = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<arch>\d+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def compile_command(source, out):
    include = Path(torch.__file__).parent / "include"
    target = re.search(r"TORCH_TARGET_VERSION=\w+", CMAKE).group()
    command = [NVCC, "-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_STABLE_ONLY", f"-D{target}", "-isystem", include]
    for arch in ARCHITECTURES:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    return [*command, "--threads", "2", "-Xptxas", "-v", "-fatbin", source, "-o", out]


def test_cmake_builds_every_source():
    missing = [source.name for source in SOURCES if f"csrc/{source.name}" not in CMAKE]
    assert SOURCES
    assert not missing
    for arch in ARCHITECTURES:
        assert re.search(rf"CMAKE_CUDA_ARCHITECTURES [^)]*\b{arch}\b", CMAKE)


@pytest.mark.skipif(NVCC is None, reason="NO NVCC ON THIS MACHINE: THE CUDA KERNELS WERE NOT COMPILED")
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_source_compiles_without_spills(source, tmp_path):
    run = subprocess.run(compile_command(source, tmp_path / "out.fatbin"), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    ours = [line for line in run.stderr.splitlines() if "warning" in line and str(ROOT / "csrc") in line]
    assert not ours
    kernels = [match.groupdict() for match in PTXAS.finditer(run.stdout + run.stderr)]
    print(*(f"sm_{k['arch']} {k['registers']:>4} registers {k['kernel']}" for k in kernels), sep="\n")
    counts = {arch: sum(int(k["arch"]) == arch for k in kernels) for arch in ARCHITECTURES}
    assert len(set(counts.values())) == 1 and min(counts.values()) > 0, counts
    spills = [f"{k['kernel']} on sm_{k['arch']}" for k in kernels if int(k["stores"]) or int(k["loads"])]
    assert not spills
