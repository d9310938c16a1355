"""From score and map to a decision: p-value, good or defect, and where the defects are in the original image."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recontrast.calibration.conformal import Calibration
from recontrast.data import heatmaps
from recontrast.inference.detector import OPENERS, Detector, map_extent
from recontrast.metrics import regions
from recontrast.recipes.recipe import Recipe

REGION_COLUMNS = ("area", "top", "left", "height", "width", "peak", "peak_row", "peak_column")


@dataclass(frozen=True)
class Region:
    """One 8-connected region above the pixel threshold; everything in pixels of the original image."""

    area: int
    top: int  # of the box around it
    left: int
    height: int
    width: int
    peak: float  # the largest map value in it ...
    peak_row: int  # ... and where it is first found
    peak_column: int

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


@dataclass(frozen=True)
class Decision:
    """What a calibration says of one image."""

    p_value: float
    defect: bool
    regions: tuple[Region, ...] | None  # of an image called good, or without a pixel threshold: None

    @property
    def label(self) -> str:
        """Good or defect."""
        return "defect" if self.defect else "good"


def select_calibration(
    detector: Detector, rate: float | None, decide: bool, source: Path | Detector | None = None
) -> Calibration | None:
    """The calibration to decide by.

    Args:
        detector: may have one.
        rate: promised share of false alarms in place of the stored one; None keeps it.
        decide: whether it is an error to have none.
        source: where the detector comes from, for the sentence of the error.
    """
    found = detector.calibration
    if found is None:
        if decide or rate is not None:
            if (reason := getattr(detector, "calibration_note", None)) is not None:
                raise ValueError(f"predict: decisions: {reason}")
            run = "recontrast calibrate CHECKPOINT --good DIR, then recontrast export"
            if isinstance(source, Path) and source.suffix.lower() not in OPENERS:
                run = f"recontrast calibrate {source} --good DIR"
            raise ValueError(
                f"predict: decisions: wanted a detector with a calibration, got one without: run {run} first"
            )
        return None
    return found if rate is None else found.with_rate(rate)


def decide(
    calibration: Calibration, anomaly: np.ndarray, score: float, shape: Sequence[int], recipe: Recipe
) -> Decision:
    """Decide on one image.

    Args:
        calibration: whose promise holds.
        anomaly: (h, w), its map.
        score: its score.
        shape: (H, W) of the original image.
        recipe: says which part of it the map stands for.
    """
    defect = bool(calibration.is_defect([score])[0])
    where = None
    if defect and calibration.pixel_threshold is not None:
        where = tuple(find_regions(anomaly, calibration.pixel_threshold, shape, recipe))
    return Decision(float(calibration.p_values([score])[0]), defect, where)


def find_regions(anomaly: np.ndarray, threshold: float, shape: Sequence[int], recipe: Recipe) -> list[Region]:
    """Regions of a map (h, w) above ``threshold`` in an original of ``shape`` (H, W), the highest peak first."""
    top, left, height, width = map_extent(shape, recipe)
    warm = anomaly
    if anomaly.shape != (height, width):
        warm = heatmaps.resize_map(anomaly, (height, width))
        if (anomaly > threshold).any() and not (warm > threshold).any():  # a mean cooled it: the image is smaller
            warm = heatmaps.resize_map(heatmaps.reduce_to_peaks(anomaly, (height, width)), (height, width))
    labels, count = regions(warm > threshold)
    if not count:
        return []
    rows, columns = np.nonzero(labels)
    order = np.argsort(labels[rows, columns], kind="stable")
    rows, columns = rows[order], columns[order]
    areas = np.bincount(labels[rows, columns])[1:]
    found, end = [], 0
    for area in areas.tolist():
        y, x = rows[end : end + area], columns[end : end + area]
        end += area
        values = warm[y, x]
        peak = int(values.argmax())
        found.append(Region(
            area, top + int(y.min()), left + int(x.min()), int(y.max() - y.min()) + 1, int(x.max() - x.min()) + 1,
            float(values[peak]), top + int(y[peak]), left + int(x[peak]),
        ))  # fmt: skip
    return sorted(found, key=lambda region: -region.peak)
