"""Metrics of detection and localisation: AUROC, AP, F1-max and AUPRO, exact, from one sort of the scores.

A threshold t calls everything with a score of at least t anomalous; equal scores share one threshold. From one
threshold to the next lower one that a positive has, only negatives are added: the ROC and the overlap curve run level
there, precision and F1 fall. So the distinct scores of the positives are all the thresholds that are needed, and one
sort of the negatives tells how many of them lie above each (`_sweep`).

Scores and maps may be NumPy arrays or torch tensors on any device, of any batch shape; labels and masks are bool, 0/1
or 0/255 and of the same shape. Sums are in float64, counts in integers; float32 scores are sorted as they are.
"""

from dataclasses import dataclass
from importlib import import_module
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

try:
    _native: Any = import_module("recontrast._metrics")
except ImportError:  # not compiled: slower, the same labels
    _native = None

REGIONS_BACKEND = "native" if _native else "scipy"
THRESHOLDS = 200  # per image, of the reference's compute_pro
Array = NDArray[Any]


@dataclass(frozen=True)
class ImageMetrics:
    """Metrics over images, in [0, 1], and the score from which calling an image anomalous gives ``f1_max``."""

    auroc: float
    ap: float
    f1_max: float
    f1_threshold: float


@dataclass(frozen=True)
class PixelMetrics:
    """Metrics over all pixels of the images; ``aupro_per_image`` is NaN where an image leaves it undefined."""

    auroc: float
    ap: float
    f1_max: float
    f1_threshold: float
    aupro: float
    aupro_per_image: float


def auroc(scores: Any, labels: Any) -> float:
    """Area under the ROC curve by the trapezoid rule, in [0, 1]: scikit-learn's ``roc_auc_score``.

    Arguments as for `image_metrics`.
    """
    return image_metrics(scores, labels).auroc


def ap(scores: Any, labels: Any) -> float:
    """Average precision, the sum of precision times gain of recall: scikit-learn's ``average_precision_score``.

    Arguments as for `image_metrics`.
    """
    return image_metrics(scores, labels).ap


def f1_max(scores: Any, labels: Any) -> float:
    """Largest F1 over all thresholds (score >= t); `image_metrics` and `pixel_metrics` return the threshold too.

    Arguments as for `image_metrics`.
    """
    return image_metrics(scores, labels).f1_max


def image_metrics(scores: Any, labels: Any) -> ImageMetrics:
    """AUROC, AP, F1-max and the highest threshold that reaches it, from one sort.

    Args:
        scores: finite numbers of any shape, higher is more anomalous.
        labels: the shape of ``scores``, 1 anomalous, 0 good.
    """
    return ImageMetrics(*_rates(_sweep(*_both(scores, labels))))


def aupro(maps: Any, masks: Any, limit: float = 0.3, mode: str = "dataset") -> float:
    """Area under the per-region-overlap curve up to a false positive rate, in [0, 1]; the modes are not comparable.

    ``"dataset"`` (Bergmann et al., IJCV 2021, https://doi.org/10.1007/s11263-020-01400-4): overlap is the mean, over
    all 8-connected regions of all masks, of the part of a region that is found; the false positive rate is over all
    good pixels, those of good images too. Area from (0, 0) to ``limit``, interpolated there, over ``limit``.

    ``"per-image"`` is what the ReContrast repository reports (``compute_pro`` as called by ``evaluation``, utils.py;
    here for comparison with its tables): each image with a region alone, 200 thresholds spread evenly over the range
    of its own map, those with a false positive rate below ``limit``, the rate divided by its own maximum among them;
    the mean of these areas. Thresholds are in the dtype of the map, as NumPy makes them there.

    Args:
        maps: (..., H, W) anomaly maps, finite.
        masks: the shape of ``maps``.
        limit: false positive rate in (0, 1].
        mode: "dataset" or "per-image".
    """
    if mode not in ("dataset", "per-image"):
        raise ValueError(f'mode: wanted "dataset" or "per-image", got {mode!r}')
    scores, positive, labels = _images(maps, masks, limit)
    if mode == "per-image":
        return _aupro_per_image(scores, positive, labels, limit)
    return _aupro(_sweep(scores, positive, _overlap(labels)), limit)


