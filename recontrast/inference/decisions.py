"""Decisions from a score and a map: p-value, good or defect, and the defective regions of the original image.

An image whose score is NaN, because its map is not finite, is undecided.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recontrast.calibration.conformal import Calibration
from recontrast.data import heatmaps
from recontrast.inference.detector import OPENERS, Detector, map_extent
from recontrast.metrics import regions as label_regions
from recontrast.recipes.recipe import Recipe

# Columns of regions.csv, in the order of the fields of `Region`.
REGION_COLUMNS = ("area", "top", "left", "height", "width", "peak", "peak_row", "peak_column")


@dataclass(frozen=True)
class Region:
    """8-connected region above the pixel threshold. Positions and sizes are in pixels of the original image.

    Attributes:
        area: Number of pixels.
        top: Top row of the bounding box.
        left: Left column of the bounding box.
        height: Height of the bounding box.
        width: Width of the bounding box.
        peak: Largest map value in the region.
        peak_row: Row of the first pixel with that value.
        peak_column: Column of the first pixel with that value.
    """

    area: int
    top: int
    left: int
    height: int
    width: int
    peak: float
    peak_row: int
    peak_column: int

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Decision:
    """Decision about one image.

    Attributes:
        p_value: Conformal p-value of the score; NaN if the score is.
        defect: Whether the score is above the threshold; None if the score is NaN.
        regions: Defective regions, highest peak first; None for a good or an undecided image, or without a pixel
            threshold.
    """

    p_value: float
    defect: bool | None
    regions: tuple[Region, ...] | None

    @property
    def label(self) -> Literal["good", "defect", "undecided"]:
        """Name of the decision, "good", "defect" or "undecided"."""
        return "undecided" if self.defect is None else "defect" if self.defect else "good"


def select_calibration(
    detector: Detector, rate: float | None, decide: bool, source: Path | Detector | None = None
) -> Calibration | None:
    """Return the calibration that decisions are based on.

    Args:
        detector: Detector, with or without a calibration.
        rate: Promised false-alarm rate that replaces the one of the calibration; None keeps it.
        decide: Whether decisions are required.
        source: Path of the detector, for the advice in the error message.

    Returns:
        Calibration with the requested rate; None if the detector has none and decisions are not required.

    Raises:
        ValueError: If decisions are required or a rate is given, and the detector has no calibration; or if the rate
            is too low for the number of calibration images.
    """
    if detector.calibration is not None:
        return detector.calibration if rate is None else detector.calibration.with_rate(rate)
    if not decide and rate is None:
        return None
    if detector.calibration_note is not None:
        raise ValueError(f"predict: decisions: {detector.calibration_note}")
    command = "recontrast calibrate CHECKPOINT --good DIR, then recontrast export"
    if isinstance(source, Path) and source.suffix.lower() not in OPENERS:
        command = f"recontrast calibrate {source} --good DIR"
    raise ValueError(f"predict: decisions: wanted a detector with a calibration, got one without: run {command} first")


def describe_undecided(name: str) -> str:
    """Describe in a sentence why an image has no score.

    Args:
        name: Name of the image.

    Returns:
        The sentence.
    """
    return f"{name}: wanted a finite anomaly map, got NaN or infinite values: it has no score and is undecided"


def decide(
    calibration: Calibration, anomaly: np.ndarray, score: float, shape: Sequence[int], recipe: Recipe
) -> Decision:
    """Decide whether an image is good or defective.

    Args:
        calibration: Calibration of the detector.
        anomaly: Anomaly map of the image, (h, w).
        score: Score of the image.
        shape: Height and width of the original image in pixels.
        recipe: Recipe of the detector; it says which part of the image the map covers.

    Returns:
        The decision, with the defective regions if there is a pixel threshold. If the score is not finite, the image is
        undecided.
    """
    if not math.isfinite(score):
        return Decision(math.nan, None, None)
    defect = bool(calibration.is_defect([score])[0])
    regions = None
    if defect and calibration.pixel_threshold is not None:
        regions = tuple(find_regions(anomaly, calibration.pixel_threshold, shape, recipe))
    return Decision(float(calibration.p_values([score])[0]), defect, regions)


def find_regions(anomaly: np.ndarray, threshold: float, shape: Sequence[int], recipe: Recipe) -> list[Region]:
    """Find the connected regions of a map above a threshold.

    Args:
        anomaly: Anomaly map, (h, w).
        threshold: Pixel threshold.
        shape: Height and width of the original image in pixels.
        recipe: Recipe of the detector; it says which part of the image the map covers.

    Returns:
        Regions in pixels of the original image, highest peak first.
    """
    top, left, height, width = map_extent(shape, recipe)
    resized = anomaly
    if anomaly.shape != (height, width):
        resized = heatmaps.resize_map(anomaly, (height, width))
        if (anomaly > threshold).any() and not (resized > threshold).any():
            # The image is smaller than its map, and averaging removed the peaks. Keep the maximum of each cell instead.
            resized = heatmaps.resize_map(heatmaps.reduce_to_peaks(anomaly, (height, width)), (height, width))
    labels, count = label_regions(resized > threshold)
    if not count:
        return []
    rows, columns = np.nonzero(labels)
    order = np.argsort(labels[rows, columns], kind="stable")
    rows, columns = rows[order], columns[order]
    areas = np.bincount(labels[rows, columns])[1:]
    regions, end = [], 0
    for area in areas.tolist():
        y, x = rows[end : end + area], columns[end : end + area]
        end += area
        values = resized[y, x]
        peak = int(values.argmax())
        regions.append(Region(
            area, top + int(y.min()), left + int(x.min()), int(y.max() - y.min()) + 1, int(x.max() - x.min()) + 1,
            float(values[peak]), top + int(y[peak]), left + int(x[peak]),
        ))  # fmt: skip
    return sorted(regions, key=lambda region: -region.peak)
