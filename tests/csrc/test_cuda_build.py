"""Every CUDA source compiles for every architecture of the wheel, and no kernel spills registers."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from sass import count_loads_in_flight, find_cuobjdump, read_sass

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


IN_FLIGHT = {  # 16-byte loads that a thread starts before it waits for the first, on an H100 or H200
    f"{kernel}<{access}>": 8
    for kernel in ("sums_by_planes", "sums_by_rows", "gradient_by_planes", "gradient_by_rows")
    for access in ("VectorAccess<float, 4>", "VectorAccess<BFloat16, 8>", "VectorAccess<Half, 8>", "MixedAccess")
}


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
    if source.name == "cosine_sums.cu" and (cuobjdump := find_cuobjdump()) is not None:
        in_flight = {
            name: count_loads_in_flight(sass) for name, sass in read_sass(cuobjdump, tmp_path / "out.fatbin").items()
        }
        print(*(f"{count} loads in flight {name}" for name, count in in_flight.items()), sep="\n")
        assert {name: in_flight[name] for name in IN_FLIGHT} == IN_FLIGHT


SASS = """
LDG.E.128 R4, desc[UR4][R2.64]
@!P1 LDG.E.128 R8, desc[UR4][R2.64+0x200]
IMAD.WIDE R2, R0, 0x4, R2
FADD R20, R4, R9
LDG.E.128 R12, desc[UR4][R2.64]
STG.E.128 desc[UR4][R2.64], R12
"""


def test_loads_in_flight_are_counted():
    assert count_loads_in_flight(SASS.strip().splitlines()) == 2
    assert count_loads_in_flight(SASS.strip().splitlines()[3:]) == 1
    assert count_loads_in_flight(["EXIT"]) == 0