def pixel_metrics(maps: Any, masks: Any, limit: float = 0.3) -> PixelMetrics:
    """All metrics over pixels from one sort.

    Args:
        maps: (..., H, W) anomaly maps, finite.
        masks: the shape of ``maps``.
        limit: false positive rate at which both AUPROs end, in (0, 1].
    """
    scores, positive, labels = _images(maps, masks, limit)
    try:
        per_image = _aupro_per_image(scores, positive, labels, limit)
    except ValueError:  # one image leaves it undefined: no reason to lose the other metrics
        per_image = float("nan")
    sweep = _sweep(scores, positive, _overlap(labels))
    return PixelMetrics(*_rates(sweep), _aupro(sweep, limit), per_image)


def regions(masks: Any) -> tuple[NDArray[np.int32], int]:
    """8-connected regions of each mask, numbered 1, 2, ... by their first pixel, image after image.

    Args:
        masks: (..., H, W).

    Returns:
        Labels of the shape of ``masks``, 0 where there is no region, and the number of regions.
    """
    positive = _bool(masks, "masks")
    if positive.ndim < 2:
        raise ValueError(f"masks: wanted (..., H, W), got shape {positive.shape}")
    stack = np.ascontiguousarray(positive).reshape(prod(positive.shape[:-2]), *positive.shape[-2:])
    labels, counts = (_native.regions if _native else _regions_scipy)(stack)
    return labels.reshape(positive.shape), int(np.sum(counts))


def _regions_scipy(masks: Array) -> tuple[Array, int]:
    """Labels of (N, H, W) as the compiled routine numbers them, and how many."""
    from scipy import ndimage  # imported only where it is needed: it takes a while

    eight = np.zeros((3, 3, 3), bool)
    eight[1] = True  # neighbours lie in the same image
    return ndimage.label(masks, eight)  # in the order of the first pixels


@dataclass(frozen=True)
class _Sweep:
    """Counts at the K distinct scores of the positives, from high to low."""

    threshold: Array  # (K,)
    tp: Array  # (K,) positives at or above it
    fp: Array  # (K,) negatives at or above it
    above: Array  # (K,) negatives above it
    overlap: Array  # (K,) weight of the positives at or above it
    negatives: int


def _sweep(scores: Array, positive: Array, weight: Array | None = None) -> _Sweep:
    """Sort (M,) scores once; ``weight`` holds one number per positive."""
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


def _rates(sweep: _Sweep) -> tuple[float, float, float, float]:
    """AUROC, AP, F1-max and its threshold."""
    positives = int(sweep.tp[-1])
    gain = np.diff(sweep.tp, prepend=0)
    below_twice = 2 * sweep.negatives - sweep.above - sweep.fp  # a tie counts one half
    auroc = int(np.sum(gain * below_twice)) / (2 * positives * sweep.negatives)
    ap = float(np.sum(gain * (sweep.tp / (sweep.tp + sweep.fp)))) / positives
    f1 = 2 * sweep.tp / (sweep.tp + sweep.fp + positives)
    best = int(np.argmax(f1))
    return auroc, ap, float(f1[best]), float(sweep.threshold[best])


def _aupro(sweep: _Sweep, limit: float) -> float:
    """The curve runs level to ``above``, then straight to (``fp``, ``overlap``), and level at its end."""
    x = np.concatenate([[0], np.stack([sweep.above, sweep.fp], 1).ravel(), [sweep.negatives]])
    y = np.concatenate([[0.0, 0.0], np.repeat(sweep.overlap, 2)])
    stop = limit * sweep.negatives
    k = int(np.searchsorted(x, stop, side="right"))
    if k < x.size:
        y_stop = y[k - 1] + (y[k] - y[k - 1]) * (stop - x[k - 1]) / (x[k] - x[k - 1])
        x, y = np.append(x[:k], stop), np.append(y[:k], y_stop)
    return _area(x, y) / stop


def _aupro_per_image(scores: Array, positive: Array, labels: list[Array], limit: float) -> float:
    areas = []
    for n, label in zip(np.flatnonzero(positive.any(axis=(1, 2))), labels, strict=True):
        try:
            areas.append(_compute_pro(scores[n], positive[n], label, limit))
        except ValueError as why:
            raise ValueError(f"maps: per-image AUPRO is undefined, because image {n} (counted from 0) {why}") from None
    return float(np.mean(areas))


