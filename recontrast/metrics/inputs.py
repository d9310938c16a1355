"""Validation and conversion of the metrics' inputs, and the choice between the compiled kernels and NumPy.

Scores and maps are NumPy arrays (memory maps included) or torch tensors on any device, of any batch shape. Labels and
masks have the same shape and are bool, 0/1 or 0/255.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from recontrast.lazy_import import LazyModule
from recontrast.metrics import reference

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

native: Any
try:
    native = import_module("recontrast._metrics")
except ImportError:  # not compiled: NumPy gives the same numbers more slowly
    native = None

Array = NDArray[Any]


def get_kernels() -> Any:
    """Return the compiled module, or `recontrast.metrics.reference`, which has the same functions."""
    return native or reference


def as_array(x: Any) -> Array:
    """Convert to NumPy, without a copy if possible; bfloat16 becomes float32."""
    if "torch" in sys.modules and isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return np.asarray(x)


def make_plain(array: Array) -> Array:
    """Copy an array unless it is C-contiguous and aligned, as the compiled kernels read it.

    A memory map of a file with a header can be unaligned. An axis of length 1 can have a negative step, which PyTorch
    refuses although NumPy calls such an array contiguous.
    """
    plain = np.require(np.ascontiguousarray(array), requirements=["C_CONTIGUOUS", "ALIGNED"])
    return plain.copy() if min(plain.strides, default=0) < 0 else plain


def as_bool(labels: Any, name: str) -> Array:
    """Convert bool, 0/1 or 0/255 to bool.

    Raises:
        ValueError: If there are other values.
    """
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
    """Convert scores to floats in the byte order of the machine.

    Args:
        scores: Real numbers, of any shape.
        name: Name of the argument in the error message.

    Returns:
        The scores in the same shape: float32 from float16 and float32, float64 from all other types.

    Raises:
        ValueError: If the dtype is not a real number.
    """
    values = as_array(scores)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{name}: wanted real numbers, got dtype {values.dtype}")
    is_single = values.dtype.kind == "f" and values.dtype.itemsize <= 4
    return values.astype(np.float32 if is_single else np.float64, copy=False)


def check_scores_and_labels(scores: Any, labels: Any) -> tuple[Array, Array]:
    """Convert scores and labels to C-contiguous float and bool arrays of the same shape.

    Raises:
        ValueError: If the values are invalid or the shapes differ.
    """
    values, positive = as_scores(scores, "scores"), as_bool(labels, "labels")
    if values.shape != positive.shape:
        raise ValueError(f"labels: wanted the shape of scores, {values.shape}, got {positive.shape}")
    return make_plain(values), make_plain(positive)


def check_maps_and_masks(maps: Any, masks: Any, labels: Any = None) -> tuple[Array, Array]:
    """Convert maps and masks to C-contiguous arrays (N, H, W) with N >= 1.

    Args:
        maps: Anomaly maps (..., H, W).
        masks: Masks in the shape of ``maps``.
        labels: Label of each image, 1 anomalous, compared with the masks. None skips the comparison.

    Raises:
        ValueError: If the values are invalid, the shapes differ, or a label contradicts its mask.
    """
    scores = as_scores(maps, "maps")
    positive = check_masks(scores.shape, masks, labels)
    return make_plain(stack_images(scores)), positive


def check_masks(shape: Sequence[int], masks: Any, labels: Any = None) -> Array:
    """Convert the masks of maps of ``shape`` to a C-contiguous bool array (N, H, W) with at least one pixel.

    Raises:
        ValueError: If the values are invalid, the shapes differ, or a label contradicts its mask.
    """
    positive = as_bool(masks, "masks")
    if tuple(shape) != positive.shape:
        raise ValueError(f"masks: wanted the shape of maps, {tuple(shape)}, got {positive.shape}")
    if len(shape) < 2:
        raise ValueError(f"maps: wanted (..., H, W), got shape {tuple(shape)}")
    if positive.size == 0:
        raise ValueError(f"maps: wanted at least one pixel of one image, got shape {tuple(shape)}")
    positive = make_plain(stack_images(positive))
    if labels is not None:
        check_labels_match_masks(positive, as_bool(labels, "labels"))
    return positive


def stack_images(array: Array) -> Array:
    """Reshape (..., H, W) to (N, H, W)."""
    return array.reshape(prod(array.shape[:-2]), *array.shape[-2:])


def check_labels_match_masks(masks: Array, labels: Array) -> None:
    """Check that exactly the images labelled anomalous have positive pixels.

    Raises:
        ValueError: If a label contradicts its mask.
    """
    if labels.size != len(masks):
        raise ValueError(f"labels: wanted one for each of {len(masks)} images, got shape {labels.shape}")
    labels, has_positive = labels.ravel(), masks.any(axis=(1, 2))
    if (contradictions := np.flatnonzero(labels != has_positive)).size:
        n = int(contradictions[0])
        label, got = ("anomalous", "an empty mask") if labels[n] else ("good", f"{masks[n].sum()} positive pixels")
        raise ValueError(f"masks: image {n} (counted from 0), which labels call {label}, has {got}")


def check_metrics_defined(
    values: Array, positive: Array, values_name: str = "scores", labels_name: str = "labels"
) -> None:
    """Check that all scores are finite and both classes occur.

    Raises:
        ValueError: If a score is not finite or a class is missing.
    """
    finite, nan = np.isfinite(values).sum(), np.isnan(values).sum()
    if finite < values.size:
        infinite = values.size - finite - nan
        raise ValueError(
            f"{values_name}: wanted finite numbers, got {nan} NaN and {infinite} infinite of {values.size}"
        )
    count = np.count_nonzero(positive)
    if count in (0, positive.size):
        got = f"{count} positive and {positive.size - count} negative"
        raise ValueError(f"{labels_name}: wanted at least one positive and one negative, got {got}")


def check_limits(limit: float | Sequence[float]) -> list[float]:
    """Convert one or more false positive rates to a list.

    Raises:
        ValueError: If there are none, or one is not in (0, 1].
    """
    limits = [float(x) for x in np.atleast_1d(np.asarray(limit, float))]
    if not limits:
        raise ValueError("limit: wanted at least one false positive rate, got none")
    for x in limits:
        if not 0 < x <= 1:
            raise ValueError(f"limit: wanted a false positive rate in (0, 1], got {x:g}")
    return limits


def regions(masks: Any) -> tuple[NDArray[np.int32], int]:
    """Label the 8-connected regions of each mask.

    The numbers 1, 2, ... follow the first pixel of each region, image after image, as in SciPy's ``label``. Upstream's
    ``compute_pro`` uses scikit-image's ``label``.

    Args:
        masks: Masks (..., H, W), bool, 0/1 or 0/255.

    Returns:
        Labels (..., H, W), int32, 0 outside of all regions, and the number of regions.

    Raises:
        ValueError: If the masks have other values or fewer than two axes.
    """
    positive = as_bool(masks, "masks")
    if positive.ndim < 2:
        raise ValueError(f"masks: wanted (..., H, W), got shape {positive.shape}")
    labels, counts = get_kernels().regions(make_plain(stack_images(positive)))
    return labels.reshape(positive.shape), int(np.sum(counts))
