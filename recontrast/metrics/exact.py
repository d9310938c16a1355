"""Metrics of detection and localisation: AUROC, AP, F1-max and AUPRO, exact from one sort, or streaming with a bound.

Scores and maps may be NumPy arrays (memory maps too) or torch tensors on any device, of any batch shape; labels and
masks are bool, 0/1 or 0/255 and of the same shape. A threshold t calls everything with a score of at least t anomalous;
equal scores share one threshold. float32 and float64 are compared as they are; counts are whole numbers, sums float64.
`Streaming` gives the pixel metrics in constant memory.

``recontrast._metrics`` (csrc/metrics/) computes them on all cores; without it, `recontrast.metrics.reference` computes
the same in NumPy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from recontrast.metrics import inputs, reference
from recontrast.metrics.inputs import regions
from recontrast.metrics.streaming import Estimate, StreamedMetrics, Streaming

__all__ = [
    "REGIONS_BACKEND",
    "Estimate",
    "ImageMetrics",
    "PixelMetrics",
    "StreamedMetrics",
    "Streaming",
    "accuracy",
    "ap",
    "aupro",
    "auroc",
    "f1_max",
    "image_metrics",
    "pixel_metrics",
    "regions",
]

REGIONS_BACKEND = "native" if inputs.native else "scipy"
"""What computes the metrics and finds regions: "native" (csrc/) or, where it was not built, "scipy" and NumPy."""


@dataclass(frozen=True)
class ImageMetrics:
    """Metrics over images, in [0, 1]; sources: those of `auroc`, `ap`, `f1_max`, `accuracy` (scikit-learn, upstream).

    Attributes:
        auroc: area under the ROC curve.
        ap: average precision.
        f1_max: largest F1 over all thresholds.
        f1_threshold: the score from which calling an image anomalous gives ``f1_max``, the highest such.
        accuracy: share of images that it calls rightly.
    """

    auroc: float
    ap: float
    f1_max: float
    f1_threshold: float
    accuracy: float


@dataclass(frozen=True)
class PixelMetrics:
    """Metrics over all pixels of the images, in [0, 1]; sources as of `ImageMetrics`, and Bergmann et al. of `aupro`.

    Attributes:
        auroc: area under the ROC curve.
        ap: average precision.
        f1_max: largest F1 over all thresholds.
        f1_threshold: the value of a map from which calling a pixel anomalous gives ``f1_max``, the highest such.
        aupro: of the data set, at the first limit.
        aupro_per_image: the reference's, at the first limit; NaN where an image leaves it undefined.
        aupro_at: AUPRO of the data set by limit, of each that was asked for.
    """

    auroc: float
    ap: float
    f1_max: float
    f1_threshold: float
    aupro: float
    aupro_per_image: float
    aupro_at: dict[float, float] = field(default_factory=dict)


def auroc(scores: Any, labels: Any) -> float:
    """Area under the ROC curve by the trapezoid rule, in [0, 1]: scikit-learn's ``roc_auc_score``.

    Args:
        scores: as in `image_metrics`.
        labels: as in `image_metrics`.

    Returns:
        AUROC; a tie of a positive and a negative counts one half.

    Raises:
        ValueError: as `image_metrics`.
    """
    return image_metrics(scores, labels).auroc


def ap(scores: Any, labels: Any) -> float:
    """Average precision, the sum of precision times gain of recall: scikit-learn's ``average_precision_score``.

    Args:
        scores: as in `image_metrics`.
        labels: as in `image_metrics`.

    Returns:
        AP, in [0, 1].

    Raises:
        ValueError: as `image_metrics`.
    """
    return image_metrics(scores, labels).ap


def f1_max(scores: Any, labels: Any) -> float:
    """Largest F1 over all thresholds (score >= t); `image_metrics` and `pixel_metrics` return the threshold too.

    It is the largest value of scikit-learn's ``precision_recall_curve``, and what Dinomaly's tables call F1-max
    (``f1_score_max``, utils.py).

    Args:
        scores: as in `image_metrics`.
        labels: as in `image_metrics`.

    Returns:
        F1, in [0, 1].

    Raises:
        ValueError: as `image_metrics`.
    """
    return image_metrics(scores, labels).f1_max


def accuracy(scores: Any, labels: Any) -> float:
    """Share of what is called rightly at the threshold of F1-max, chosen on these very scores.

    As the paper's tables of medical images have it (``return_best_thr`` and ``evaluation_noseg``, utils.py); where
    several thresholds reach F1-max, ours is the highest.

    Args:
        scores: as in `image_metrics`.
        labels: as in `image_metrics`.

    Returns:
        Share of all scores, in [0, 1].

    Raises:
        ValueError: as `image_metrics`.
    """
    return image_metrics(scores, labels).accuracy


def image_metrics(scores: Any, labels: Any) -> ImageMetrics:
    """AUROC, AP, F1-max with the highest threshold that reaches it, and the accuracy there, from one sort.

    Sources: those of `auroc`, `ap`, `f1_max` and `accuracy`, scikit-learn and upstream's utils.py.

    Args:
        scores: finite real numbers of any shape and dtype, higher is more anomalous.
        labels: the shape of ``scores``, 1 anomalous, 0 good: bool, 0/1 or 0/255.

    Returns:
        All of them, floats in [0, 1] but for the threshold, which is one of the scores.

    Raises:
        ValueError: values that are not finite, shapes that differ, labels or masks that are not bool, 0/1 or 0/255 or
            hold one class alone.
    """
    values, positive = (x.ravel() for x in inputs.check_scores_and_labels(scores, labels))
    found = inputs.get_kernels().rates(values, positive)
    if found is None:
        inputs.check_metrics_defined(values, positive)
    return ImageMetrics(*found[:5])


@overload
def aupro(maps: Any, masks: Any, limit: float = 0.3, mode: str = "dataset", *, labels: Any = None) -> float: ...
@overload
def aupro(
    maps: Any, masks: Any, limit: Sequence[float], mode: str = "dataset", *, labels: Any = None
) -> list[float]: ...
def aupro(
    maps: Any, masks: Any, limit: float | Sequence[float] = 0.3, mode: str = "dataset", *, labels: Any = None
) -> float | list[float]:
    """Area under the per-region-overlap curve up to a false positive rate, in [0, 1]; the modes are not comparable.

    ``"dataset"`` (Bergmann et al., IJCV 2021, https://doi.org/10.1007/s11263-020-01400-4): overlap is the mean, over
    all 8-connected regions of all masks, of the part of a region that is found; the false positive rate is over all
    good pixels, those of good images too. Area from (0, 0) to ``limit``, interpolated there, over ``limit``.

    ``"per-image"`` is what the ReContrast repository reports (``compute_pro`` as called by ``evaluation``, utils.py;
    here for comparison with its tables): each image with a region alone, 200 thresholds spread evenly over the range
    of its own map, those with a false positive rate below ``limit``, the rate divided by its own maximum among them;
    the mean of these areas. Thresholds are what NumPy's ``arange`` makes of the map's range.

    Args:
        maps: (..., H, W) anomaly maps, finite.
        masks: the shape of ``maps``.
        limit: false positive rate in (0, 1], or several: all from one sort.
        mode: "dataset" or "per-image".
        labels: one for each image, 1 anomalous; given, an image whose mask says otherwise is refused.

    Returns:
        One area, or, for a sequence of limits, a list of them.

    Raises:
        ValueError: values that are not finite, shapes that differ, labels or masks that are not bool, 0/1 or 0/255 or
            hold one class alone, a limit outside of (0, 1], another mode; with "per-image", an image whose map or mask
            leaves its area undefined.
    """
    if mode not in ("dataset", "per-image"):
        raise ValueError(f'mode: wanted "dataset" or "per-image", got {mode!r}')
    limits = inputs.check_limits(limit)
    scores, positive = inputs.check_maps_and_masks(maps, masks, labels)
    if mode == "per-image":
        inputs.check_metrics_defined(scores, positive, "maps", "masks")
        areas = [_per_image(scores, positive, x) for x in limits]
    else:
        areas = _pixels(scores, positive, limits)[5]
    return areas[0] if np.ndim(limit) == 0 else areas


def pixel_metrics(maps: Any, masks: Any, limit: float | Sequence[float] = 0.3, *, labels: Any = None) -> PixelMetrics:
    """All metrics over pixels from one sort; sources as of `PixelMetrics` (Bergmann et al., scikit-learn, upstream).

    Args:
        maps: (..., H, W) anomaly maps, finite.
        masks: the shape of ``maps``.
        limit: false positive rate at which both AUPROs end, in (0, 1]; of several, ``aupro`` and ``aupro_per_image``
            end at the first, and ``aupro_at`` has AUPRO at each.
        labels: one for each image, 1 anomalous; given, an image whose mask says otherwise is refused.

    Returns:
        All of them, floats.

    Raises:
        ValueError: values that are not finite, shapes that differ, labels or masks that are not bool, 0/1 or 0/255 or
            hold one class alone, or a limit outside of (0, 1].
    """
    limits = inputs.check_limits(limit)
    scores, positive = inputs.check_maps_and_masks(maps, masks, labels)
    found = _pixels(scores, positive, limits)
    try:
        per_image = _per_image(scores, positive, limits[0])
    except ValueError:  # one image leaves it undefined: no reason to lose the other metrics
        per_image = float("nan")
    auroc, ap, f1, threshold, _, areas = found
    return PixelMetrics(auroc, ap, f1, threshold, areas[0], per_image, dict(zip(limits, areas, strict=True)))


def _pixels(scores: NDArray[Any], positive: NDArray[Any], limits: list[float]) -> Any:
    found = inputs.get_kernels().pixels(scores, positive, limits)
    if found is None:
        inputs.check_metrics_defined(scores, positive, "maps", "masks")
    return found


def _per_image(scores: NDArray[Any], positive: NDArray[Any], limit: float) -> float:
    """Mean over the images that have a region."""
    areas, reasons = inputs.get_kernels().per_image(scores, positive, limit)
    for n in np.flatnonzero(reasons > reference.GOOD_IMAGE):
        why = {
            reference.CONSTANT_MAP: "has a constant map",
            reference.NO_GOOD_PIXEL: "has no good pixel",
            reference.FEW_THRESHOLDS: f"has no two thresholds with false positive rates from 0 to {limit}",
            reference.TOO_WIDE: f"has a range of values beyond {scores.dtype}",
        }[int(reasons[n])]
        raise ValueError(f"maps: per-image AUPRO is undefined, because image {n} (counted from 0) {why}")
    return float(np.mean(areas[reasons != reference.GOOD_IMAGE]))
