"""Points and pixels inside a region of interest."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from recontrast.device_limits import pool_adaptively, to_float64


def pool_inside(inside: Tensor, size: Sequence[int]) -> Tensor:
    """Find the points of a feature map that are inside: those with a pixel of the region in their cell.

    The cells of h x w points divide the image evenly; where pixels do not divide evenly, neighbouring cells share one.
    A region with a pixel therefore has a point on every level, and each of its pixels is near one.

    Args:
        inside: Whether each pixel is inside, (N, H, W), bool.
        size: Height and width of the feature map, in points.

    Returns:
        Whether each point is inside, (N, h, w), bool.
    """
    if not inside.shape[0]:
        return inside.new_zeros(0, *size)
    return pool_adaptively(F.adaptive_max_pool2d, inside.float(), (size[0], size[1])).bool()


def build_pooling_matrix(length: int, size: int) -> Tensor:
    """Build the matrix of the cells of `pool_inside` along one axis.

    Args:
        length: Length of the axis, in pixels.
        size: Number of points along it.

    Returns:
        Matrix (size, length), float32: 1 where a pixel is in the cell of a point, else 0.
    """
    points, pixels = torch.arange(size)[:, None], torch.arange(length)
    first, end = points * length // size, ((points + 1) * length + size - 1) // size
    return ((pixels >= first) & (pixels < end)).float()


def score_inside(maps: Tensor, inside: Tensor, how: str | float) -> Tensor:
    """Reduce the pixels inside to an image score, as `recontrast.AnomalyMap.score` reduces all.

    Args:
        maps: Anomaly maps (N, H, W), floating point.
        inside: Whether each pixel is inside, (N, H, W) or (1, H, W), bool.
        how: "max", "mean", or a share in (0, 1]: the mean of this share of the pixels inside with the largest values,
            rounded down but at least one.

    Returns:
        Scores (N,), in the dtype of ``maps``: NaN if a value inside is NaN or infinite, 0 without pixels inside.
    """
    inside = inside.expand(maps.shape)
    counts = inside.flatten(1).sum(1)
    if how == "max":
        scores = torch.where(inside, maps, -torch.inf).amax(dim=(1, 2)) if maps.numel() else maps.new_zeros(len(maps))
    elif how == "mean":
        scores = torch.where(inside, maps, 0).sum(dim=(1, 2)) / counts.clamp_min(1)
    else:
        values = torch.where(inside, maps, -torch.inf).flatten(1)
        wanted = (to_float64(counts) * float(how)).floor().clamp_min(1).long().to(counts.device)
        largest = values.topk(int(wanted.max()), sorted=True).values if len(values) else values
        taken = torch.arange(largest.shape[1], device=maps.device) < wanted[:, None]
        scores = torch.where(taken, largest, 0).sum(1) / wanted.to(maps.dtype)
    is_finite = (torch.isfinite(maps) | ~inside).flatten(1).all(dim=1)
    return torch.where(is_finite, torch.where(counts > 0, scores, 0), torch.nan)
