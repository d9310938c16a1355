"""Time spent in each stage of a computation, measured on its device."""

import time
from itertools import pairwise
from typing import Any

import torch


class Clock:
    """Clock that starts when it is created and adds up the time of named stages.

    On CUDA it records events on the device, so that nothing waits for the device before `seconds` is called.

    Args:
        device: Device whose time is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self.mark("start")

    def mark(self, name: str) -> None:
        """Add the time since the last mark to the stage ``name``."""
        if self.is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Return the total time of each stage in seconds; waits for the device."""
        if self.is_cuda:
            self.marks[-1][1].synchronize()
        total: dict[str, float] = {}
        for (_, before), (name, after) in pairwise(self.marks):
            elapsed = before.elapsed_time(after) / 1000 if self.is_cuda else after - before
            total[name] = total.get(name, 0.0) + elapsed
        return total
