"""Peak memory of a block of code, sampled from the operating system."""

import os
import threading
from pathlib import Path
from typing import Any

import torch

from recontrast.runtime.device import trim_memory

INTERVAL = 0.02  # seconds between two samples
_STATUS = Path("/proc/self/statm")


class PeakMemory:
    """Peak memory of a ``with`` block.

    On a GPU, it is the largest amount that PyTorch allocated there. On a CPU, it is the largest resident memory of the
    whole process, sampled every `INTERVAL` seconds; Python and PyTorch themselves are included.

    Args:
        device: Device whose memory is measured.

    Attributes:
        bytes: Peak in bytes; None if the system does not report the memory of a process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes: int | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "PeakMemory":
        """Start to measure, after unused memory is returned to the system."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            trim_memory()
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop to measure."""
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self._end.set()
            self._thread.join()

    def _sample(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._end.wait(INTERVAL)
            resident = read_resident_memory()
            if resident is not None:
                self.bytes = max(resident, self.bytes or 0)


def read_resident_memory() -> int | None:
    """Return the resident memory of this process in bytes; None on systems without ``/proc``."""
    try:
        return int(_STATUS.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def describe_measurement(device: torch.device) -> str:
    """Describe how the memory on ``device`` is measured, for readers of the tables."""
    if device.type == "cuda":
        return "memory: the largest amount that PyTorch allocated on the GPU"
    return (
        f"memory: the largest resident memory of the process, sampled every {1000 * INTERVAL:.0f} ms, with Python and "
        "PyTorch themselves and what earlier methods left"
    )
