"""Exact metrics of anomaly detection and localisation: AUROC, AP, F1-max, accuracy and AUPRO, from one sort.

Scores and maps are NumPy arrays (memory maps included) or torch tensors on any device, of any batch shape. Labels and
masks have the same shape and are bool, 0/1 or 0/255. A sample is called anomalous at threshold t if its score is at
least t, so that equal scores share one threshold. float32 and float64 scores are compared without conversion. Counts
are integers, sums are float64. `Streaming` computes the pixel metrics in constant memory.

``recontrast._metrics`` (csrc/metrics/) uses all cores. Without it, `recontrast.metrics.reference` computes the same
metrics in NumPy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from recontrast.metrics import inputs, reference
from recontrast.metrics.inside import check_inside, pack_pixels

REGIONS_BACKEND = "native" if inputs.native else "scipy"
"""Implementation of metrics and regions: "native" (csrc/), or "scipy" (with NumPy) if that is not compiled."""


@dataclass(frozen=True)
class ImageMetrics:
    """Metrics over images, in [0, 1]; sources: see `auroc`, `ap`, `f1_max`, `accuracy` (scikit-learn, upstream).

    Attributes:
        auroc: Area under the ROC curve.
        ap: Average precision.
        f1_max: Largest F1 over all thresholds.
        f1_threshold: Highest threshold at which F1 is ``f1_max``, in units of the scores.
        accuracy: Accuracy at that threshold.
    """

    auroc: float
    ap: float
    f1_max: float
    f1_threshold: float
    accuracy: float


@dataclass(frozen=True)
class PixelMetrics:
    """Metrics over all pixels, in [0, 1]; sources: see `ImageMetrics`, and Bergmann et al. for AUPRO.

    Attributes:
        auroc: Area under the ROC curve.
        ap: Average precision.
        f1_max: Largest F1 over all thresholds.
        f1_threshold: Highest threshold at which F1 is ``f1_max``, in units of the maps.
        aupro: AUPRO of the data set, at the first limit.
        aupro_per_image: Per-image AUPRO of the ReContrast repository, at the first limit. NaN if an image leaves it
            undefined.
        aupro_at: Limit -> AUPRO of the data set, for every requested limit.
    """

    auroc: float
    ap: float
    f1_max: float
    f1_threshold: float
    aupro: float
    aupro_per_image: float
    aupro_at: dict[float, float] = field(default_factory=dict)


def auroc(scores: Any, labels: Any) -> float:
    """Compute the area under the ROC curve by the trapezoid rule, as scikit-learn's ``roc_auc_score``.

    Args:
        scores: Finite real numbers of any shape and dtype. Higher is more anomalous.
        labels: Labels in the shape of ``scores``, 1 anomalous, 0 good: bool, 0/1 or 0/255.

    Returns:
        AUROC in [0, 1]. A positive and a negative with equal scores count one half.

    Raises:
        ValueError: If a score is not finite, the shapes differ, the labels have other values, or a class is missing.
    """
    return image_metrics(scores, labels).auroc


def ap(scores: Any, labels: Any) -> float:
    """Compute average precision: the precision at each threshold, weighted by the increase in recall.

    Same as scikit-learn's ``average_precision_score``.

    Args:
        scores: Finite real numbers of any shape and dtype. Higher is more anomalous.
        labels: Labels in the shape of ``scores``, 1 anomalous, 0 good: bool, 0/1 or 0/255.

    Returns:
        AP in [0, 1].

    Raises:
        ValueError: If a score is not finite, the shapes differ, the labels have other values, or a class is missing.
    """
    return image_metrics(scores, labels).ap


def f1_max(scores: Any, labels: Any) -> float:
    """Compute the largest F1 over all thresholds; `image_metrics` and `pixel_metrics` return the threshold too.

    It is the largest F1 on scikit-learn's ``precision_recall_curve``, and F1-max in the tables of Dinomaly
    (``f1_score_max``, utils.py).

    Args:
        scores: Finite real numbers of any shape and dtype. Higher is more anomalous.
        labels: Labels in the shape of ``scores``, 1 anomalous, 0 good: bool, 0/1 or 0/255.

    Returns:
        F1 in [0, 1].

    Raises:
        ValueError: If a score is not finite, the shapes differ, the labels have other values, or a class is missing.
    """
    return image_metrics(scores, labels).f1_max


def accuracy(scores: Any, labels: Any) -> float:
    """Compute the accuracy at the threshold of F1-max, which is selected on the same scores.

    The paper's tables of medical images use it (upstream's ``return_best_thr`` and ``evaluation_noseg``, utils.py). If
    several thresholds reach F1-max, this function uses the highest.

    Args:
        scores: Finite real numbers of any shape and dtype. Higher is more anomalous.
        labels: Labels in the shape of ``scores``, 1 anomalous, 0 good: bool, 0/1 or 0/255.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: If a score is not finite, the shapes differ, the labels have other values, or a class is missing.
    """
    return image_metrics(scores, labels).accuracy


def image_metrics(scores: Any, labels: Any) -> ImageMetrics:
    """Compute AUROC, AP, F1-max with its highest threshold, and the accuracy at that threshold, from one sort.

    Sources: see `auroc`, `ap`, `f1_max` and `accuracy` (scikit-learn and upstream's utils.py).

    Args:
        scores: Finite real numbers of any shape and dtype. Higher is more anomalous.
        labels: Labels in the shape of ``scores``, 1 anomalous, 0 good: bool, 0/1 or 0/255.

    Returns:
        Metrics in [0, 1] and the threshold, which is one of the scores.

    Raises:
        ValueError: If a score is not finite, the shapes differ, the labels have other values, or a class is missing.
    """
    values, positive = (x.ravel() for x in inputs.check_scores_and_labels(scores, labels))
    rates = inputs.get_kernels().rates(values, positive)
    if rates is None:
        inputs.check_metrics_defined(values, positive)
    return ImageMetrics(*rates[:5])


@overload
def aupro(maps: Any, masks: Any, limit: float = 0.3, mode: str = "dataset", *, labels: Any = None) -> float: ...
@overload
def aupro(
    maps: Any, masks: Any, limit: Sequence[float], mode: str = "dataset", *, labels: Any = None
) -> list[float]: ...
def aupro(
    maps: Any, masks: Any, limit: float | Sequence[float] = 0.3, mode: str = "dataset", *, labels: Any = None
) -> float | list[float]:
    """Compute the area under the per-region-overlap curve up to a false positive rate; the two modes differ.

    ``"dataset"`` (Bergmann et al., IJCV 2021, https://doi.org/10.1007/s11263-020-01400-4): the overlap is the mean,
    over all 8-connected regions of all masks, of the share of a region's pixels at or above the threshold. The false
    positive rate counts all good pixels, including those of good images. The area from (0, 0) to ``limit``, with
    interpolation, is divided by ``limit``.

    ``"per-image"`` is the value that the ReContrast repository reports (``compute_pro`` as called by ``evaluation``,
    utils.py), for comparison with its tables. It is the mean over all images with a region. Each image has 200 evenly
    spaced thresholds over the range of its own map, those with a false positive rate below ``limit`` are used, and the
    rate is divided by its maximum among them. The thresholds equal those of NumPy's ``arange``.

    Args:
        maps: Finite anomaly maps (..., H, W).
        masks: Masks in the shape of ``maps``: bool, 0/1 or 0/255.
        limit: False positive rate in (0, 1], or several, which share one sort.
        mode: "dataset" or "per-image".
        labels: Label of each image, 1 anomalous, compared with the masks. None skips the comparison.

    Returns:
        AUPRO in [0, 1], or a list if ``limit`` is a sequence.

    Raises:
        ValueError: If a value is not finite, the shapes differ, labels or masks have other values, contradict each
            other or lack a class, the limit is not in (0, 1], or the mode is unknown. With "per-image" also if the map
            or the mask of an image leaves its area undefined.
    """
    if mode not in ("dataset", "per-image"):
        raise ValueError(f'mode: wanted "dataset" or "per-image", got {mode!r}')
    limits = inputs.check_limits(limit)
    scores, positive = inputs.check_maps_and_masks(maps, masks, labels)
    if mode == "per-image":
        inputs.check_metrics_defined(scores, positive, "maps", "masks")
        areas = [_compute_per_image_aupro(scores, positive, x) for x in limits]
    else:
        areas = _compute_rates(scores, positive, limits)[5]
    return areas[0] if np.ndim(limit) == 0 else areas


def pixel_metrics(
    maps: Any, masks: Any, limit: float | Sequence[float] = 0.3, *, labels: Any = None, inside: Any = None
) -> PixelMetrics:
    """Compute all metrics over pixels from one sort (sources: scikit-learn, upstream, and Bergmann et al. for AUPRO).

    Args:
        maps: Finite anomaly maps (..., H, W).
        masks: Masks in the shape of ``maps``: bool, 0/1 or 0/255.
        limit: False positive rate in (0, 1] at which both AUPROs end. With several, ``aupro`` and ``aupro_per_image``
            use the first, and ``aupro_at`` holds the AUPRO at each.
        labels: Label of each image, 1 anomalous, compared with the masks. None skips the comparison.
        inside: Region of interest in the shape of ``maps``, or (H, W) for all images: bool, 0/1 or 0/255. Pixels
            outside count for nothing; a region of a mask is what of it is inside. None: all pixels count.

    Returns:
        Metrics as floats.

    Raises:
        ValueError: If a value is not finite, the shapes differ, labels or masks have other values, contradict each
            other or lack a class, or the limit is not in (0, 1].
    """
    limits = inputs.check_limits(limit)
    scores, positive = inputs.check_maps_and_masks(maps, masks, labels)
    mask = None if inside is None else check_inside(scores.shape, inside)
    whole = (scores, positive) if mask is None else pack_pixels(scores, positive, mask)
    auroc, ap, f1, threshold, _, areas = _compute_rates(*whole, limits)
    try:
        per_image = _compute_per_image_aupro(scores, positive, limits[0], mask)
    except ValueError:  # a single image can leave it undefined; the other metrics are still valid
        per_image = float("nan")
    return PixelMetrics(auroc, ap, f1, threshold, areas[0], per_image, dict(zip(limits, areas, strict=True)))


def f1_at(maps: Any, masks: Any, threshold: float, *, inside: Any = None) -> float:
    """Compute F1 of all pixels at a given threshold: SegF1 of MVTec AD 2 (Heckler-Kram et al., 2025).

    The threshold is chosen elsewhere, such as on good images; `pixel_metrics` gives the largest F1 of all thresholds.

    Args:
        maps: Anomaly maps (..., H, W); pixels at or above the threshold are called anomalous.
        masks: Masks in the shape of ``maps``: bool, 0/1 or 0/255.
        threshold: Threshold, in units of the maps.
        inside: Region of interest in the shape of ``maps``, or (H, W) for all images. None: all pixels count.

    Returns:
        F1 in [0, 1]; 0 if no anomalous pixel is called so.

    Raises:
        ValueError: If the shapes differ, the masks have other values or no positive pixel, or a number is not finite.
    """
    counts = count_pixels_at(maps, masks, threshold, inside=inside)
    if not counts[1] + counts[2]:
        raise ValueError("masks: wanted at least one positive, got none")
    return f1_of_counts(counts)


def count_pixels_at(maps: Any, masks: Any, threshold: float, *, inside: Any = None) -> NDArray[np.int64]:
    """Count the pixels from which `f1_at` follows (Heckler-Kram et al.); the counts of batches add up.

    Args:
        maps: Anomaly maps (..., H, W).
        masks: Masks in the shape of ``maps``.
        threshold: Threshold, in units of the maps.
        inside: Region of interest, as in `f1_at`.

    Returns:
        (3,) int64: false positives, true positives and false negatives.

    Raises:
        ValueError: If the shapes differ, the masks have other values, or a number is not finite.
    """
    scores, positive = inputs.check_maps_and_masks(maps, masks)
    if not np.isfinite(threshold) or not np.isfinite(scores).all():
        raise ValueError(f"maps: wanted finite numbers and a finite threshold, got others (threshold {threshold})")
    called = scores >= threshold
    if inside is not None:
        mask = check_inside(scores.shape, inside)
        called, positive = called & mask, positive & mask
    found = int(np.count_nonzero(called & positive))
    return np.array([np.count_nonzero(called) - found, found, np.count_nonzero(positive) - found], np.int64)


def f1_of_counts(counts: Any) -> float:
    """Compute F1, twice the true positives over all called and all anomalous pixels (scikit-learn's ``f1_score``).

    Args:
        counts: (3,) false positives, true positives and false negatives, see `count_pixels_at`.

    Returns:
        F1 in [0, 1]; 0 without true positives.
    """
    wrong, found, missed = (int(count) for count in counts)
    return 2 * found / (2 * found + wrong + missed) if found else 0.0


def _compute_rates(scores: NDArray[Any], positive: NDArray[Any], limits: list[float]) -> Any:
    rates = inputs.get_kernels().pixels(scores, positive, limits)
    if rates is None:
        inputs.check_metrics_defined(scores, positive, "maps", "masks")
    return rates


def _compute_per_image_aupro(
    scores: NDArray[Any], positive: NDArray[Any], limit: float, inside: NDArray[Any] | None = None
) -> float:
    """Average the per-image AUPRO over the images that have a region."""
    compute = inputs.get_kernels().per_image
    if inside is None:
        areas, reasons = compute(scores, positive, limit)
    else:
        images = np.flatnonzero((positive & inside).any(axis=(1, 2)))
        areas, reasons = np.full(len(scores), np.nan), np.full(len(scores), reference.GOOD_IMAGE, np.uint8)
        for image in images.tolist():
            one = slice(image, image + 1)
            areas[one], reasons[one] = compute(*pack_pixels(scores[one], positive[one], inside[one]), limit)
    for n in np.flatnonzero(reasons > reference.GOOD_IMAGE):
        reason = {
            reference.CONSTANT_MAP: "has a constant map",
            reference.NO_GOOD_PIXEL: "has no good pixel",
            reference.FEW_THRESHOLDS: f"has no two thresholds with false positive rates from 0 to {limit}",
            reference.TOO_WIDE: f"has a range of values beyond {scores.dtype}",
        }[int(reasons[n])]
        raise ValueError(f"maps: per-image AUPRO is undefined, because image {n} (counted from 0) {reason}")
    return float(np.mean(areas[reasons != reference.GOOD_IMAGE]))
