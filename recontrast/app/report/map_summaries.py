"""What a report keeps of anomaly maps: a small picture of each, how warm they are, and the overlap curve of a category.

64 kB an image at most, so that the maps of tiled detectors, which have the size of the images, need not be kept.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data import heatmaps
from recontrast.data.datasets import Sample
from recontrast.evaluation.ground_truth import read_ground_truth
from recontrast.metrics import curves
from recontrast.metrics.curves import Curve
from recontrast.metrics.streaming import Streaming
from recontrast.recipes.recipe import Recipe

SIDE = 128  # of a small map, at most: a map of 256 px is blurred over 33
LIMIT = 0.3  # false positive rate at which the overlap curve and AUPRO end


class MapSummaries:
    """Takes the maps of one category after the other, as `recontrast.evaluation.evaluate.evaluate` hands them on.

    Args:
        recipe: of the detector, for its masks.
        high: the largest value that a map can have.
    """

    def __init__(self, recipe: Recipe, high: float) -> None:
        self.recipe, self.high = recipe, high
        self.samples: list[Sample] = []
        self.small: list[NDArray[np.float32]] = []  # (h, w) each
        self.medians: list[float] = []
        self.peaks: list[float] = []
        self._streamed: Streaming | None = None
        self._curves: dict[str, Curve] = {}

    def add(self, samples: Sequence[Sample], maps: NDArray[np.float32]) -> None:
        """Maps (n, H, W) of ``samples``, which are of one category."""
        if not self.samples or self.samples[-1].category != samples[0].category:
            self._close()
            self._streamed = Streaming(self.high, LIMIT)
        for sample, anomaly in zip(samples, maps, strict=True):
            self.small.append(small(anomaly))
            self.medians.append(float(np.median(anomaly)))
            self.peaks.append(float(anomaly.max()))
            self.samples.append(sample)
        if any(sample.label and sample.mask is None for sample in samples):
            self._streamed = None  # the curve would be of a part of the category
        if self._streamed is not None:
            good = np.zeros(maps.shape[1:], bool)
            self._streamed.update(
                maps, np.stack([read_ground_truth(s, self.recipe) if s.label else good for s in samples])
            )

    def curve(self, category: str) -> Curve | None:
        """Per-region-overlap curve of a category; None where a defect has no mask, or pixels are of one kind."""
        self._close()
        return self._curves.get(category)

    def _close(self) -> None:
        if self._streamed is not None and self._streamed.has_both_classes:
            self._curves[self.samples[-1].category] = curves.thin(self._streamed.overlap_curve(LIMIT))
        self._streamed = None


def small(anomaly: NDArray[Any]) -> NDArray[np.float32]:
    """A map of at most `SIDE` pixels a side; of a large one the peak of each block, so that a small defect stays hot.

    Args:
        anomaly: (H, W), a map or a mask.

    Returns:
        (h, w), of the same proportions but for rounding.
    """
    scale = min(SIDE / max(anomaly.shape), 1)
    size = (max(round(anomaly.shape[0] * scale), 1), max(round(anomaly.shape[1] * scale), 1))
    if scale >= 0.5:
        return heatmaps.resize_map(anomaly, size)
    return heatmaps.reduce_to_peaks(anomaly, size).astype(np.float32)
