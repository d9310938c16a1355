"""What the launches of an emulated operator move through memory; traffic.h describes the model."""

import ctypes
import functools
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from emulate_cuda import Emulator

SECTOR = 32  # bytes


class Moved(ctypes.Structure):
    """Loads or stores of a launch: what threads ask for, and the 32-byte sectors that this takes."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in ("bytes", "instructions", "sectors", "lines", "by_blocks", "distinct", "missed")
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_uint64), ("blocks", ctypes.c_uint64), ("threads", ctypes.c_uint64),
        ("load", Moved), ("store", Moved),
        ("atomics", ctypes.c_uint64), ("most_atomics", ctypes.c_uint64),
    ]  # fmt: skip


class Launch(NamedTuple):
    """A launch: its kernel, and what it moved."""

    kernel: str
    blocks: int
    threads: int
    load: Moved
    store: Moved
    atomics: int
    most_atomics: int  # to one address

    @property
    def moved(self) -> int:
        """Bytes of the sectors that warps ask for."""
        return SECTOR * (self.load.sectors + self.store.sectors)

    @property
    def moved_by_blocks(self) -> int:
        """Bytes of the sectors that blocks ask for, if a cache serves what a block asks for twice."""
        return SECTOR * (self.load.by_blocks + self.store.by_blocks)


@functools.cache
def _kernel_names(library: Path) -> dict[int, str]:
    lines = subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True).stdout.splitlines()
    matches = (
        re.match(r"([0-9a-f]+) \w (?:void )?recontrast::(?:\(anonymous namespace\)::)?(\w+)[<(]", s) for s in lines
    )
    return {int(match[1], 16): match[2] for match in matches if match}


def count_traffic(
    emulated: Emulator, function: Callable[[Any], Any], processors: int = 132, cache: int = 0
) -> list[Launch]:
    """Return the launches of ``function(operators)``.

        Args:
            emulated: Emulator.
            function: Function that calls operators.
            processors: Multiprocessors of the emulated GPU.
            cache: Size of the modelled L2 cache, bytes;
    0: none, and no sectors are counted as missed.

        Returns:
            The launches, in order.
    """
    library = ctypes.CDLL(str(emulated.library))
    library.traffic_start.argtypes, library.traffic_launch.restype = [ctypes.c_uint64], ctypes.POINTER(_Launch)
    emulated.emulate(processors, False)
    library.traffic_start(cache)
    try:
        function(emulated.operators)
    finally:
        count = library.traffic_stop()
    names = _kernel_names(emulated.library)
    launches = []
    for i in range(count):
        raw = _Launch.from_buffer_copy(library.traffic_launch(i).contents)
        values = [getattr(raw, name) for name, _ in _Launch._fields_]
        launches.append(Launch(names[values[0]], *values[1:]))
    return launches
