"""Calibration by groups of images, such as several photographs of each part.

Images of one part are not exchangeable with those of a new part: their scores are alike. Whole groups are. The score of
a group is the largest of its images, as conformal prediction allows for any function of exchangeable objects (Vovk et
al., "Algorithmic Learning in a Random World", 2005). So the promise holds for whole groups, and all the more for one
image of a new group.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def max_by_group(scores: Sequence[float], groups: Sequence[int] | None) -> list[float]:
    """Return the largest score of each group, in the order of their first images.

    Args:
        scores: Scores of n images.
        groups: Number of the group of each image, in any numbering; None: each image is a group of its own.

    Returns:
        One score for each group.
    """
    if groups is None:
        return list(scores)
    largest: dict[int, float] = {}
    for group, score in zip(groups, scores, strict=True):
        largest[group] = max(largest.get(group, -math.inf), score)
    return list(largest.values())


def select_first(groups: Sequence[int]) -> list[int]:
    """Return the position of the first image of each group, in ascending order."""
    first: dict[int, int] = {}
    for index, group in enumerate(groups):
        first.setdefault(group, index)
    return list(first.values())


class HighestPixels:
    """The highest map values of good images, as many as may be flagged and one more.

    The loss of an image is the share of its pixels that are flagged; that of a group is the mean over its images. With
    groups, a pixel therefore counts 1 / size of the group.

    Args:
        share: Share of the pixels that may be flagged, summed over groups.
        groups: Number of the group of each image; None: each image is a group of its own.
        count: Number of groups.

    Attributes:
        is_one_size: Whether all maps had one size; without it, there is no threshold.
    """

    def __init__(self, share: float, groups: Sequence[int] | None, count: int) -> None:
        self.share, self.count = share, count
        self.is_one_size = True
        self._shape: tuple[int, ...] | None = None
        self._values = np.empty(0, np.float32)
        self._images = 0
        self._weights: NDArray[np.float64] | None = None  # of each image
        self._kept = np.empty(0, np.float64)  # weights of the values
        if groups is not None:
            _, inverse, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
            self._weights = 1.0 / sizes[inverse]

    def add(self, maps: NDArray[np.floating]) -> None:
        """Add the maps of the next images, (n, H, W)."""
        start, self._images = self._images, self._images + len(maps)
        self._shape = self._shape or maps.shape[1:]
        self.is_one_size = self.is_one_size and maps.shape[1:] == self._shape
        if not self.is_one_size or not len(maps):
            return
        pixels = np.asarray(maps, np.float32).reshape(-1)
        values = np.concatenate([self._values, pixels])
        pixels_per_map = pixels.size // len(maps)
        if self._weights is not None:
            weights = np.repeat(self._weights[start : self._images], pixels_per_map)
            self._keep_weighted(values, np.concatenate([self._kept, weights]), pixels_per_map)
            return
        keep = math.floor(max(self.share, 0) * self.count * pixels_per_map + 1e-6) + 1
        self._values = np.partition(values, values.size - keep)[-keep:] if values.size > keep else values

    def _keep_weighted(self, values: NDArray[np.float32], weights: NDArray[np.float64], pixels_per_map: int) -> None:
        """Keep the highest values until their weight exceeds what may be flagged."""
        order = np.argsort(-values, kind="stable")
        total = np.cumsum(weights[order])
        last = int(np.searchsorted(total, max(self.share, 0) * self.count * pixels_per_map + 1e-6, "right"))
        order = order[: last + 1]
        self._values, self._kept = values[order], weights[order]

    def threshold(self) -> float | None:
        """Return the lowest threshold above which no more than the allowed share lies; None for maps of two sizes."""
        return float(self._values.min()) if self.is_one_size else None
