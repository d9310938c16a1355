"""Time spent in each stage, measured on the device."""

import time
from itertools import pairwise
from typing import Any

import torch


class Clock:
    """Seconds by name between marks; on CUDA of the device's time, so that nothing waits before `seconds`."""

    def __init__(self, device: torch.device) -> None:
        """A clock that starts now.

        Args:
            device: whose time it is.
        """
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self.mark("start")

    def mark(self, name: str) -> None:
        """What has passed since the last mark counts for ``name``."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """The sum for each name, seconds; waits for the device."""
        if self.cuda:
            self.marks[-1][1].synchronize()
        total: dict[str, float] = {}
        for (_, before), (name, after) in pairwise(self.marks):
            passed = before.elapsed_time(after) / 1000 if self.cuda else after - before
            total[name] = total.get(name, 0.0) + passed
        return total
