"""Number of threads of a computation on the CPU, chosen by measurement.

The threads of a parallel loop wait for the last of them. If another program occupies a processor, that is a thread
which is not scheduled: with two threads on two processors of which one is busy, training can take several times as long
as with one thread. So between two steps a small computation is timed with fewer and with more threads, and what is
faster is kept. The computation is not part of the work: results change with the number of threads alone, by rounding.
The first such step can take ten times as long as the others, so that on Linux, which tells what other programs use, a
busy machine is measured before it.
"""

import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from recontrast.data.system import ProcessorUse, count_cpus

if TYPE_CHECKING:
    import torch

FIRST_LOOK = 2.0  # seconds of work before the first measurement: shorter work is not worth one
LONGEST_WAIT = 60.0  # seconds between two measurements; each wait is twice the one before
GAIN = 1.1  # how much faster another number of threads must be
CHANGES = 10  # of the number of threads at once, at most
ROUNDS = 8  # measurements of each number of threads, in turn, at least
MOST_ROUNDS = 160
LEAST = 0.03  # seconds for which the fastest number of threads is measured, at least
LEAST_IF_BUSY = 0.1  # the same on a machine that is known to be busy: many turns of the other programs
HOPELESS = 1.5  # times the duration of the fastest: measured no further
HOPELESS_AFTER = 0.02  # seconds of such a number: other programs can interrupt a short computation with any number
OTHERS = 0.3  # processors used by other programs: enough for a measurement before the first step
SLOWER = 1.5  # steps that take so many times their usual time are followed by a measurement
STEPS = 3  # so many of them in a row
ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # set by users who choose the number themselves


