"""Speed of a detector on this machine: the ways to run a checkpoint, and exported files, timed in turn."""

import importlib.util
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
from recontrast.data.image_files import ImageFiles
from recontrast.data.window import from_levels
from recontrast.export.export import NEEDS, SUFFIXES, check_target, export
from recontrast.export.low_precision import FEWEST_IMAGES
from recontrast.inference.detector import CheckpointDetector, Detector, open_detector
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.inference.infer import infer
from recontrast.inference.options import InferenceOptions
from recontrast.recipes.recipe import Recipe, refuse_views, to_pair
from recontrast.runtime.device import is_bfloat16_fast, resolve_device

LARGEST_CHANGE = 0.02  # relative difference of a score up to which a way is recommended without a look at accuracy
FEWEST_CALLS = 3
MOST_COMPARED = 16  # images
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


def export_files(
    checkpoint: Path, kinds: Sequence[str], images: Sequence[Path], folder: Path, on_line: Callable[[str], None]
) -> list[Path]:
    """Export a checkpoint to files in float32 and, with enough good images, in int8.

    Args:
        checkpoint: Path of the checkpoint.
        kinds: Formats.
        images: Good images, from which int8 takes the ranges of values.
        folder: Folder for the files.
        on_line: Called with a line for the user before each file, and with the reason where int8 is not possible.

    Returns:
        Paths of the files.

    Raises:
        ValueError: If a format is unknown or cannot hold the detector in float32.
        ImportError: If a package that a format needs is not installed.
        OSError: If a file cannot be read or written.
    """
    for kind in kinds:
        check_target(kind, folder / f"{kind}{SUFFIXES.get(kind, '')}")
    files = []
    for kind in kinds:
        for precision in ("float32", *(["int8"] if len(images) >= FEWEST_IMAGES and kind != "pt2" else [])):
            name = kind if precision == "float32" else f"{kind}-{precision}"
            on_line(f"exporting to {kind} in {precision}, which takes a minute or more")
            try:
                target = folder / f"{name}{SUFFIXES[kind]}"
                files.append(export(checkpoint, kind, target, precision=precision, images=images).path)
            except ValueError as error:
                if precision == "float32":
                    raise
                on_line(f"{kind} in {precision} is left out: {error}")
    return files


def list_formats() -> list[str]:
    """Return the formats of exported files whose packages are installed, without those that PyTorch runs itself."""
    return [kind for kind, needs in NEEDS.items() if needs and all(map(importlib.util.find_spec, needs))]


def open_ways(path: Path, files: Sequence[Path], device: str | None) -> dict[str, Callable[[], Detector]]:
    """List the ways to run a detector.

    An OpenVINO file is also run in bfloat16, which can be chosen when it is loaded, where the processor is fast in it.

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
        name = f"{_RUNTIMES[file.suffix.lower()]} {file.name}"
        ways[name] = partial(open_detector, file)
        is_quantised = file.stem.endswith("-int8")  # its other parts stay in float32
        if file.suffix.lower() == ".xml" and not is_quantised and is_bfloat16_fast(torch.device("cpu")):
            ways[f"{name}, bfloat16"] = partial(ExportedDetector, file, precision="bfloat16")
    return ways


def time_ways(
    ways: dict[str, Callable[[], Detector]],
    batches: Sequence[int],
    seconds: float,
    on_progress: OnProgress,
    images: Sequence[Path] = (),
) -> list[Timing]:
    """Time ways to run a detector, from images of the network's size to maps and scores.

    All are loaded, and called in turn, so that other programs slow down all of them alike.

    Args:
        ways: Functions that open the detector, by name; see `open_ways`.
        batches: Numbers of images per call.
        seconds: Time for each way at each batch size; at least `FEWEST_CALLS` calls are made.
        on_progress: Called with the number of finished and of all measurements, and what is timed.
        images: Image files whose scores are compared, at most `MOST_COMPARED`; generated images if there are none.

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
            refuse_views(detector.recipe, name, "to time")
            sizes.add((to_pair(detector.recipe.size), detector.recipe.out))
            call = _build_call(detector)
            if len(sizes) > 1:
                raise ValueError(f"{name}: wanted files of one detector, got images of another size")
            scores.append(call(_read(images, detector.recipe) if images else _draw(detector.recipe, 4)))
        timings.append(Timing(name, memory=None if peak.bytes is None else max(peak.bytes - before, 0)))
        calls.append((call, detector.recipe))
    for timing, values in zip(timings, scores, strict=True):
        timing.change = float(np.max(np.abs(values - scores[0]) / np.maximum(np.abs(scores[0]), 1e-12)))
    for position, batch in enumerate(batches):
        on_progress(len(ways) * (1 + position), total, f"batch {batch}")
        drawn = _draw(calls[0][1], batch)
        for call, _ in calls:  # the first call of a size allocates
            call(drawn)
        end = time.perf_counter() + seconds * len(calls)
        while time.perf_counter() < end or len(timings[-1].latencies.get(batch, [])) < FEWEST_CALLS:
            for timing, (call, _) in zip(timings, calls, strict=True):
                start = time.perf_counter()
                call(drawn)
                timing.latencies.setdefault(batch, []).append(time.perf_counter() - start)
    on_progress(total, total, "done")
    return timings


def recommend(timings: Sequence[Timing], batch: int, tolerance: float = LARGEST_CHANGE) -> str:
    """Say in one sentence what to use on this machine.

    Args:
        timings: Timings of all ways.
        batch: Number of images per call that counts.
        tolerance: Largest relative difference of a score of what is recommended.

    Returns:
        The sentence.
    """
    first = timings[0]
    close = [timing for timing in timings if timing.change <= tolerance]
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


def _read(paths: Sequence[Path], recipe: Recipe) -> NDArray[Any]:
    """Read up to `MOST_COMPARED` images, evenly spaced in a list, in the network's size, (N, H, W, 3)."""
    count = min(len(paths), MOST_COMPARED)
    files = ImageFiles([paths[index * len(paths) // count] for index in range(count)])
    pixels = np.asarray(files.resized(recipe.size, None, recipe.bits, recipe.window)[range(count)])
    if files.errors:
        raise ValueError(next(iter(files.errors.values())))
    return pixels


def _draw(recipe: Recipe, count: int) -> NDArray[Any]:
    """Draw images of waves and noise in the network's size, (N, H, W, 3)."""
    random, (height, width) = np.random.default_rng(0), to_pair(recipe.size)
    rows, columns = np.arange(height)[:, None, None] / height, np.arange(width)[:, None] / width
    waves = 120 + 60 * np.sin(9 * rows) * np.cos(7 * columns)
    levels = (waves + random.normal(0, 25, (count, height, width, 3))).clip(0, 255).astype(np.uint8)
    return from_levels(levels, recipe.window)
