"""Speed of a detector on this machine: the ways to run a checkpoint, and exported files, timed in turn."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recontrast.app.compare.peak_memory import PeakMemory, read_resident_memory
from recontrast.data.window import from_levels
from recontrast.inference.detector import CheckpointDetector, Detector, open_detector
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.inference.infer import infer
from recontrast.inference.options import InferenceOptions
from recontrast.recipes.recipe import Recipe, to_pair
from recontrast.runtime.device import is_bfloat16_fast, resolve_device

LARGEST_CHANGE = 0.02  # relative difference of a score up to which a way is recommended without a look at accuracy
FEWEST_CALLS = 3
_RUNTIMES = {".onnx": "ONNX Runtime", ".xml": "OpenVINO", ".pt2": "torch.export"}

OnProgress = Callable[[int, int, str], None]  # done, total, what is timed


@dataclass
class Timing:
    """Speed of one way to run a detector.

    Attributes:
        name: What runs, such as "torch float32" or the name of a file.
        latencies: Seconds of each call, by number of images per call.
        memory: Bytes by which the memory of the process grew, at most, while the way was loaded and run once; None if
            unknown.
        change: Largest relative difference of a score from the first way.
    """

    name: str
    latencies: dict[int, list[float]] = field(default_factory=dict)
    memory: int | None = None
    change: float = 0.0

    def images_per_second(self, batch: int) -> float:
        """Return the images per second at a batch size, from the median call.

        Args:
            batch: Number of images per call.

        Returns:
            Images per second.
        """
        return batch / statistics.median(self.latencies[batch])

    def latency(self, batch: int, share: float) -> float:
        """Return the latency that a share of the calls does not exceed.

        Args:
            batch: Number of images per call.
            share: Share of the calls, in (0, 1].

        Returns:
            Seconds.
        """
        ordered = sorted(self.latencies[batch])
        return ordered[min(math.ceil(share * len(ordered)), len(ordered)) - 1]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as types that JSON can hold."""
        return {
            "name": self.name, "memory": self.memory, "change": self.change,
            "batches": {
                str(batch): {"images_per_second": self.images_per_second(batch), "calls": len(seconds),
                             "p50": self.latency(batch, 0.5), "p99": self.latency(batch, 0.99)}
                for batch, seconds in self.latencies.items()
            },
        }  # fmt: skip


def open_ways(path: Path, files: Sequence[Path], device: str | None) -> dict[str, Callable[[], Detector]]:
    """List the ways to run a detector.

    Args:
        path: Checkpoint or exported file.
        files: Further exported files of the same detector.
        device: Device of the checkpoint; None selects the GPU if there is one.

    Returns:
        Functions that open the detector, by name.
    """
    ways: dict[str, Callable[[], Detector]] = {}
    if path.suffix.lower() not in _RUNTIMES:
        precisions = ["float32", *(["bfloat16"] if is_bfloat16_fast(resolve_device(device)) else [])]
        for precision in precisions:
            options = InferenceOptions(precision=precision)  # type: ignore[arg-type]
            ways[f"torch {precision}"] = partial(open_detector, path, device, inference=options)
    for file in [*([path] if path.suffix.lower() in _RUNTIMES else []), *files]:
        ways[f"{_RUNTIMES[file.suffix.lower()]} {file.name}"] = partial(open_detector, file)
    return ways


