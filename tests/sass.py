"""What the compiler made of the CUDA kernels: machine code (SASS), and the loads that it has in flight."""

import re
import shutil
import subprocess
from pathlib import Path


def find_cuobjdump() -> str | None:
    """Return the path of cuobjdump: that of the CUDA toolkit, or the one that Triton contains; None without either."""
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    inside = Path(triton.__file__).parent / "backends/nvidia/bin"
    return shutil.which("cuobjdump", path=str(inside))


def read_sass(cuobjdump: str, binary: Path, arch: int = 90) -> dict[str, list[str]]:
    """Return the instructions of each kernel in a .cubin or .fatbin, by its demangled name without arguments."""
    text = subprocess.run(
        [cuobjdump, "-arch", f"sm_{arch}", "-sass", binary], capture_output=True, text=True, check=True
    ).stdout
    parts = re.split(r"^\s*Function : (\w+)\s*$", text, flags=re.MULTILINE)[1:]
    names = subprocess.run(["c++filt", *parts[::2]], capture_output=True, text=True, check=True).stdout.splitlines()
    return {
        shorten_name(name): re.findall(r"/\*[0-9a-f]{4,}\*/\s+([^/;]+?)\s*;", body)
        for name, body in zip(names, parts[1::2], strict=True)
    }


def shorten_name(name: str) -> str:
    """Return the name of a kernel without namespaces and arguments: ``sums_by_rows<VectorAccess<float, 4>>``."""
    name = re.sub(r"\(anonymous namespace\)::|recontrast::|c10::|torch::headeronly::|^void ", "", name)
    return name.partition("(")[0].replace("> >", ">>")


def count_loads_in_flight(instructions: list[str], bits: int = 128) -> int:
    """Return how many loads of global memory of this width a thread starts, at most, before it waits for one of them.

    A thread waits at the first instruction that reads a register in which a load will arrive.
    """
    most, count = 0, 0
    pending: set[int] = set()
    for instruction in instructions:
        operation, _, operands = re.sub(r"^@!?U?P\w+\s+", "", instruction).partition(" ")
        is_load = operation.startswith("LDG") and f".{bits}" in operation
        # The first operand is written, except by stores and branches.
        target, _, sources = operands.partition(",")
        if operation.startswith(("ST", "RED", "BRA", "ATOM")):
            sources = operands
        if any(register in pending for register in _registers(sources)):
            most, pending, count = max(most, count), set(), 0
        if is_load:
            first = int(re.match(r"\s*R(\d+)", target).group(1))
            pending |= set(range(first, first + bits // 32))
            count += 1
    return max(most, count)


def _registers(operands: str) -> list[int]:
    """Return the registers of an operand list; 64-bit operands read the next one too."""
    found = []
    for number, wide in re.findall(r"(?<!U)\bR(\d+)(\.64)?", operands):
        found += [int(number), int(number) + 1] if wide else [int(number)]
    return found
