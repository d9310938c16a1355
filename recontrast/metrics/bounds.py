"""Pixel metrics from histograms of scores, each with a proven bound on the error of binning.

Sort the bins from the highest score down. Bin b holds p positive and n good pixels. All bins above it hold T positive
and F good pixels, all bins together P and N. The overlap of all bins above b sums to H, that of b is h. Bins are
intervals, so that only the order inside a bin is unknown. Each metric therefore lies between a lower and an upper
value. The estimate is their mean, and the bound is half their difference.

- *AUROC*: Among the P N pairs of a positive and a good pixel, the order of those in different bins is known. Each of
  the p n pairs inside a bin counts between 0 and 1 (a tie counts 1/2). Counting each as 1/2 gives the estimate, and the
  bound is ``sum p n / (2 P N)``.
- *AP* is the mean over positives of the precision at their threshold. At a threshold inside b, at most T + p positive
  and at least F good pixels are called anomalous, so that the precision is at most ``(T + p) / (T + p + F)``. At the
  threshold of the j-th positive of b, they are at least T + j positive and at most G = F + n good pixels, so that the
  precision is at least (T + j) / (T + j + G) = 1 - G / (c + j) with c = T + G. As 1 / x is convex, 1 / (c + j) is at
  most its mean from c + j - 1/2 to c + j + 1/2, and the positives of b contribute at least
  ``p - G ln(1 + p / (c + 1/2))`` together.
- *F1-max*: F1 is known exactly at the lower edge of each bin, and the largest of these values is the lower value. At a
  threshold inside b, F1 is 2 tp / (tp + fp + P) with tp <= T + p and fp >= F, which is at most
  ``2 (T + p) / (T + p + F + P)``.
- *AUPRO*: The overlap never decreases along the curve. Over the good pixels of b it lies between H and H + h, and
  ``min(n, limit N - F)`` of them are below the limit. The overlap of R regions is counted in units of 2^-40 of a
  region. Rounding changes the share of a pixel by at most 2^-41, and the mean overlap by at most ``2^-41 P / R``, which
  the bound includes.

Sums are computed in float64. The bounds do not include their rounding error of about 1e-13.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
UNIT = 40  # one region counts 2 ** UNIT in the histogram of overlaps


class Estimate(NamedTuple):
    """Metric from binned scores; the exact metric lies within ``bound`` of ``value`` (`recontrast.metrics.bounds`).

    Attributes:
        value: Mean of the smallest and the largest possible value, in [0, 1].
        bound: Half their difference.
    """

    value: float
    bound: float


@dataclass(frozen=True)
class Bins:
    """Counts of B bins, from the highest scores down."""

    good: Array  # (B,) n
    positive: Array  # (B,) p
    overlap: Array  # (B,) h, mean over regions
    regions: int

    @property
    def sums_above(self) -> tuple[Array, Array, Array]:
        """Good, positive and overlap sums of the bins above each bin: T, F and H."""
        t, f, h = (np.cumsum(x) - x for x in (self.positive, self.good, self.overlap))
        return t, f, h


def select_bins(counts: Array, regions: int) -> tuple[Bins, Array]:
    """Select the non-empty bins.

    Args:
        counts: (3, bins) good pixels, positive pixels and shares of regions, from the lowest scores up.
        regions: Number of regions.

    Returns:
        Non-empty bins from the highest scores down, and their indices in ``counts``.
    """
    used = np.flatnonzero(counts[0] + counts[1])[::-1]
    good, positive, share = counts[:, used]
    return Bins(good, positive, share / (2.0**UNIT * max(regions, 1)), regions), used


def auroc(bins: Bins) -> Estimate:
    """Estimate the area under the ROC curve."""
    n, p = bins.good.astype(float), bins.positive.astype(float)
    pairs, (_, f, _) = float(p.sum() * n.sum()), bins.sums_above
    inside = float(np.sum(p * n)) / pairs
    lower = float(np.sum(p * (n.sum() - f - n))) / pairs
    return _estimate_between(lower, lower + inside)


def ap(bins: Bins) -> Estimate:
    """Estimate average precision."""
    n, p, (t, f, _) = bins.good, bins.positive, bins.sums_above
    g, has_positive = f + n, p > 0
    lower = np.sum(p - g * np.log1p(p / (t + g + 0.5)))
    upper = np.sum((p * (t + p))[has_positive] / (t + p + f)[has_positive])
    return _estimate_between(*(float(x) / float(p.sum()) for x in (lower, upper)))


def f1_max(bins: Bins) -> tuple[Estimate, int]:
    """Estimate the largest F1 over all thresholds.

    Returns:
        The estimate, and the index of the bin whose lower edge, taken as threshold, has the lower bound as its F1.
    """
    n, p, (t, f, _) = bins.good, bins.positive, bins.sums_above
    at_edges = 2 * (t + p) / (t + p + f + n + p.sum())
    best = int(np.argmax(at_edges))
    upper = np.max(2 * (t + p) / (t + p + f + p.sum()))
    return _estimate_between(float(at_edges[best]), float(upper)), best


def aupro(bins: Bins, limit: float) -> Estimate:
    """Estimate the area under the per-region-overlap curve up to the false positive rate ``limit``, divided by it."""
    n, (_, f, h) = bins.good, bins.sums_above
    stop = limit * float(n.sum())
    width = np.clip(stop - f, 0, n)
    rounding = 2.0 ** -(UNIT + 1) * float(bins.positive.sum()) / bins.regions
    lower = float(np.sum(width * h)) / stop
    return _estimate_between(lower - rounding, lower + float(np.sum(width * bins.overlap)) / stop + rounding)


def _estimate_between(lower: float, upper: float) -> Estimate:
    return Estimate((lower + upper) / 2, (upper - lower) / 2)
