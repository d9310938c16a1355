"""Mean loss and throughput between two log lines."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class ProgressMeter:
    """Measures the intervals between log lines; checkpoints and log lines do not count.

    Attributes:
        seconds: Total duration of the intervals that have ended.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._images = 0  # in this interval
        self._reported_losses = 0  # in the intervals before
        self._started = time.perf_counter()

    def start_interval(self) -> None:
        """Start the clock of an interval."""
        self._started = time.perf_counter()

    def count(self, images: int) -> None:
        """Add ``images`` to the interval."""
        self._images += images

    def end_interval(self, losses: Sequence[float]) -> tuple[float, float]:
        """End the interval and summarise it.

        Args:
            losses: Losses of all steps since the first interval.

        Returns:
            The mean loss and the images per second of the interval.
        """
        loss = math.fsum(losses[self._reported_losses :]) / (len(losses) - self._reported_losses)
        self._reported_losses = len(losses)
        return loss, self.end_interval_without_loss()

    def end_interval_without_loss(self) -> float:
        """End the interval and return its images per second."""
        elapsed = time.perf_counter() - self._started
        images_per_second = self._images / elapsed
        self.seconds += elapsed
        self._images = 0
        return images_per_second

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the block from the interval."""
        paused_at = time.perf_counter()
        yield
        self._started += time.perf_counter() - paused_at