def time_ways(
    ways: dict[str, Callable[[], Detector]], batches: Sequence[int], seconds: float, on_progress: OnProgress
) -> list[Timing]:
    """Time ways to run a detector, from images of the network's size to maps and scores.

    All are loaded, and called in turn, so that other programs slow down all of them alike.

    Args:
        ways: Functions that open the detector, by name; see `open_ways`.
        batches: Numbers of images per call.
        seconds: Time for each way at each batch size; at least `FEWEST_CALLS` calls are made.
        on_progress: Called with the number of finished and of all measurements, and what is timed.

    Returns:
        The timings, in the order of the ways.

    Raises:
        ValueError: If a detector cuts images into tiles, or two differ in the size of their images.
    """
    timings, calls, sizes, scores = [], [], set(), []
    total = len(ways) * (1 + len(batches))
    for index, (name, opener) in enumerate(ways.items()):
        on_progress(index, total, name)
        before = read_resident_memory() or 0
        with PeakMemory(torch.device("cpu")) as peak:
            detector = opener()
            if detector.overlap is not None:
                raise ValueError(f"{name}: wanted a detector of whole images to time, got one of tiles")
            sizes.add((to_pair(detector.recipe.size), detector.recipe.out))
            call = _build_call(detector)
            if len(sizes) > 1:
                raise ValueError(f"{name}: wanted files of one detector, got images of another size")
            scores.append(call(_draw(detector.recipe, 4)))
        timings.append(Timing(name, memory=None if peak.bytes is None else max(peak.bytes - before, 0)))
        calls.append((call, detector.recipe))
    for timing, values in zip(timings, scores, strict=True):
        timing.change = float(np.max(np.abs(values - scores[0]) / np.maximum(np.abs(scores[0]), 1e-12)))
    for position, batch in enumerate(batches):
        on_progress(len(ways) * (1 + position), total, f"batch {batch}")
        images = _draw(calls[0][1], batch)
        for call, _ in calls:  # the first call of a size allocates
            call(images)
        end = time.perf_counter() + seconds * len(calls)
        while time.perf_counter() < end or len(timings[-1].latencies.get(batch, [])) < FEWEST_CALLS:
            for timing, (call, _) in zip(timings, calls, strict=True):
                start = time.perf_counter()
                call(images)
                timing.latencies.setdefault(batch, []).append(time.perf_counter() - start)
    on_progress(total, total, "done")
    return timings


def recommend(timings: Sequence[Timing], batch: int) -> str:
    """Say in one sentence what to use on this machine.

    Args:
        timings: Timings of all ways.
        batch: Number of images per call that counts.

    Returns:
        The sentence.
    """
    first = timings[0]
    close = [timing for timing in timings if timing.change <= LARGEST_CHANGE]
    best = max(close, key=lambda timing: timing.images_per_second(batch))
    fastest = max(timings, key=lambda timing: timing.images_per_second(batch))

    def describe(timing: Timing) -> str:
        speed = timing.images_per_second(batch)
        return f"{timing.name}: {speed:.1f} images/s, {speed / first.images_per_second(batch):.2f} x {first.name}"

    text = f"recommended at batch {batch}: {describe(best)}"
    if fastest is not best:
        text += (
            f"; faster: {describe(fastest)}, whose scores differ by up to {100 * fastest.change:.1f} %: evaluate it "
            "and calibrate it on its own scores"
        )
    return text


def _build_call(detector: Detector) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """Return a function from images (N, H, W, 3) uint8 of the network's size to scores."""
    if isinstance(detector, ExportedDetector):
        return lambda images: detector.score(images)[1]
    if not isinstance(detector, CheckpointDetector):
        raise ValueError("benchmark: wanted a checkpoint or files of recontrast export, got another detector")
    (height, width), size = detector.recipe.out, to_pair(detector.recipe.size)
    top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)

    def call(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        cropped = images[:, top : top + height, left : left + width]
        results = infer(detector.model, cropped, detector.recipe, batch=len(images))
        return np.concatenate([scores.cpu().numpy() for _, scores in results])

    return call


def _draw(recipe: Recipe, count: int) -> NDArray[Any]:
    """Draw images of waves and noise in the network's size, (N, H, W, 3)."""
    random, (height, width) = np.random.default_rng(0), to_pair(recipe.size)
    rows, columns = np.arange(height)[:, None, None] / height, np.arange(width)[:, None] / width
    waves = 120 + 60 * np.sin(9 * rows) * np.cos(7 * columns)
    levels = (waves + random.normal(0, 25, (count, height, width, 3))).clip(0, 255).astype(np.uint8)
    return from_levels(levels, recipe.window)
