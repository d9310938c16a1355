"""Content of a report: scores, decisions, recall by defect type and curves from one pass over the test images."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.app.evaluate_job import decide_on_result
from recontrast.app.report.map_summaries import MapSummaries
from recontrast.calibration.conformal import Calibration
from recontrast.data import heatmaps
from recontrast.data.datasets import Sample
from recontrast.data.part_samples import join_part_samples
from recontrast.evaluation.evaluate import evaluate
from recontrast.evaluation.results import Result, Row
from recontrast.inference.infer import max_map_value
from recontrast.metrics import curves
from recontrast.metrics.curves import Curve
from recontrast.models.network import Network
from recontrast.recipes.recipe import Recipe

MISSED, FALSE_ALARM, FOUND, PASSED, OPEN = "missed", "false alarm", "found", "passed", "no decision"
UNREAD = "not read"
ERRORS = (MISSED, FALSE_ALARM)
Z = 1.959963984540054  # normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Shot:
    """One test image with its score and decision."""

    sample: Sample
    index: int  # of its small map in `Findings.heats`
    score: float
    p_value: float | None
    outcome: str
    margin: float  # distance from the threshold, in standard deviations of the category's scores


@dataclass(frozen=True)
class UnreadImage:
    """One test image without a score, and why, in one sentence."""

    sample: Sample
    error: str


@dataclass(frozen=True)
class Recall:
    """Number of images called defects: the recall of a defect type, or the false alarms among good images."""

    defect: str
    label: int  # 0: good, 1: anomalous
    images: int
    called: int

    @property
    def rate(self) -> float:
        """Share of the images that were called defects, in [0, 1]."""
        return self.called / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the rate (Wilson, 1927), in [0, 1]."""
        n, p = self.images, self.rate
        centre, half = p + Z**2 / (2 * n), Z * (p * (1 - p) / n + Z**2 / (4 * n**2)) ** 0.5
        return max(0.0, (centre - half) / (1 + Z**2 / n)), min(1.0, (centre + half) / (1 + Z**2 / n))


@dataclass(frozen=True)
class Section:
    """Results of one category."""

    row: Row
    shots: list[Shot]
    threshold: float | None  # calibrated, or maximizes F1 on these images; None without either
    recalls: list[Recall]  # by defect type, good images last
    heat: tuple[float, float]  # map values of the first and last colour
    centred: bool  # whether the threshold has the middle colour
    roc: Curve | None
    pro: Curve | None

    @property
    def point(self) -> tuple[float, float] | None:
        """Operating point on the ROC curve: false positive rate and recall, in [0, 1]; None without both classes."""
        counts = [[(r.called, r.images) for r in self.recalls if r.label == label] for label in (0, 1)]
        if not all(counts):
            return None
        false_positive_rate, recall = (sum(c for c, _ in pairs) / sum(n for _, n in pairs) for pairs in counts)
        return false_positive_rate, recall


@dataclass(frozen=True)
class Findings:
    """Content of a report without its pictures."""

    result: Result
    sections: list[Section]
    calibration: Calibration | None
    heats: list[NDArray[np.float32]] = field(repr=False)  # a small map (h, w) per image
    warnings: tuple[str, ...] = ()  # if the good images differ from the calibration images
    unread: tuple[UnreadImage, ...] = ()  # test images that are missing from the metrics
    errors: tuple[str, ...] = ()  # one sentence for each image that failed

    @property
    def shots(self) -> list[Shot]:
        """All images, from the worst error to the correct decision with the largest margin."""
        return sorted((shot for section in self.sections for shot in section.shots), key=_error_order)


