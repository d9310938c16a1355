"""Pixel metrics of binned scores, each with a proven bound of the error that binning makes.

From the highest bin down, let bin b hold p positives and n good pixels, and let T, F be the positives and good pixels
of all bins above it; P and N are those of all bins, H is the overlap that all bins above b sum up to, h that of b. Bins
are intervals, so that only the order inside a bin is unknown. Every metric then lies between two values, of which the
middle is returned, and half their distance as the bound:

- *AUROC*: of the P N pairs of a positive and a good pixel those in different bins are known; the p n pairs inside a bin
  count between 0 and 1 each (a tie counts 1/2). So it lies within ``sum p n / (2 P N)`` of the value with 1/2 for each.
- *AP* is the mean over positives of the precision at their threshold. At a threshold inside b at most T + p positives
  and at least F good pixels are found: the precision is at most ``(T + p) / (T + p + F)``. At the threshold of the j-th
  positive of b at least T + j positives and at most G = F + n good pixels are: it is at least
  (T + j) / (T + j + G) = 1 - G / (c + j) with c = T + G. As 1 / x is convex, 1 / (c + j) is at most its mean from
  c + j - 1/2 to c + j + 1/2, and the positives of b bring at least ``p - G ln(1 + p / (c + 1/2))`` together.
- *F1-max*: F1 at the lower edge of each bin is known, so that the largest of these is reached. At a threshold inside b
  F1 is 2 tp / (tp + fp + P) with tp <= T + p and fp >= F: at most ``2 (T + p) / (T + p + F + P)``.
- *AUPRO*: the overlap never falls along the curve. While the good pixels of b are passed it lies between H and H + h,
  and ``min(n, limit N - F)`` of them are left of the limit. Where the overlap of R regions is counted in whole units of
  2^-40 of a region, rounding moves the share of a pixel by at most 2^-41, and the mean overlap by at most
  ``2^-41 P / R``, which the bound includes.

Sums are in float64, and what they round (about 1e-13) is not in the bound.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
UNIT = 40  # a region is 2 ** UNIT in the histogram of overlaps


class Estimate(NamedTuple):
    """The metric of the very scores that were binned lies within ``bound`` of ``value`` (`recontrast.metrics.bounds`).

    Attributes:
        value: the middle of what the bins allow, in [0, 1].
        bound: half the distance of its ends.
    """

    value: float
    bound: float


@dataclass(frozen=True)
class Bins:
    """Counts of B bins from the highest scores down, and what lies above each."""

    good: Array  # (B,) n
    positive: Array  # (B,) p
    overlap: Array  # (B,) h, mean over regions
    regions: int

    @property
    def above(self) -> tuple[Array, Array, Array]:
        """T, F and H of each bin."""
        t, f, h = (np.cumsum(x) - x for x in (self.positive, self.good, self.overlap))
        return t, f, h


def select_bins(counts: Array, regions: int) -> tuple[Bins, Array]:
    """Of (3, bins) counts, upwards: those bins that hold something, downwards, and their numbers."""
    used = np.flatnonzero(counts[0] + counts[1])[::-1]
    good, positive, share = counts[:, used]
    return Bins(good, positive, share / (2.0**UNIT * max(regions, 1)), regions), used


def auroc(bins: Bins) -> Estimate:
    """Area under the ROC curve."""
    n, p = bins.good.astype(float), bins.positive.astype(float)
    pairs, (_, above, _) = float(p.sum() * n.sum()), bins.above
    inside = float(np.sum(p * n)) / pairs
    lower = float(np.sum(p * (n.sum() - above - n))) / pairs
    return _between(lower, lower + inside)


def ap(bins: Bins) -> Estimate:
    """Average precision."""
    n, p, (t, f, _) = bins.good, bins.positive, bins.above
    g, hit = f + n, p > 0
    lower = np.sum(p - g * np.log1p(p / (t + g + 0.5)))
    upper = np.sum((p * (t + p))[hit] / (t + p + f)[hit])
    return _between(*(float(x) / float(p.sum()) for x in (lower, upper)))


def f1_max(bins: Bins) -> tuple[Estimate, int]:
    """Largest F1, and the first bin at whose lower edge the lower end of the estimate is reached."""
    n, p, (t, f, _) = bins.good, bins.positive, bins.above
    reached = 2 * (t + p) / (t + p + f + n + p.sum())
    best = int(np.argmax(reached))
    upper = np.max(2 * (t + p) / (t + p + f + p.sum()))
    return _between(float(reached[best]), float(upper)), best


def aupro(bins: Bins, limit: float) -> Estimate:
    """Area under the per-region-overlap curve up to a false positive rate, over that rate."""
    n, (_, f, h) = bins.good, bins.above
    stop = limit * float(n.sum())
    width = np.clip(stop - f, 0, n)
    rounding = 2.0 ** -(UNIT + 1) * float(bins.positive.sum()) / bins.regions
    lower = float(np.sum(width * h)) / stop
    return _between(lower - rounding, lower + float(np.sum(width * bins.overlap)) / stop + rounding)


def _between(lower: float, upper: float) -> Estimate:
    return Estimate((lower + upper) / 2, (upper - lower) / 2)
