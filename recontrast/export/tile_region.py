"""Regions of interest of tiles in a graph: their masks are an input, since each tile lies elsewhere in the image."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from recontrast.anomaly_map import AnomalyMap
from recontrast.inside import build_pooling_matrix
from recontrast.ops import void_unless_finite

LOWEST = -65504.0  # below every value of a map; float16 and the files of torch.export can hold it


class TileRegion(nn.Module):
    """What maps and scores of tiles need of their masks, as `AnomalyMap.weigh_inside` and `score_inside` compute it.

    It consists of matrix products and comparisons, which every runtime has, with lengths that are known beforehand.

    Args:
        amap: Function that computes the maps.
        how: "max", "mean" or a share of the pixels, see `AnomalyMap.score`.
    """

    fewest: Tensor

    def __init__(self, amap: AnomalyMap, how: Literal["max", "mean"] | float) -> None:
        super().__init__()
        self.how, self.levels = how, len(amap.sizes)
        height, width = amap.out
        for level, ((h, w), rows, cols) in enumerate(zip(amap.sizes, *amap.matrices(), strict=True)):
            for name, matrix in (
                ("rows", rows), ("cols", cols), ("down", build_pooling_matrix(height, h)),
                ("across", build_pooling_matrix(width, w)), ("total", rows.sum(1)[:, None] * cols.sum(1)),
            ):  # fmt: skip
                self.register_buffer(f"{name}{level}", matrix, persistent=False)
        if not isinstance(how, str):  # the smallest number of pixels inside with which the n-th largest value counts
            wanted = (torch.arange(height * width + 1).double() * how).floor()
            ranks = torch.arange(1, max(math.floor(height * width * how), 1) + 1)
            fewest = torch.searchsorted(wanted, ranks.double())
            fewest[0] = 0
            self.register_buffer("fewest", fewest.float(), persistent=False)

    def weigh(self, inside: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Do the same as `AnomalyMap.weigh_inside`.

        Args:
            inside: Masks (N, H, W), bool.

        Returns:
            points: For each level, whether each point is inside, (N, h, w), bool.
            factors: For each level, what renormalises the weights of each pixel, (N, H, W), float32; 0 outside.
        """
        points, factors, pixels = [], [], inside.float()
        for level in range(self.levels):
            rows, cols, down, across = (getattr(self, f"{name}{level}") for name in ("rows", "cols", "down", "across"))
            mask = (down @ pixels @ across.mT) > 0  # of the pixels of its cell, one is inside
            weights = rows @ mask.float() @ cols.mT
            factors.append(torch.where(inside, getattr(self, f"total{level}") / weights.clamp_min(1e-12), 0.0))
            points.append(mask)
        return points, factors

    def score(self, maps: Tensor, inside: Tensor) -> Tensor:
        """Compute the scores of tiles from their pixels inside.

        Args:
            maps: Maps (N, H, W), float32, 0 outside.
            inside: Masks (N, H, W), bool.

        Returns:
            Scores (N,), float32; NaN where a map is not finite, 0 without pixels inside.
        """
        counts = inside.float().flatten(1).sum(1)  # exact: fewer than 2**24
        values = torch.where(inside, maps, LOWEST).flatten(1)
        if self.how == "max":
            scores = values.amax(1)
        elif self.how == "mean":
            scores = maps.flatten(1).sum(1) / counts.clamp_min(1.0)
        else:
            taken = counts[:, None] >= self.fewest
            largest = values.topk(len(self.fewest), sorted=True).values
            scores = torch.where(taken, largest, 0.0).sum(1) / taken.float().sum(1)
        return void_unless_finite(torch.where(counts > 0, scores, 0.0), maps)
