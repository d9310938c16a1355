"""The metrics in NumPy: oracle of the compiled module ``recontrast._metrics``, and what runs where it was not built.

Functions have the names, arguments and results of the compiled ones. A threshold t calls everything with a score of at
least t anomalous; equal scores share one threshold. From one threshold to the next lower one that a positive has, only
negatives are added: the ROC and the overlap curve run level there, precision and F1 fall. So the distinct scores of the
positives are all the thresholds that are needed, and one sort of the negatives tells how many of them lie above each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Rates = tuple[float, float, float, float, float, list[float]]  # AUROC, AP, F1-max, its threshold, accuracy there, AUPRO
THRESHOLDS = 200  # per image, of the reference's compute_pro
# Why an image has no per-image AUPRO; 0: it has one.
GOOD_IMAGE, CONSTANT_MAP, NO_GOOD_PIXEL, FEW_THRESHOLDS, NOT_FINITE, TOO_WIDE = range(1, 7)


def regions(masks: Array) -> tuple[Array, Array]:
    """Labels of (N, H, W), numbered from 1 by their first pixel, and the number of regions of each image."""
    from scipy import ndimage  # imported only where it is needed: it takes a while

    eight = np.zeros((3, 3, 3), bool)
    eight[1] = True  # neighbours lie in the same image
    labels, _ = ndimage.label(masks, eight)  # in the order of the first pixels
    last = np.maximum.accumulate(labels.max(axis=(1, 2), initial=0)) if len(labels) else np.zeros(0, int)
    return labels, np.diff(last, prepend=0)


def rates(scores: Array, labels: Array) -> Rates | None:
    """Metrics of (M,) scores; None where one is not finite or a class is absent."""
    return _rates(scores, labels, None, [])


def pixels(maps: Array, masks: Array, limits: Sequence[float]) -> Rates | None:
    """The same over all pixels of (N, H, W), and the data set's AUPRO at each of the limits."""
    return _rates(maps, masks, compute_overlap_weights(regions(masks)[0][masks]), limits)


def per_image(maps: Array, masks: Array, limit: float) -> tuple[Array, Array]:
    """The reference's AUPRO of each image of (N, H, W), and why it is NaN."""
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
    """False positive rate and mean overlap of (N, H, W), corner after corner; None where `pixels` is None."""
    if not np.isfinite(maps).all() or masks.all() or not masks.any():
        return None
    sweep = _sweep(maps, masks, compute_overlap_weights(regions(masks)[0][masks]))
    x, y = _overlap_curve(sweep)
    return x / sweep.negatives, y


def compute_thresholds(scores: Array, positive: Array) -> tuple[Array, int]:
    """Thresholds of the reference for one image, or why there are none.

    They are ``np.arange(low, high, step)`` as NumPy 2 forms it of scalars: step and number in the dtype of the map, the
    values in float64.
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
    """The reference's area of one image, or why it is NaN; a pixel is found above a threshold.

    Args:
        called: (T + 1,) good pixels by the number of thresholds that lie below them.
        passed: (P,) that number for each positive pixel.
        weight: (P,) what it adds to the mean overlap.
        limit: thresholds whose false positive rate is below it count.
    """
    fpr = np.cumsum(called[::-1])[-2::-1] / called.sum()  # at threshold i, what passed more than i of them
    found = np.cumsum(np.bincount(passed, weight, called.size)[::-1])[-2::-1]
    kept = fpr < limit
    if kept.sum() < 2 or fpr[kept].max() == 0:
        return float("nan"), FEW_THRESHOLDS
    return _area(fpr[kept][::-1] / fpr[kept].max(), found[kept][::-1]), 0


def compute_overlap_weights(label: Array) -> Array:
    """What each positive pixel adds to the mean overlap: 1 / (its region's area * number of regions)."""
    _, label, area = np.unique(label, return_inverse=True, return_counts=True)
    return 1 / (area[label] * area.size)


@dataclass(frozen=True)
class _Sweep:
    """Counts at the K distinct scores of the positives, from high to low."""

    threshold: Array  # (K,)
    tp: Array  # (K,) positives at or above it
    fp: Array  # (K,) negatives at or above it
    above: Array  # (K,) negatives above it
    overlap: Array  # (K,) weight of the positives at or above it
    negatives: int


def _rates(scores: Array, positive: Array, weight: Array | None, limits: Sequence[float]) -> Rates | None:
    if not np.isfinite(scores).all() or positive.all() or not positive.any():
        return None
    sweep = _sweep(scores, positive, weight)
    positives = int(sweep.tp[-1])
    gain = np.diff(sweep.tp, prepend=0)
    below_twice = 2 * sweep.negatives - sweep.above - sweep.fp  # a tie counts one half
    auroc = int(np.sum(gain * below_twice)) / (2 * positives * sweep.negatives)
    ap = float(np.sum(gain * (sweep.tp / (sweep.tp + sweep.fp)))) / positives
    f1 = 2 * sweep.tp / (sweep.tp + sweep.fp + positives)
    best = int(np.argmax(f1))
    accuracy = int(sweep.tp[best] + sweep.negatives - sweep.fp[best]) / scores.size
    aupro = [_aupro(sweep, limit) for limit in limits]
    return auroc, ap, float(f1[best]), float(sweep.threshold[best]), accuracy, aupro


def _sweep(scores: Array, positive: Array, weight: Array | None = None) -> _Sweep:
    """Sort scores once; ``weight`` holds one number per positive."""
    found = scores[positive]
    order = np.argsort(found)[::-1]
    found = found[order]
    last = np.flatnonzero(np.append(found[1:] != found[:-1], True))  # of each run of equal scores
    threshold = found[last]
    rest = np.sort(scores[~positive])
    return _Sweep(
        threshold=threshold,
        tp=last + 1,
        fp=rest.size - np.searchsorted(rest, threshold, side="left"),
        above=rest.size - np.searchsorted(rest, threshold, side="right"),
        overlap=np.zeros(0) if weight is None else np.cumsum(weight[order])[last],
        negatives=rest.size,
    )


def _aupro(sweep: _Sweep, limit: float) -> float:
    x, y = _overlap_curve(sweep)
    stop = limit * sweep.negatives
    k = int(np.searchsorted(x, stop, side="right"))
    if k < x.size:
        y_stop = y[k - 1] + (y[k] - y[k - 1]) * (stop - x[k - 1]) / (x[k] - x[k - 1])
        x, y = np.append(x[:k], stop), np.append(y[:k], y_stop)
    return _area(x, y) / stop


def _overlap_curve(sweep: _Sweep) -> tuple[Array, Array]:
    """Good pixels found and mean overlap: level to ``above``, straight to (``fp``, ``overlap``), level at the end."""
    x = np.concatenate([[0], np.stack([sweep.above, sweep.fp], 1).ravel(), [sweep.negatives]])
    return x, np.concatenate([[0.0, 0.0], np.repeat(sweep.overlap, 2)])


def _area(x: Array, y: Array) -> float:
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]))) / 2
