"""NumPy implementation of the metrics: the oracle of ``recontrast._metrics``, and its fallback if not compiled.

The public functions have the names, arguments and results of the compiled ones. A sample is called anomalous at
threshold t if its score is at least t, so that equal scores share one threshold. Between two
successive scores of positives, only negatives are added, so that the ROC and the overlap curve are flat, and precision
and F1 decrease. The distinct scores of the positives are therefore the only thresholds needed, and one sort of the
negatives gives the number of negatives above each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Rates = tuple[float, float, float, float, float, list[float]]  # AUROC, AP, F1-max, its threshold, accuracy there, AUPRO
THRESHOLDS = 200  # per image, as in upstream's compute_pro
# Reasons why the per-image AUPRO of an image is undefined. 0: it is defined.
GOOD_IMAGE, CONSTANT_MAP, NO_GOOD_PIXEL, FEW_THRESHOLDS, NOT_FINITE, TOO_WIDE = range(1, 7)


def regions(masks: Array) -> tuple[Array, Array]:
    """Label the regions of (N, H, W) from 1 in the order of their first pixels, and count those of each image."""
    from scipy import ndimage  # imported here because the import is slow

    structure = np.zeros((3, 3, 3), bool)
    structure[1] = True  # the 8 neighbours in the same image
    labels, _ = ndimage.label(masks, structure)  # in the order of the first pixels
    last = np.maximum.accumulate(labels.max(axis=(1, 2), initial=0)) if len(labels) else np.zeros(0, int)
    return labels, np.diff(last, prepend=0)


def rates(scores: Array, labels: Array) -> Rates | None:
    """Compute the metrics of scores (M,) with labels (M,), bool.

    Returns:
        See `Rates`, with an empty list of AUPRO; None if a score is not finite, or all labels are equal.
    """
    return _compute_rates(scores, labels, None, [])


def pixels(maps: Array, masks: Array, limits: Sequence[float]) -> Rates | None:
    """Compute the metrics of all pixels of (N, H, W), and the AUPRO of the data set at each limit."""
    return _compute_rates(maps, masks, compute_overlap_weights(regions(masks)[0][masks]), limits)


def per_image(maps: Array, masks: Array, limit: float) -> tuple[Array, Array]:
    """Compute the per-image AUPRO of each image of (N, H, W), and the reason if it is NaN."""
    areas, reasons = np.full(len(maps), np.nan), np.zeros(len(maps), np.uint8)
    labels = regions(masks)[0]
    for n, (scores, positive) in enumerate(zip(maps, masks, strict=True)):
        thresholds, reasons[n] = compute_thresholds(scores, positive)
        if reasons[n] == 0:
            good = np.searchsorted(thresholds, scores[~positive], side="left")
            passed = np.searchsorted(thresholds, scores[positive], side="left")
            called = np.bincount(good, minlength=thresholds.size + 1)
            areas[n], reasons[n] = compute_image_area(
                called, passed, compute_overlap_weights(labels[n][positive]), limit
            )
    return areas, reasons


def compute_overlap_curve(maps: Array, masks: Array) -> tuple[Array, Array] | None:
    """Compute false positive rate and mean overlap of (N, H, W) at each corner; None where `pixels` returns None."""
    if not np.isfinite(maps).all() or masks.all() or not masks.any():
        return None
    sweep = _build_sweep(maps, masks, compute_overlap_weights(regions(masks)[0][masks]))
    x, y = _compute_curve(sweep)
    return x / sweep.negatives, y


def compute_thresholds(scores: Array, positive: Array) -> tuple[Array, int]:
    """Compute the thresholds of upstream's ``compute_pro`` for one image, or the reason why there are none.

    They equal ``np.arange(low, high, step)`` of NumPy 2 for scalars of the map's dtype: step and count are computed in
    that dtype, the values in float64.
    """
    if not positive.any():
        return np.zeros(0), GOOD_IMAGE
    low, high = scores.min(), scores.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        return np.zeros(0), NOT_FINITE
    with np.errstate(over="ignore", under="ignore"):
        step = (high - low) / THRESHOLDS
    if not np.isfinite(step):
        return np.zeros(0), TOO_WIDE
    if step == 0:
        return np.zeros(0), CONSTANT_MAP
    count, delta = int(np.ceil((high - low) / step)), float(low + step) - float(low)
    return float(low) + np.arange(count) * delta, NO_GOOD_PIXEL if positive.all() else 0


def compute_image_area(called: Array, passed: Array, weight: Array, limit: float) -> tuple[float, int]:
    """Compute the per-image AUPRO of one image, or the reason if it is NaN; pixels above a threshold are anomalous.

    Args:
        called: (T + 1,) number of good pixels above exactly 0, 1, ..., T thresholds.
        passed: (P,) number of thresholds below each positive pixel.
        weight: (P,) contribution of each positive pixel to the mean overlap.
        limit: False positive rate below which thresholds are used.
    """
    fpr = np.cumsum(called[::-1])[-2::-1] / called.sum()  # at threshold i: above more than i thresholds
    overlap = np.cumsum(np.bincount(passed, weight, called.size)[::-1])[-2::-1]
    used = fpr < limit
    if used.sum() < 2 or fpr[used].max() == 0:
        return float("nan"), FEW_THRESHOLDS
    return _compute_area(fpr[used][::-1] / fpr[used].max(), overlap[used][::-1]), 0


def compute_overlap_weights(label: Array) -> Array:
    """Compute the contribution of each positive pixel to the mean overlap: 1 / (area of its region * regions)."""
    _, label, area = np.unique(label, return_inverse=True, return_counts=True)
    return 1 / (area[label] * area.size)


@dataclass(frozen=True)
class Sweep:
    """Counts at the K distinct scores of the positives, from high to low."""

    threshold: Array  # (K,)
    tp: Array  # (K,) positives at or above it
    fp: Array  # (K,) negatives at or above it
    above: Array  # (K,) negatives above it
    overlap: Array  # (K,) weight of the positives at or above it
    negatives: int


def _compute_rates(scores: Array, positive: Array, weight: Array | None, limits: Sequence[float]) -> Rates | None:
    if not np.isfinite(scores).all() or positive.all() or not positive.any():
        return None
    sweep = _build_sweep(scores, positive, weight)
    positives = int(sweep.tp[-1])
    gain = np.diff(sweep.tp, prepend=0)
    below_twice = 2 * sweep.negatives - sweep.above - sweep.fp  # a tie counts one half
    auroc = int(np.sum(gain * below_twice)) / (2 * positives * sweep.negatives)
    ap = float(np.sum(gain * (sweep.tp / (sweep.tp + sweep.fp)))) / positives
    f1 = 2 * sweep.tp / (sweep.tp + sweep.fp + positives)
    best = int(np.argmax(f1))
    accuracy = int(sweep.tp[best] + sweep.negatives - sweep.fp[best]) / scores.size
    aupro = [compute_aupro(sweep, limit) for limit in limits]
    return auroc, ap, float(f1[best]), float(sweep.threshold[best]), accuracy, aupro


def _build_sweep(scores: Array, positive: Array, weight: Array | None = None) -> Sweep:
    """Sort the scores and count; ``weight`` holds the contribution of each positive to the mean overlap."""
    positives = scores[positive]
    order = np.argsort(positives)[::-1]
    positives = positives[order]
    last = np.flatnonzero(np.append(positives[1:] != positives[:-1], True))  # end of each run of equal scores
    threshold = positives[last]
    negatives = np.sort(scores[~positive])
    return Sweep(
        threshold=threshold,
        tp=last + 1,
        fp=negatives.size - np.searchsorted(negatives, threshold, side="left"),
        above=negatives.size - np.searchsorted(negatives, threshold, side="right"),
        overlap=np.zeros(0) if weight is None else np.cumsum(weight[order])[last],
        negatives=negatives.size,
    )


def compute_aupro(sweep: Sweep, limit: float) -> float:
    """Compute the area under the overlap curve up to the false positive rate ``limit``, divided by it."""
    x, y = _compute_curve(sweep)
    stop = limit * sweep.negatives
    k = int(np.searchsorted(x, stop, side="right"))
    if k < x.size:
        y_stop = y[k - 1] + (y[k] - y[k - 1]) * (stop - x[k - 1]) / (x[k] - x[k - 1])
        x, y = np.append(x[:k], stop), np.append(y[:k], y_stop)
    return _compute_area(x, y) / stop


def _compute_curve(sweep: Sweep) -> tuple[Array, Array]:
    """Return good pixels and mean overlap at each corner of the curve: flat up to ``above``, linear up to ``fp``."""
    x = np.concatenate([[0], np.stack([sweep.above, sweep.fp], 1).ravel(), [sweep.negatives]])
    return x, np.concatenate([[0.0, 0.0], np.repeat(sweep.overlap, 2)])


def _compute_area(x: Array, y: Array) -> float:
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]))) / 2