def gather(
    model: Network, groups: Mapping[str, Sequence[Sample]], recipe: Recipe,
    calibration: Calibration | None = None, *,
    device: str | None = None, batch: int = 16, on_progress: Callable[[str, int, int], None] | None = None,
) -> Findings:  # fmt: skip
    """Evaluate a model once and collect the content of its report.

    Args:
        model: Trained model, or one converted for inference.
        groups: Samples by category; those of the train split are ignored.
        recipe: Recipe of the model.
        calibration: Calibrated threshold; None uses the threshold that maximizes F1 on these images.
        device: Device for the model; None does not move it.
        batch: Batch size in images.
        on_progress: Called with the category, the images processed and the number of images in the category.
    """
    groups = {name: join_part_samples(samples, recipe.image_views) for name, samples in groups.items()}
    summaries = MapSummaries(recipe, max_map_value(model, recipe))
    result = evaluate(
        model, groups, recipe, device=device, batch=batch, on_progress=on_progress, on_maps=summaries.add, errors="keep"
    )
    samples = {str(sample.path): sample for group in groups.values() for sample in group}
    positions = {str(sample.path): index for index, sample in enumerate(summaries.samples)}
    sections, unread = [], []
    for row in result.rows:
        images = [image for image in result.scored if image.category == row.category]
        unread += [UnreadImage(samples[image.path], str(image.error)) for image in images if math.isnan(image.score)]
        scored = [image for image in images if not math.isnan(image.score)]
        if scored:
            indices = [positions[image.path] for image in scored]
            scores = np.array([image.score for image in scored])
            sections.append(_build_section(row, summaries, scores, indices, recipe, calibration))
    warnings: tuple[str, ...] = ()
    lost: dict[str, str] = {}
    if calibration is not None:
        warnings = tuple(decide_on_result(result, calibration, groups, recipe, unread=lost).warnings())
    return Findings(
        result, sections, calibration, summaries.small, warnings, tuple(unread), (*result.errors, *lost.values())
    )


def _build_section(
    row: Row, summaries: MapSummaries, scores: NDArray[Any], indices: Sequence[int], recipe: Recipe,
    calibration: Calibration | None
) -> Section:  # fmt: skip
    samples = [summaries.samples[index] for index in indices]
    threshold = row.i_threshold if calibration is None else float(calibration.threshold)
    labels = np.array([sample.label for sample in samples])
    called = None
    if threshold is not None:
        called = scores >= threshold if calibration is None else np.asarray(calibration.is_defect(scores))
    p_values = [None] * len(samples) if calibration is None else np.asarray(calibration.p_values(scores)).tolist()
    unit = float(scores.std()) or 1.0
    shots = [
        Shot(
            sample, indices[i], score, p_values[i],
            _classify(sample.label, None if called is None else bool(called[i])),
            abs(score - threshold) / unit if threshold is not None else -score / unit,
        )
        for i, (sample, score) in enumerate(zip(samples, scores.tolist(), strict=True))
    ]  # fmt: skip
    recalls = []
    if called is not None:
        for label, defect in sorted({(s.label, s.defect) for s in samples}, key=lambda pair: (-pair[0], pair[1])):
            selected = np.array([sample.defect == defect for sample in samples])
            recalls.append(Recall(defect, label, int(selected.sum()), int(called[selected].sum())))
    has_both_classes = 0 < row.defects < row.images
    middle = threshold if recipe.score == "max" else None  # the mean of a map is not one of its values
    medians, peaks = ([values[index] for index in indices] for values in (summaries.medians, summaries.peaks))
    heat = heatmaps.colour_range(medians, peaks, middle)
    return Section(
        row, shots, threshold, recalls, heat, middle is not None and heat[0] < middle,
        curves.thin(curves.roc(scores, labels)) if has_both_classes else None,
        None if row.aupro is None else summaries.curve(row.category),
    )  # fmt: skip


def _classify(label: int, called: bool | None) -> str:
    if called is None:
        return OPEN
    return (FOUND if called else MISSED) if label else (FALSE_ALARM if called else PASSED)


def _error_order(shot: Shot) -> tuple[bool, float]:
    wrong = shot.outcome in ERRORS
    return not wrong, -shot.margin if wrong else shot.margin
