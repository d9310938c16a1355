"""What the metrics take, checked and as NumPy, and what computes them: the compiled module, or the oracle without it.

Scores and maps may be NumPy arrays (memory maps too) or torch tensors on any device, of any batch shape; labels and
masks are bool, 0/1 or 0/255 and of the same shape.
"""

from collections.abc import Sequence
from importlib import import_module
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from recontrast.metrics import reference

native: Any
try:
    native = import_module("recontrast._metrics")
except ImportError:  # not compiled: slower, the same numbers
    native = None

Array = NDArray[Any]


def get_kernels() -> Any:
    """The compiled module, or the oracle, whose functions have the same names, arguments and results."""
    return native or reference


def as_array(x: Any) -> Array:
    """As NumPy, without a copy where there is no need."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return np.asarray(x)


def as_bool(labels: Any, name: str) -> Array:
    """Bool, 0/1 or 0/255 as bool."""
    array = as_array(labels)
    if array.dtype == bool:
        return array
    if array.dtype == np.uint8 and array.size and array.max() == 1:  # the usual case, without a copy
        return array.view(bool)
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{name}: wanted bool, 0/1 or 0/255, got dtype {array.dtype}")
    zero = array == 0
    if not ((zero | (array == 1)).all() or (zero | (array == 255)).all()):
        raise ValueError(f"{name}: wanted bool, 0/1 or 0/255, got others among {np.unique(array[~zero])[:9]}")
    return ~zero


def as_scores(scores: Any, name: str) -> Array:
    """Real numbers as float32 or float64 of this machine: float32 and float64 as they are, float16 as float32."""
    values = as_array(scores)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name}: wanted real numbers, got dtype {values.dtype}")
    single = values.dtype.kind == "f" and values.dtype.itemsize <= 4
    return values.astype(np.float32 if single else np.float64, copy=False)


def check_scores_and_labels(scores: Any, labels: Any, s: str = "scores", y: str = "labels") -> tuple[Array, Array]:
    """Scores and bool labels of one shape, C-contiguous; ``s`` and ``y`` name them in errors."""
    values, positive = as_scores(scores, s), as_bool(labels, y)
    if values.shape != positive.shape:
        raise ValueError(f"{y}: wanted the shape of {s}, {values.shape}, got {positive.shape}")
    return np.ascontiguousarray(values), np.ascontiguousarray(positive)


def check_maps_and_masks(maps: Any, masks: Any, labels: Any = None) -> tuple[Array, Array]:
    """Maps and masks, (N, H, W) with N >= 1; ``labels`` say which images are anomalous, None asks for no agreement."""
    scores = as_scores(maps, "maps")
    positive = check_masks(scores.shape, masks, labels)
    return np.ascontiguousarray(stack_images(scores)), positive


def check_masks(shape: Sequence[int], masks: Any, labels: Any = None) -> Array:
    """Masks for maps of a shape, C-contiguous (N, H, W) with at least one pixel."""
    positive = as_bool(masks, "masks")
    if tuple(shape) != positive.shape:
        raise ValueError(f"masks: wanted the shape of maps, {tuple(shape)}, got {positive.shape}")
    if len(shape) < 2:
        raise ValueError(f"maps: wanted (..., H, W), got shape {tuple(shape)}")
    if positive.size == 0:
        raise ValueError(f"maps: wanted at least one pixel of one image, got shape {tuple(shape)}")
    positive = np.ascontiguousarray(stack_images(positive))
    if labels is not None:
        check_labels_match_masks(positive, as_bool(labels, "labels"))
    return positive


def stack_images(array: Array) -> Array:
    """(..., H, W) as (N, H, W)."""
    return array.reshape(prod(array.shape[:-2]), *array.shape[-2:])


def check_labels_match_masks(masks: Array, labels: Array) -> None:
    """Refuse an anomalous image without a positive pixel and a good one that has any."""
    if labels.size != len(masks):
        raise ValueError(f"labels: wanted one for each of {len(masks)} images, got shape {labels.shape}")
    labels, some = labels.ravel(), masks.any(axis=(1, 2))
    if (wrong := np.flatnonzero(labels != some)).size:
        n = int(wrong[0])
        called, got = ("anomalous", "an empty mask") if labels[n] else ("good", f"{masks[n].sum()} positive pixels")
        raise ValueError(f"masks: image {n} (counted from 0), which labels call {called}, has {got}")


def check_metrics_defined(values: Array, positive: Array, s: str = "scores", y: str = "labels") -> None:
    """Refuse scores that are not finite, and labels without both classes."""
    finite, nan = np.isfinite(values).sum(), np.isnan(values).sum()
    if finite < values.size:
        infinite = values.size - finite - nan
        raise ValueError(f"{s}: wanted finite numbers, got {nan} NaN and {infinite} infinite of {values.size}")
    count = np.count_nonzero(positive)
    if count in (0, positive.size):
        got = f"{count} positive and {positive.size - count} negative"
        raise ValueError(f"{y}: wanted at least one positive and one negative, got {got}")


def check_limits(limit: float | Sequence[float]) -> list[float]:
    """False positive rates in (0, 1], one or several."""
    limits = [float(x) for x in np.atleast_1d(np.asarray(limit, float))]
    if not limits:
        raise ValueError("limit: wanted at least one false positive rate, got none")
    for x in limits:
        if not 0 < x <= 1:
            raise ValueError(f"limit: wanted a false positive rate in (0, 1], got {x:g}")
    return limits


def regions(masks: Any) -> tuple[NDArray[np.int32], int]:
    """8-connected regions of each mask, numbered 1, 2, ... by their first pixel, image after image.

    What upstream's ``compute_pro`` takes of scikit-image's ``label``; the numbers are those of SciPy's.

    Args:
        masks: (..., H, W), bool, 0/1 or 0/255.

    Returns:
        Labels (..., H, W), int32, 0 where there is no region, and the number of regions.

    Raises:
        ValueError: masks of other values or of fewer than two axes.
    """
    positive = as_bool(masks, "masks")
    if positive.ndim < 2:
        raise ValueError(f"masks: wanted (..., H, W), got shape {positive.shape}")
    labels, counts = get_kernels().regions(stack_images(np.ascontiguousarray(positive)))
    return labels.reshape(positive.shape), int(np.sum(counts))
