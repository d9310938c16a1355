"""Memory that a computation may still use."""

from pathlib import Path

import torch

MEMORY_INFORMATION = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")  # limit of a container


def measure_available_memory(device: torch.device) -> int | None:
    """Measure the memory that is available on a device.

    Args:
        device: Device of the computation.

    Returns:
        Bytes; None where the system does not say. On the CPU, the limit of a container counts as well.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = _read_field(MEMORY_INFORMATION, "MemAvailable:", 1024)
    limit, used = _read_number(GROUP / "memory.max"), _read_number(GROUP / "memory.current")
    if limit is None or used is None:
        return available
    reclaimable = _read_field(GROUP / "memory.stat", "inactive_file", 1) or 0  # file cache, freed when needed
    left = max(limit - used + reclaimable, 0)
    return left if available is None else min(left, available)


def _read_field(path: Path, name: str, unit: int) -> int | None:
    """Return the number after ``name`` at the start of a line, in bytes; None if there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * unit for line in lines if line.split()[:1] == [name]), None)


def _read_number(path: Path) -> int | None:
    """Return the number in a file; None if there is no file or no number, such as "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
