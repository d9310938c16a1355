"""Summaries of anomaly maps for a report: a small map and value range per image, an overlap curve per category.

A summary takes at most 64 kB per image. Full maps of tiled detectors have the size of the images and are not stored.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data import heatmaps
from recontrast.data.datasets import Sample
from recontrast.evaluation.ground_truth import read_ground_truth
from recontrast.evaluation.sample_images import READ_ERRORS
from recontrast.metrics import curves
from recontrast.metrics.curves import Curve
from recontrast.metrics.streaming import Streaming
from recontrast.recipes.recipe import Recipe

SIDE = 128  # maximum side of a small map in pixels; the default blur spans 33 of 256 pixels, so little detail is lost
LIMIT = 0.3  # false positive rate at which the overlap curve and AUPRO end


class MapSummaries:
    """Collector of map summaries, one category after the other, for `recontrast.evaluation.evaluate.evaluate`.

    Args:
        recipe: Recipe of the detector; determines the size of the masks.
        high: Upper bound of the map values.
    """

    def __init__(self, recipe: Recipe, high: float) -> None:
        self.recipe, self.high = recipe, high
        self.samples: list[Sample] = []
        self.small: list[NDArray[np.float32]] = []  # (h, w) each
        self.medians: list[float] = []
        self.peaks: list[float] = []
        self._streaming: Streaming | None = None
        self._curves: dict[str, Curve] = {}

    def add(self, samples: Sequence[Sample], maps: NDArray[np.float32]) -> None:
        """Add the maps (n, H, W) of ``samples``, which belong to one category."""
        if not self.samples or self.samples[-1].category != samples[0].category:
            self._close()
            self._streaming = Streaming(self.high, LIMIT)
        for sample, anomaly in zip(samples, maps, strict=True):
            self.small.append(shrink_map(anomaly))
            self.medians.append(float(np.median(anomaly)))
            self.peaks.append(float(anomaly.max()))
            self.samples.append(sample)
        if any(sample.label and sample.mask is None for sample in samples):
            self._streaming = None  # without all masks the curve would describe only part of the category
        if self._streaming is not None:
            masks = [self._read_mask(sample, maps.shape[1:]) for sample in samples]
            usable = [index for index, mask in enumerate(masks) if mask is not None]
            if usable:
                self._streaming.update(maps[usable], np.stack([mask for mask in masks if mask is not None]))

    def _read_mask(self, sample: Sample, shape: Sequence[int]) -> NDArray[np.bool_] | None:
        """Return the mask of a sample; None if it cannot be read, which the evaluation reports."""
        if not sample.label:
            return np.zeros(tuple(shape), bool)
        try:
            return read_ground_truth(sample, self.recipe)
        except READ_ERRORS:
            return None

    def curve(self, category: str) -> Curve | None:
        """Return the per-region-overlap curve of a category; None if a mask is missing or all pixels have one class."""
        self._close()
        return self._curves.get(category)

    def _close(self) -> None:
        if self._streaming is not None and self._streaming.has_both_classes:
            self._curves[self.samples[-1].category] = curves.thin(self._streaming.overlap_curve(LIMIT))
        self._streaming = None


def shrink_map(anomaly: NDArray[Any]) -> NDArray[np.float32]:
    """Resize a map to at most `SIDE` pixels per side.

    Large maps keep the peak of each block, so small defects stay visible.

    Args:
        anomaly: Map or mask (H, W).

    Returns:
        Map (h, w) with the same aspect ratio up to rounding.
    """
    scale = min(SIDE / max(anomaly.shape), 1)
    size = (max(round(anomaly.shape[0] * scale), 1), max(round(anomaly.shape[1] * scale), 1))
    if scale >= 0.5:
        return heatmaps.resize_map(anomaly, size)
    return heatmaps.reduce_to_peaks(anomaly, size).astype(np.float32)