def _compute_pro(scores: Array, positive: Array, label: Array, limit: float) -> float:
    """Area of one image: (H, W) map and mask, and the region (P,) of each positive pixel."""
    low, high, good = scores.min(), scores.max(), np.sort(scores[~positive])
    step = (high - low) / THRESHOLDS
    if step == 0 or good.size == 0:
        raise ValueError("has no good pixel" if step else "has a constant map")
    thresholds = np.arange(low, high, step)
    fpr = (good.size - np.searchsorted(good, thresholds, side="right")) / good.size  # a pixel is found above t
    passed = np.searchsorted(thresholds, scores[positive], side="left")  # thresholds below each positive pixel
    found = np.bincount(passed, _overlap([label]), thresholds.size + 1)
    overlap = np.cumsum(found[::-1])[-2::-1]  # at threshold i, what passed more than i of them
    kept = fpr < limit
    if kept.sum() < 2 or fpr[kept].max() == 0:
        raise ValueError(f"has no two thresholds with false positive rates from 0 to {limit}")
    return _area(fpr[kept][::-1] / fpr[kept].max(), overlap[kept][::-1])


def _area(x: Array, y: Array) -> float:
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]))) / 2


def _overlap(labels: list[Array]) -> Array:
    """What each positive pixel adds to the mean overlap: 1 / (its region's area * number of regions)."""
    label = np.concatenate(labels)
    label = label - label.min()
    area = np.bincount(label)
    return 1 / (area[label] * area.size)


def _images(maps: Any, masks: Any, limit: float) -> tuple[Array, Array, list[Array]]:
    """Checked maps and masks, (N, H, W), and the regions of the positive pixels of each image that has any."""
    if not 0 < limit <= 1:
        raise ValueError(f"limit: wanted a false positive rate in (0, 1], got {limit}")
    scores, positive = _both(maps, masks, "maps", "masks")
    if scores.ndim < 2:
        raise ValueError(f"maps: wanted (..., H, W), got shape {scores.shape}")
    scores, positive = (x.reshape(-1, *scores.shape[-2:]) for x in (scores, positive))
    some = positive[positive.any(axis=(1, 2))]
    return scores, positive, [label[mask] for label, mask in zip(regions(some)[0], some, strict=True)]


def _both(scores: Any, labels: Any, s: str = "scores", y: str = "labels") -> tuple[Array, Array]:
    """Finite scores and bool labels of one shape, with both classes; ``s`` and ``y`` name them in errors."""
    values, positive = _array(scores), _bool(labels, y)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{s}: wanted real numbers, got dtype {values.dtype}")
    if values.dtype.kind != "f" or values.dtype.itemsize < 4:  # float16 sorts slowly
        values = values.astype(np.float32 if values.dtype.kind == "f" else np.float64)
    if values.shape != positive.shape:
        raise ValueError(f"{y}: wanted the shape of {s}, {values.shape}, got {positive.shape}")
    finite, nan = np.isfinite(values).sum(), np.isnan(values).sum()
    if finite < values.size:
        infinite = values.size - finite - nan
        raise ValueError(f"{s}: wanted finite numbers, got {nan} NaN and {infinite} infinite of {values.size}")
    count = np.count_nonzero(positive)
    if count in (0, positive.size):
        got = f"{count} positive and {positive.size - count} negative"
        raise ValueError(f"{y}: wanted at least one positive and one negative, got {got}")
    return values, positive


def _bool(labels: Any, name: str) -> Array:
    """Bool, 0/1 or 0/255 as bool."""
    array = _array(labels)
    if array.dtype == bool:
        return array
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name}: wanted bool, 0/1 or 0/255, got dtype {array.dtype}")
    zero = array == 0
    if not ((zero | (array == 1)).all() or (zero | (array == 255)).all()):
        raise ValueError(f"{name}: wanted bool, 0/1 or 0/255, got others among {np.unique(array[~zero])[:9]}")
    return ~zero


def _array(x: Any) -> Array:
    """As NumPy, without a copy where there is no need."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return np.asarray(x)
