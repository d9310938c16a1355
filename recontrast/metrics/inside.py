"""Pixels inside a region of interest, arranged so that the metrics of whole maps apply to them.

All pixel metrics depend on the scores of good pixels and of the pixels of each region of a mask, and not on where they
are. The pixels inside are therefore written into one row, in which the pixels of a region follow each other and a good
pixel separates two regions: a map of height 1 with the same metrics.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.metrics import inputs

Array = NDArray[Any]


def check_inside(shape: tuple[int, ...], inside: Any) -> Array:
    """Convert a region of interest to a bool array (N, H, W).

    Args:
        shape: Shape (N, H, W) of the maps.
        inside: Mask (N, H, W), or (1, H, W) or (H, W) for all images: bool, 0/1 or 0/255.

    Returns:
        The mask, (N, H, W) bool, which may be a view.

    Raises:
        ValueError: If the shape or the values differ.
    """
    mask = inputs.as_bool(inside, "inside")
    if mask.shape not in (shape, (1, *shape[1:]), shape[1:]):
        raise ValueError(f"inside: wanted {shape}, (1, {shape[1]}, {shape[2]}) or {shape[1:]}, got {mask.shape}")
    return np.broadcast_to(mask, shape)


def pack_pixels(scores: Array, positive: Array, inside: Array) -> tuple[Array, Array]:
    """Arrange the pixels inside in one row.

    Regions are the 8-connected ones of the pixels of the mask that are inside.

    Args:
        scores: Maps (N, H, W).
        positive: Masks of the defects (N, H, W), bool.
        inside: Region of interest (N, H, W), bool.

    Returns:
        Scores and masks of the M pixels inside, (1, 1, M) each.

    Raises:
        ValueError: If there are fewer good pixels than it takes to separate the regions, or no pixel is inside.
    """
    labels, _ = inputs.regions(positive & inside)
    labels, values = labels[inside], scores[inside]
    if not values.size:
        raise ValueError("inside: wanted at least one pixel inside, got none")
    defective = np.flatnonzero(labels)
    order = defective[np.argsort(labels[defective], kind="stable")]
    good = np.flatnonzero(labels == 0)
    _, region = np.unique(labels[order], return_inverse=True)
    if order.size and good.size < region[-1]:
        raise ValueError(
            f"masks: wanted at least {region[-1]} good pixels inside, which separate {region[-1] + 1} regions, got "
            f"{good.size}"
        )
    places = np.arange(order.size) + region  # a good pixel after each region
    is_positive = np.zeros(values.size, bool)
    is_positive[places] = True
    row = np.empty_like(values)
    row[places], row[~is_positive] = values[order], values[good]
    return row[None, None], is_positive[None, None]
