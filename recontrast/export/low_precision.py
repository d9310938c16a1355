"""Exported files of less than float32: which parts are quantised, and what that does to scores, metrics and speed."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from recontrast.data.window import from_levels
from recontrast.export.quantize import iterate_inputs, list_layers, measure_ranges, quantize, store_half_weights
from recontrast.export.quantize_samples import Samples, read_evenly
from recontrast.export.verify import graph_size
from recontrast.inference import openvino_file
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.inference.file_checks import PRECISIONS
from recontrast.inference.programs import name_inputs
from recontrast.recipes.recipe import Recipe

# Largest relative difference allowed between two scores, by default.
TOLERANCES = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 0.05, "int8": 0.15}
FEWEST_IMAGES = 8  # from which the ranges of int8 are measured
MOST_IMAGES = 64  # or tiles, for the ranges; more change them little
TRIAL_IMAGES = 16  # on which the effect of each part is measured
TIMED_CALLS = 9

Scores = Callable[..., NDArray[np.float32]]  # images (N, H, W, 3), and masks (N, H, W) if it has any -> scores (N,)


@dataclass(frozen=True)
class Change:
    """How the scores of one set of images differ between two detectors.

    Attributes:
        images: Number of images.
        largest: Largest relative difference of a score.
        typical: Median of the relative differences.
        rank_correlation: Spearman's correlation; None for fewer than three images, or equal scores.
    """

    images: int
    largest: float
    typical: float
    rank_correlation: float | None

    @classmethod
    def measure(cls, wanted: NDArray[Any], got: NDArray[Any]) -> "Change":
        """Compare scores.

        Args:
            wanted: Scores (N,) of the detector that is compared with.
            got: Scores (N,) of the other one.

        Returns:
            Their differences; infinite where a score is not finite.
        """
        relative = np.abs(got.astype(float) - wanted) / np.maximum(np.abs(wanted), 1e-12)
        relative = np.where(np.isfinite(relative), relative, np.inf)
        varies = len(wanted) > 2 and np.isfinite(relative).all() and np.ptp(wanted) > 0 and np.ptp(got) > 0
        return cls(
            len(wanted), float(relative.max()), float(np.median(relative)),
            float(spearmanr(wanted, got).statistic) if varies else None,
        )  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A part of the network in a quantised file.

    Attributes:
        name: Name of the part, such as "encoder".
        precision: "int8", or "float32" if it is left in float.
        effect: Largest relative difference of a score if this part alone is quantised.
    """

    name: str
    precision: str
    effect: float


@dataclass
class PrecisionReport:
    """What a file of low precision does, beside float32.

    Attributes:
        precision: Precision of the file.
        change: Differences from the scores of the checkpoint.
        tolerance: Largest relative difference that was allowed.
        parts: Parts of a quantised network; empty for other precisions.
        metrics: Metrics of labelled images by name: those of the checkpoint and of the file.
        images_per_second: Speed at batch 1 of a file in float32 and of this file, by the same runtime, in turn.
        megabytes: Size of the files in float32 and of these.
        threads: Number of threads that were timed.
    """

    precision: str
    change: Change
    tolerance: float
    parts: tuple[Part, ...] = ()
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    images_per_second: tuple[float, float] = (0.0, 0.0)
    megabytes: tuple[float, float] = (0.0, 0.0)
    threads: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return all values as types that JSON can hold."""
        return asdict(self)

    def to_markdown(self, name: str) -> str:
        """Return the report as a page.

        Args:
            name: Name of the exported file.

        Returns:
            Markdown text.
        """
        change, speed, size = self.change, self.images_per_second, self.megabytes
        correlation = "undefined" if change.rank_correlation is None else f"{change.rank_correlation:.4f}"
        lines = [
            f"# Exported detector: {name}", "",
            f"Precision {self.precision}, compared with the checkpoint in float32.", "",
            "| | |", "|---|---:|",
            f"| images compared | {change.images} |",
            f"| largest relative difference of a score | {change.largest:.2e} (at most {self.tolerance:g} allowed) |",
            f"| typical (median) | {change.typical:.2e} |",
            f"| rank correlation of the scores | {correlation} |", "",
            "| | float32 | this file | ratio |", "|---|---:|---:|---:|",
            f"| images/s, batch 1, threads: {self.threads} | {speed[0]:.2f} | {speed[1]:.2f} | "
            f"{speed[1] / max(speed[0], 1e-9):.2f} |",
            f"| megabytes | {size[0]:.1f} | {size[1]:.1f} | {size[1] / max(size[0], 1e-9):.2f} |", "",
        ]  # fmt: skip
        if self.parts:
            lines += ["| part of the network | stored in | effect on a score if quantised alone |", "|---|---|---:|"]
            lines += [f"| {part.name} | {part.precision} | {part.effect:.2e} |" for part in self.parts]
            lines += ["", "The resize, the distances, the map and the score are computed in float32.", ""]
        if self.metrics:
            lines += ["| metric | checkpoint | this file | change |", "|---|---:|---:|---:|"]
            lines += [f"| {metric} | {100 * old:.2f} | {100 * new:.2f} | {100 * (new - old):+.2f} |"
                      for metric, (old, new) in self.metrics.items()]  # fmt: skip
            lines += [""]
        lines += [f"Decisions need a calibration of this file's own scores: `recontrast calibrate {name} --good DIR`."]
        return "\n".join(lines) + "\n"


def check_precision(precision: str, kind: str, images: Sequence[Path]) -> None:
    """Check that a format can hold a precision, and that there are images to quantise with.

    Args:
        precision: Precision of the file.
        kind: File format.
        images: Good images.

    Raises:
        ValueError: If the precision is unknown or not that of a file of this format, or the images are too few.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"--precision: wanted {', '.join(PRECISIONS)}, got {precision!r}")
    formats = {"float32": ("onnx", "openvino", "pt2"), "bfloat16": ("openvino",)}.get(precision, ("onnx", "openvino"))
    if kind not in formats:
        raise ValueError(f"--precision {precision}: wanted --format {' or '.join(formats)}, got {kind}")
    if precision == "int8" and len(images) < FEWEST_IMAGES:
        raise ValueError(
            f"--images: wanted at least {FEWEST_IMAGES} good images, from which int8 takes the ranges of values, got "
            f"{len(images) or 'none'}"
        )


