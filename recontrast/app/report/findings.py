"""What a report says: one pass over test images, decisions, recall by kind of defect, curves."""

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
from recontrast.evaluation.evaluate import evaluate
from recontrast.evaluation.results import Result, Row
from recontrast.inference.infer import max_map_value
from recontrast.metrics import curves
from recontrast.metrics.curves import Curve
from recontrast.models.fold import FoldedModel
from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe

MISSED, FALSE_ALARM, FOUND, PASSED, OPEN = "missed", "false alarm", "found", "passed", "no decision"
ERRORS = (MISSED, FALSE_ALARM)
Z = 1.959963984540054  # of 95 %, normal


@dataclass(frozen=True)
class Shot:
    """One test image, what was said of it, and by how much that was right or wrong."""

    sample: Sample
    place: int  # of its small map among all
    score: float
    p_value: float | None
    outcome: str
    margin: float  # distance from the threshold, in standard deviations of the category's scores


@dataclass(frozen=True)
class Recall:
    """How many images of one kind were called defects: recall of a kind of defect, false alarms of the good ones."""

    defect: str
    label: int  # 1 anomalous
    images: int
    called: int

    @property
    def rate(self) -> float:
        """Share that was called a defect."""
        return self.called / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the rate (Wilson, 1927)."""
        n, p = self.images, self.rate
        centre, half = p + Z**2 / (2 * n), Z * (p * (1 - p) / n + Z**2 / (4 * n**2)) ** 0.5
        return max(0.0, (centre - half) / (1 + Z**2 / n)), min(1.0, (centre + half) / (1 + Z**2 / n))


@dataclass(frozen=True)
class Section:
    """One category."""

    row: Row
    shots: list[Shot]
    threshold: float | None  # calibrated, or of F1-max on these images; None where neither is
    recalls: list[Recall]  # by kind of defect, the good ones last
    heat: tuple[float, float]  # map values of the coldest and of the hottest colour
    centred: bool  # the threshold has the middle colour
    roc: Curve | None
    pro: Curve | None

    @property
    def point(self) -> tuple[float, float] | None:
        """Where the threshold lies on the ROC curve: false alarms and recall, in [0, 1]."""
        sums = [[(r.called, r.images) for r in self.recalls if r.label == label] for label in (0, 1)]
        if not all(sums):
            return None
        alarms, found = (sum(c for c, _ in some) / sum(n for _, n in some) for some in sums)
        return alarms, found


@dataclass(frozen=True)
class Findings:
    """All of a report but its pictures."""

    result: Result
    sections: list[Section]
    calibration: Calibration | None
    heats: list[NDArray[np.float32]] = field(repr=False)  # a small map (h, w) of each image
    warnings: tuple[str, ...] = ()  # where the good images are not like those of the calibration

    @property
    def shots(self) -> list[Shot]:
        """All images, the worst error first and the surest right decision last."""
        return sorted((shot for section in self.sections for shot in section.shots), key=_by_error)


def gather(
    model: ReContrast | FoldedModel, groups: Mapping[str, Sequence[Sample]], recipe: Recipe,
    calibration: Calibration | None = None, *,
    device: str | None = None, batch: int = 16, on_progress: Callable[[str, int, int], None] | None = None,
) -> Findings:  # fmt: skip
    """Evaluate once.

    Args:
        model: trained, or one for inference.
        groups: samples by category; those of the train split are passed over.
        recipe: that the model was trained with.
        calibration: decides; None: F1-max on these very images does.
        device: None leaves the model where it is.
        batch: images at once.
        on_progress: called with category, images done, and images of the category.
    """
    kept = MapSummaries(recipe, max_map_value(model, recipe))
    result = evaluate(model, groups, recipe, device=device, batch=batch, on_progress=on_progress, on_maps=kept.add)
    sections, begun = [], 0
    for row in result.rows:
        scores = np.array([scored.score for scored in result.scored[begun : begun + row.images]])
        sections.append(_section(row, kept, scores, begun, recipe, calibration))
        begun += row.images
    seen = () if calibration is None else tuple(decide_on_result(result, calibration, groups, recipe).warnings())
    return Findings(result, sections, calibration, kept.small, seen)


def _section(
    row: Row, kept: MapSummaries, scores: NDArray[Any], begun: int, recipe: Recipe, calibration: Calibration | None
) -> Section:  # fmt: skip
    inside = slice(begun, begun + row.images)
    samples = kept.samples[inside]
    threshold = row.i_threshold if calibration is None else float(calibration.threshold)
    labels = np.array([sample.label for sample in samples])
    called = None
    if threshold is not None:
        called = scores >= threshold if calibration is None else np.asarray(calibration.is_defect(scores))
    p_values = [None] * len(samples) if calibration is None else np.asarray(calibration.p_values(scores)).tolist()
    unit = float(scores.std()) or 1.0
    shots = [
        Shot(
            sample, begun + i, score, p_values[i], _outcome(sample.label, None if called is None else bool(called[i])),
            abs(score - threshold) / unit if threshold is not None else -score / unit,
        )
        for i, (sample, score) in enumerate(zip(samples, scores.tolist(), strict=True))
    ]  # fmt: skip
    recalls = []
    if called is not None:
        for label, kind in sorted({(s.label, s.defect) for s in samples}, key=lambda of: (-of[0], of[1])):
            of = np.array([sample.defect == kind for sample in samples])
            recalls.append(Recall(kind, label, int(of.sum()), int(called[of].sum())))
    both = 0 < row.defects < row.images
    shown = threshold if recipe.score == "max" else None  # the mean of a map is not one of its values
    heat = heatmaps.colour_range(kept.medians[inside], kept.peaks[inside], shown)
    return Section(
        row, shots, threshold, recalls, heat, shown is not None and heat[0] < shown,
        curves.thin(curves.roc(scores, labels)) if both else None,
        None if row.aupro is None else kept.curve(row.category),
    )  # fmt: skip


def _outcome(label: int, called: bool | None) -> str:
    if called is None:
        return OPEN
    return (FOUND if called else MISSED) if label else (FALSE_ALARM if called else PASSED)


def _by_error(shot: Shot) -> tuple[bool, float]:
    wrong = shot.outcome in ERRORS
    return not wrong, -shot.margin if wrong else shot.margin