class ThreadTuner:
    """Chooses the number of threads between the steps of a computation.

    Args:
        most: Largest number of threads, in use at the beginning.
        report: Called with a sentence about each change.
        set_threads: Sets the number of threads, such as `torch.set_num_threads`.
        probe: Computation to time, which uses all threads; None takes `run_probe`.
        clock: Seconds, such as `time.perf_counter`.

    Attributes:
        threads: Number of threads in use.
    """

    def __init__(
        self,
        most: int,
        report: Callable[[str], None],
        set_threads: Callable[[int], None],
        *,
        probe: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.threads = self.most = most
        self._report, self._clock, self._set_threads = report, clock, set_threads
        self._probe = probe or run_probe
        self._wait = FIRST_LOOK
        self._last_look = self._last_step = clock()
        self._usual: list[float] = []  # duration of the first steps since the last measurement
        self._recent: deque[float] = deque(maxlen=STEPS)

    def before_steps(self) -> None:
        """Measure and choose before the first step; for machines that are known to be busy."""
        if self.most > 1:
            self._choose(LEAST_IF_BUSY)
            self._last_look = self._last_step = self._clock()

    def begin_step(self) -> None:
        """Begin to time a step: what the program waited for before is no part of it."""
        self._last_step = self._clock()

    def after_step(self, seconds: float | None = None, *, patience: float = 1.0) -> None:
        """Measure and choose again, if it is time to; called after each step.

        Args:
            seconds: Duration of the step; None takes the time since the last step, or since `begin_step`.
            patience: Factor of the time between two measurements.
        """
        now = self._clock()
        duration = now - self._last_step if seconds is None else seconds
        self._recent.append(duration)
        if len(self._usual) < STEPS:
            self._usual.append(duration)
        since = now - self._last_look
        if self.most > 1 and (since >= patience * self._wait or (since >= FIRST_LOOK and self._is_slower())):
            changed = self._choose(LEAST)
            self._wait = FIRST_LOOK if changed else min(2 * self._wait, LONGEST_WAIT)
            self._usual.clear()
            self._recent.clear()
            self._last_look = self._clock()
        self._last_step = self._clock()

    def _is_slower(self) -> bool:
        """Return whether the last steps took much longer than those after the last measurement."""
        if len(self._usual) < STEPS or len(self._recent) < STEPS:
            return False
        return min(self._recent) > SLOWER * statistics.median(self._usual)

    def _choose(self, least: float) -> bool:
        """Keep the fastest number of threads near the current one, and return whether it is another one.

        A larger number is measured twice before it is taken: by chance the threads in use may all have shared a
        processor with another program while they were measured.

        Args:
            least: Seconds for which the fastest number is measured, at least, if all threads are in use.
        """
        before, gain = self.threads, 1.0
        for _ in range(CHANGES):
            enough = least if self.threads == self.most else LEAST_IF_BUSY
            seconds = self._measure(self._list_candidates(), enough)
            best = min(seconds, key=lambda threads: seconds[threads])
            if best > self.threads:
                seconds = self._measure({self.threads, best}, enough)
            if seconds[best] * GAIN > seconds[self.threads]:
                break
            gain *= seconds[self.threads] / seconds[best]
            self.threads = best
        self._set_threads(self.threads)
        if self.threads == before:
            return False
        reason = "other programs use this machine" if self.threads < before else "processors are free again"
        self._report(f"threads: {self.threads} instead of {before}, {gain:.1f} times as fast ({reason})")
        return True

    def _list_candidates(self) -> set[int]:
        """Return the number of threads in use, one more and one less, twice as many, and half, a quarter and so on.

        One busy processor slows all threads down, so that only a much smaller number may be faster.
        """
        current = self.threads
        candidates = {current - 1, current, current + 1, min(2 * current, self.most)}
        candidates |= {current >> shift for shift in range(current.bit_length())}
        return {threads for threads in candidates if 1 <= threads <= self.most}

    def _measure(self, candidates: set[int], least: float) -> dict[int, float]:
        """Return the mean duration of the probe with each number of threads, measured in turn.

        Numbers that are much slower than the fastest are measured no further: on a busy machine, one measurement of
        them can take as long as a step. A number in use that is less than the largest is measured to the end.
        """
        seconds = dict.fromkeys(sorted(candidates), 0.0)
        slow: dict[int, float] = {}
        rounds = 0
        while rounds < ROUNDS or (rounds < MOST_ROUNDS and min(seconds.values()) < least):
            rounds += 1
            for threads in seconds:
                self._set_threads(threads)
                started = self._clock()
                self._probe()
                seconds[threads] += self._clock() - started
            limit = max(HOPELESS * min(seconds.values()), HOPELESS_AFTER)
            kept = self.threads if self.threads < self.most else None
            slow |= {n: total / rounds for n, total in seconds.items() if total > limit and n != kept}
            seconds = {n: total for n, total in seconds.items() if n not in slow}
            if len(seconds) == 1:
                break
        return slow | {threads: total / rounds for threads, total in seconds.items()}


def run_probe() -> None:
    """Run 4 convolutions of 3 x 3 over 64 channels, about 12 ms on one processor: short parallel loops."""
    import torch
    from torch.nn import functional

    with torch.inference_mode():
        features = torch.full((1, 64, 56, 56), 0.01).contiguous(memory_format=torch.channels_last)
        weight = torch.full((64, 64, 3, 3), 0.001)
        for _ in range(4):
            features = functional.relu(functional.conv2d(features, weight, padding=1))


class _Choice:
    """What `choose_threads` was asked for, from the first computation on."""

    def __init__(self, threads: int | None, report: Callable[[str], None]) -> None:
        self.threads, self.report = threads, report
        self.before: int | None = None  # number of threads before the first computation
        self.tuner: ThreadTuner | None = None
        self._use: ProcessorUse | None = ProcessorUse()

    def start(self, device: "torch.device | None") -> None:
        """Set the number of threads, and measure if other programs are known to use the processors."""
        import torch

        if self.before is None:
            self.before = torch.get_num_threads()
            # Several processes of torchrun share the processors, and their number of threads is set by it.
            is_set = any(os.environ.get(name) for name in ENVIRONMENT) or os.environ.get("WORLD_SIZE", "1") != "1"
            count = self.threads or (self.before if is_set else min(self.before, count_cpus()))
            if count != self.before:
                torch.set_num_threads(count)
            if self.threads is None and not is_set:
                self.tuner = ThreadTuner(count, self.report, torch.set_num_threads)
        if device is None or device.type != "cpu" or self.tuner is None or _deferral.is_on:
            return
        self.tuner.begin_step()
        if self._use is None:
            return
        if (others := self._use.measure_others()) is not None:
            self._use = None
            if others > OTHERS:
                self.tuner.before_steps()

    def stop(self) -> None:
        """Set the number of threads of before."""
        if self.before is not None:
            import torch

            torch.set_num_threads(self.before)


_choice: _Choice | None = None


class _Deferral(threading.local):
    """Whether this thread leaves measurements to `after_batch`, and whether it has computed on the CPU since."""

    is_on = False
    has_stepped = False


_deferral = _Deferral()


@contextmanager
def defer_measurements() -> Iterator[None]:
    """Let the steps of this thread measure nothing in a block; `after_batch` does, where nobody waits for a result.

    A thread that computes beside the one that matters, such as one that tries a new detector, never calls it.

    Yields:
        Nothing.
    """
    before, _deferral.is_on = _deferral.is_on, True
    try:
        yield
    finally:
        _deferral.is_on = before


def after_batch(seconds: float, is_busy: bool) -> None:
    """Let `choose_threads` measure again, if it is time to; called after a batch within `defer_measurements`.

    Args:
        seconds: Duration of the batch, by image.
        is_busy: Whether others wait for their batch: a measurement is then put off, for as long as the time between two
            measurements.
    """
    if _deferral.has_stepped and _choice is not None and _choice.tuner is not None:
        _choice.tuner.after_step(seconds, patience=2.0 if is_busy else 1.0)
    _deferral.has_stepped = False


def start_threads(device: "torch.device | None" = None) -> None:
    """Set the number of threads that `choose_threads` was asked for; called before a computation, and before its steps.

    Args:
        device: Device of the steps; None if something is computed or loaded before them.
    """
    if _choice is not None:
        _choice.start(device)


def after_step(device: "torch.device") -> None:
    """Let `choose_threads` measure again, if it is time to; called after each step of a computation."""
    if _choice is None or _choice.tuner is None or device.type != "cpu":
        return
    if _deferral.is_on:
        _deferral.has_stepped = True
    else:
        _choice.tuner.after_step()


def requested_threads() -> int | None:
    """Return the number of threads that `choose_threads` was given; None if there is none."""
    return None if _choice is None else _choice.threads


def measured_threads() -> int | None:
    """Return the number of threads that is in use, if it is measured; None if it is fixed."""
    return None if _choice is None or _choice.tuner is None else _choice.tuner.threads


@contextmanager
def choose_threads(threads: int | None, report: Callable[[str], None]) -> Iterator[None]:
    """Choose the number of threads of computations on the CPU in a block.

    Args:
        threads: Number of threads, which is kept. None measures between the steps, unless the environment variable
            ``OMP_NUM_THREADS`` sets the number, or torchrun started several processes. It begins with the number that
            PyTorch chooses, at most one for each processor that this process may use.
        report: Called with a sentence about each change.

    Yields:
        Nothing; at the end the number of threads is as before.

    Raises:
        ValueError: If ``threads`` is less than 1.
    """
    global _choice
    if threads is not None and threads < 1:
        raise ValueError(f"threads: wanted at least 1, got {threads}")
    outer, _choice = _choice, _Choice(threads, report)
    own = _choice
    try:
        yield
    finally:
        _choice = outer
        own.stop()
