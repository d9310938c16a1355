"""sPRO, the saturated per-region overlap of MVTec LOCO AD, exactly and in bounded memory.

Bergmann et al., IJCV 2022, https://doi.org/10.1007/s11263-022-01578-9. A defect of area a counts as found once its
saturation area s <= a is called anomalous: its overlap is min(called / s, 1). The s pixels of a defect with the highest
scores therefore contribute 1 / s each, and its other pixels nothing, so that the curve is that of AUPRO with other
weights. Up to a false positive rate x, only the share x of the good pixels with the highest scores is needed. No other
score is kept.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.metrics import inputs, reference

Array = NDArray[Any]
SLACK = 1 << 16  # scores beyond those that are needed, at least, before the smallest ones are dropped


def saturation_area(area: int, threshold: float, relative: bool) -> float:
    """Compute the saturation area of a defect, as Bergmann et al. define it (IJCV 2022).

    Args:
        area: Number of pixels of the defect.
        threshold: ``saturation_threshold`` of the kind of defect: a share of the area, or a number of pixels.
        relative: Whether it is a share, ``relative_saturation``. The product is rounded down.

    Returns:
        Number of pixels, at least 1 and at most ``area``.

    Raises:
        ValueError: If the defect has no pixel, or the threshold is not positive, or is a share above 1.
    """
    if area < 1 or not threshold > 0 or (relative and threshold > 1):
        wanted = "a share in (0, 1]" if relative else "a positive number of pixels"
        raise ValueError(f"saturation: wanted {wanted} of a defect with pixels, got {threshold} of {area} pixels")
    return float(max(int(threshold * area), 1) if relative else min(threshold, area))


def aupro_saturated(
    maps: Sequence[Any], defects: Sequence[Any], saturations: Sequence[Sequence[float]], limit: float = 0.05
) -> float:
    """Compute the area under the sPRO curve up to a false positive rate (Bergmann et al., IJCV 2022).

    The false positive rate counts the pixels of all images that belong to no defect. Defects may overlap.

    Args:
        maps: Anomaly maps of N images, each (H, W); sizes may differ.
        defects: Masks of the defects of each image, (D, H, W), bool, 0/1 or 0/255; D is 0 for a good image. A mask is
            one defect, even if it is not connected.
        saturations: Saturation area of each defect in pixels, see `saturation_area`.
        limit: False positive rate in (0, 1] at which the curve ends, by interpolation.

    Returns:
        The area divided by ``limit``, in [0, 1].

    Raises:
        ValueError: If a value is not finite, shapes or lengths differ, a saturation area is out of range, there is no
            defect or no good pixel, or the limit is not in (0, 1].
    """
    if not len(maps) == len(defects) == len(saturations):
        raise ValueError(f"defects: wanted those of {len(maps)} maps, got {len(defects)} and {len(saturations)}")
    overlap = SaturatedOverlap(sum(int(np.size(inputs.as_array(anomaly))) for anomaly in maps), limit)
    for anomaly, masks, areas in zip(maps, defects, saturations, strict=True):
        overlap.update(anomaly, masks, areas)
    return overlap.compute()


class SaturatedOverlap:
    """Accumulate maps and defects image by image (sPRO of Bergmann et al., IJCV 2022).

    The memory is that of ``limit * pixels`` scores, and of the saturation areas of all defects.

    Args:
        pixels: Number of pixels of all images that will be added, or more.
        limit: False positive rate in (0, 1] at which the curve ends.

    Raises:
        ValueError: If the limit is not in (0, 1].
    """

    def __init__(self, pixels: int, limit: float = 0.05) -> None:
        self.pixels, self.limit = pixels, inputs.check_limits(limit)[0]
        self.good = _LargestScores(math.floor(self.limit * pixels) + 1)
        self.scores: list[Array] = []  # of each defect, the highest ones
        self.weights: list[Array] = []  # their contributions to the sum of the overlaps

    def update(self, anomaly: Any, defects: Any = (), saturations: Sequence[float] = ()) -> None:
        """Add one image.

        Args:
            anomaly: Anomaly map (H, W), finite.
            defects: Masks of its defects (D, H, W), bool, 0/1 or 0/255.
            saturations: Saturation area of each defect in pixels.

        Raises:
            ValueError: If a value is not finite, shapes or lengths differ, or a saturation area is out of range.
        """
        scores = inputs.as_scores(anomaly, "maps")
        masks = inputs.as_bool(defects, "defects") if len(defects) else np.zeros((0, *scores.shape), bool)
        if scores.ndim != 2 or masks.shape[1:] != scores.shape or len(masks) != len(saturations):
            raise ValueError(
                f"defects: wanted (D, H, W) for a map (H, W) and D saturation areas, got {masks.shape}, {scores.shape} "
                f"and {len(saturations)}"
            )
        if not np.isfinite(scores).all():
            raise ValueError("maps: wanted finite numbers, got NaN or infinite ones")
        found = []
        for mask, saturation in zip(masks, saturations, strict=True):
            values = scores[mask]
            if not 0 < saturation <= values.size:
                raise ValueError(f"saturations: wanted from 0 to {values.size} pixels, got {saturation}")
            count = math.ceil(saturation)
            weights = np.full(count, 1 / saturation)
            weights[-1] = 1 - (count - 1) / saturation  # the last one, if the area is not a whole number
            highest = np.sort(np.partition(values, values.size - count)[values.size - count :])[::-1]
            found.append((highest, weights))
        self.good.add(scores[~masks.any(axis=0)] if len(masks) else scores.ravel())
        for highest, weights in found:
            self.scores.append(highest)
            self.weights.append(weights)

    def merge(self, other: "SaturatedOverlap") -> None:
        """Add the images of another accumulator, whose ``pixels`` and ``limit`` must be the same.

        Args:
            other: The other accumulator.

        Raises:
            ValueError: If they differ.
        """
        if (self.pixels, self.limit) != (other.pixels, other.limit):
            raise ValueError(
                f"merge: wanted pixels and limit {self.pixels} and {self.limit:g}, got {other.pixels} and "
                f"{other.limit:g}"
            )
        self.good.merge(other.good)
        self.scores += other.scores
        self.weights += other.weights

    def compute(self) -> float:
        """Compute the area under the curve up to the limit, divided by it.

        Returns:
            The area, in [0, 1].

        Raises:
            ValueError: If there is no defect or no good pixel, or more pixels were added than announced.
        """
        negatives = self.good.total
        if not self.scores or not negatives:
            raise ValueError(
                f"defects: wanted at least one defect and one good pixel, got {len(self.scores)} and {negatives}"
            )
        if negatives > self.pixels:
            raise ValueError(f"pixels: wanted at most {self.pixels}, as announced, got {negatives} good ones")
        scores, weights = np.concatenate(self.scores), np.concatenate(self.weights)
        order = np.argsort(scores, kind="stable")[::-1]
        scores = scores[order]
        last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))  # end of each run of equal scores
        above, reached = self.good.count(scores[last])
        sweep = reference.Sweep(
            threshold=scores[last], tp=last + 1, fp=reached, above=above,
            overlap=np.cumsum(weights[order])[last] / len(self.scores), negatives=negatives,
        )  # fmt: skip
        return reference.compute_aupro(sweep, self.limit)


class _LargestScores:
    """The largest scores of many, at least ``keep`` of them: those above ``cutoff``, and how many are equal to it."""

    def __init__(self, keep: int) -> None:
        self.keep, self.total, self.size = keep, 0, 0
        self.cutoff, self.tied = np.float64(-math.inf), 0  # a float would be rounded to float32 where it is compared
        self.chunks: list[Array] = []

    def add(self, scores: Array) -> None:
        """Add scores (M,)."""
        self.total += scores.size
        self._add_tied(self.cutoff, int(np.count_nonzero(scores == self.cutoff)))
        self._append(scores[scores > self.cutoff])

    def merge(self, other: "_LargestScores") -> None:
        """Add the scores of another."""
        self.total += other.total
        if other.cutoff > self.cutoff:  # what is below is not among the largest ones of both
            kept = np.concatenate(self.chunks or [np.zeros(0)])
            self.tied = int(np.count_nonzero(kept == other.cutoff))
            self.cutoff, self.chunks, self.size = other.cutoff, [], 0
            self._append(kept[kept > other.cutoff])
        self._add_tied(other.cutoff, other.tied)
        for chunk in other.chunks:
            self.tied += int(np.count_nonzero(chunk == self.cutoff))
            self._append(chunk[chunk > self.cutoff])

    def count(self, thresholds: Array) -> tuple[Array, Array]:
        """Return how many scores are above, and how many at or above, each threshold.

        Below ``cutoff``, both are lower bounds that are at least ``keep``.
        """
        kept = np.sort(np.concatenate(self.chunks)) if self.chunks else np.zeros(0)
        above = kept.size - np.searchsorted(kept, thresholds, side="right")
        reached = kept.size - np.searchsorted(kept, thresholds, side="left")
        return above + self.tied * (thresholds < self.cutoff), reached + self.tied * (thresholds <= self.cutoff)

    def _add_tied(self, value: np.float64, count: int) -> None:
        if value == self.cutoff:
            self.tied += count

    def _append(self, scores: Array) -> None:
        if scores.size:
            self.chunks.append(scores.copy())
            self.size += scores.size
        if self.size >= self.keep + max(self.keep // 2, SLACK):
            kept = np.concatenate(self.chunks)
            cutoff = np.partition(kept, kept.size - self.keep)[kept.size - self.keep]
            self.cutoff, self.tied = np.float64(cutoff), int(np.count_nonzero(kept == cutoff))
            self.chunks = [kept[kept > cutoff]]
            self.size = self.chunks[0].size