def check_tolerance(tolerance: float) -> float:
    """Return a tolerance, or raise an error if it is none.

    Args:
        tolerance: Largest relative difference allowed between two scores.

    Returns:
        The tolerance.

    Raises:
        ValueError: If it is not a finite number above 0.
    """
    if not 0 < tolerance < math.inf:
        raise ValueError(f"--tolerance: wanted a finite number above 0, got {tolerance:g}")
    return tolerance


def convert(
    model: Any, kind: str, precision: str, images: Sequence[Path], recipe: Recipe, tolerance: float
) -> tuple[Any, tuple[Part, ...]]:
    """Convert a graph to less than float32.

    For int8, the effect of each part of the network is measured. All are quantised, and those with the largest effect
    are left in float32 until no score differs by more than the tolerance.

    Args:
        model: ``onnx.ModelProto`` in float32, with the metadata of the exporter.
        kind: Format of the file, "onnx" or "openvino".
        precision: Precision of the file.
        images: Good images, for int8.
        recipe: Recipe, for the size and the bits of the images.
        tolerance: Largest relative difference allowed between two scores.

    Returns:
        The converted ``onnx.ModelProto``, and the parts of a quantised network.

    Raises:
        ValueError: If an image cannot be read, or no part can be quantised.
    """
    if precision == "float16" and kind == "onnx":
        return store_half_weights(model), ()
    if precision != "int8":  # OpenVINO stores float16 itself, and computes in bfloat16
        return model, ()
    samples = read_evenly(images, recipe, MOST_IMAGES)
    trial = samples.every(max(len(samples.images) // TRIAL_IMAGES, 1))
    layers = list_layers(model)
    if not layers:
        raise ValueError("export: wanted a network with convolutions or products that int8 can hold, got none")
    tensors = {name for layer in layers for name in (layer.source, layer.target)}
    ranges = measure_ranges(model, tensors, samples.images, samples.masks)
    wanted = _score(open_model(model, kind), trial)

    def build(groups: Sequence[str]) -> Any:
        chosen = [layer for layer in layers if layer.group in groups]
        return quantize(model, chosen, ranges, outputs=kind == "onnx", transposed=kind == "openvino")

    groups = list(dict.fromkeys(layer.group for layer in layers))
    effects = {
        group: Change.measure(wanted, _score(open_model(build([group]), kind), trial)).largest for group in groups
    }
    left = sorted(groups, key=effects.__getitem__)
    while left:
        result = build(left)
        if Change.measure(wanted, _score(open_model(result, kind), trial)).largest <= tolerance:
            parts = (Part(group, "int8" if group in left else "float32", effects[group]) for group in groups)
            return result, tuple(parts)
        left.pop()  # the one with the largest effect
    least = min(effects.values())
    raise ValueError(
        f"export: wanted scores within {tolerance:g} of those in float32 (relative), got {least:.2g} with int8 in one "
        "part of the network alone: nothing was written"
    )


def open_model(model: Any, kind: str) -> Scores:
    """Load a graph into the runtime of a format.

    Args:
        model: ``onnx.ModelProto``.
        kind: Format, "onnx" or "openvino".

    Returns:
        Function that maps images (N, H, W, 3), uint8, or float32 with a window, and with them masks (N, H, W), bool,
        of a graph that has this input, to scores (N,), float32.
    """
    content = model.SerializeToString()
    if kind == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return lambda *inputs: session.run(["score"], name_inputs(*inputs))[0]
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    core = openvino_file.get_core()
    compiled = core.compile_model(core.read_model(content), "CPU", settings)
    return lambda *inputs: np.array(compiled(name_inputs(*inputs))["score"])


def time_calls(detectors: Sequence[ExportedDetector], recipe: Recipe) -> tuple[float, ...]:
    """Time single images of the network's size, or single tiles, in turn.

    Args:
        detectors: Detectors in exported files.
        recipe: Recipe, for the size.

    Returns:
        Images per second of each, from medians.
    """
    levels = np.random.default_rng(0).integers(0, 256, (1, *graph_size(recipe), 3), np.uint8)
    image = from_levels(levels, recipe.window)
    seconds: list[list[float]] = [[] for _ in detectors]
    for _ in range(TIMED_CALLS + 1):
        for times, detector in zip(seconds, detectors, strict=True):
            start = time.perf_counter()
            detector.score(image)
            times.append(time.perf_counter() - start)
    return tuple(1 / statistics.median(times[1:]) for times in seconds)  # without the first, which allocates


def _score(scores: Scores, samples: Samples) -> NDArray[np.float32]:
    return np.concatenate([scores(*inputs) for inputs in iterate_inputs(samples.images, samples.masks)])
