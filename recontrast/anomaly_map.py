"""Anomaly maps and image scores from (teacher, student) pairs.

Upstream's ``utils.cal_anomaly_map`` upsamples the distances of each pair, adds them up and blurs the sum. Both steps
are linear and separable. Here, each level therefore has one matrix per axis, blur @ upsampling, computed once in
float64.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recontrast import ops
from recontrast.distances import point_distances
from recontrast.float32 import full_matrix_products
from recontrast.inside import pool_inside, score_inside

Size = int | tuple[int, int]
Score = Literal["max", "mean"] | float
SIGMA = 4.0  # pixels, in both protocols of upstream
TRUNCATE = 4.0  # default of scipy.ndimage.gaussian_filter; 4 sigma give 33 taps
ZERO5_RADIUS = 2  # upstream's GPU kernel has 5 taps for every sigma


def build_upsampling_matrix(out: int, size: int, align_corners: bool = True) -> Tensor:
    """Build the matrix of linear interpolation along one axis, as ``F.interpolate`` computes it.

    Args:
        out: Size of the map in pixels, at least 1.
        size: Size of the features, at least 1.
        align_corners: Whether the centres of the outer pixels are those of the outer points, as upstream. Otherwise
            the outer edges coincide.

    Returns:
        Matrix (out, size), float64.
    """
    pixels = torch.arange(out, dtype=torch.float64)
    if align_corners:
        position = pixels * ((size - 1) / (out - 1) if out > 1 else 0.0)
    else:
        position = ((pixels + 0.5) * (size / out) - 0.5).clamp_(0, size - 1)
    low = position.floor().clamp_max(max(size - 2, 0)).long()
    high = (low + 1).clamp_max(size - 1)
    share = (position - low).unsqueeze(1)
    identity = torch.eye(size, dtype=torch.float64)
    return (1 - share) * identity[low] + share * identity[high]


def build_blur_matrix(size: int, blur: str | None) -> Tensor:
    """Build the matrix of a Gaussian blur along one axis.

    Args:
        size: Size of the map in pixels, at least 1.
        blur: Kernel and border, see `AnomalyMap`.

    Returns:
        Matrix (size, size), float64.
    """
    if blur is None:
        return torch.eye(size, dtype=torch.float64)
    radius = int(TRUNCATE * SIGMA + 0.5) if blur == "reflect" else ZERO5_RADIUS
    offset = torch.arange(-radius, radius + 1)
    taps = torch.exp(-0.5 * (offset.double() / SIGMA) ** 2)
    taps /= taps.sum()
    source = torch.arange(size).unsqueeze(1) + offset  # (size, taps)
    if blur == "reflect":  # d c b a | a b c d | d c b a, repeated as the radius requires
        source = source.remainder(2 * size)
        source = torch.where(source < size, source, 2 * size - 1 - source)
    inside = (source >= 0) & (source < size)  # pixels outside count as zero
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, source.clamp(0, size - 1), taps * inside)


def _check_choice(argument: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"AnomalyMap: {argument}: wanted one of {allowed}, got {value!r}")


def _check_dtype(argument: str, values: Tensor) -> None:
    if values.dtype not in ops.DTYPES:
        raise ValueError(f"{argument}: wanted float16, bfloat16, float32 or float64, got {values.dtype}")


def _to_height_width(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


class _Region(NamedTuple):
    """A region of interest, and the part of the matrices that its bounding box needs."""

    source: Tensor  # (N, H, W) as it was passed
    is_whole: bool
    inside: Tensor  # in the bounding box
    points: list[Tensor]  # of each level
    whole_factors: list[Tensor]  # of each level
    factors: list[Tensor]  # of each level, in the bounding box
    rows: list[Tensor]
    cols: list[Tensor]
    margins: tuple[int, int, int, int]  # left, right, top, bottom


class AnomalyMap:
    """Compute anomaly maps at image size from (teacher, student) pairs, and image scores from maps.

    Guo et al. (https://arxiv.org/abs/2306.02602); upstream's utils.py: ``cal_anomaly_map`` with SciPy's
    ``gaussian_filter`` for one model per class, ``cal_anomaly_maps`` with ``get_gaussian_kernel`` for one model of all
    classes.

    Args:
        sizes: Height and width of the features of each level, fine to coarse. An int means a square.
        out: Size of the map in pixels.
        blur: "reflect" is a Gaussian of sigma 4 px with 33 taps and a mirrored border (upstream's single-class
            protocol). "zero5" has 5 taps, sigma 4 px, and zeros outside (upstream's unified protocol). None disables
            the blur.
        reduce: "sum" or "mean" over the pairs: values in [0, 2 x pairs] or [0, 2].
        method: "fused" is a single kernel. "matmul" uses two matrix products of PyTorch and is differentiable. "auto"
            uses "matmul" if a gradient is needed, otherwise "fused".
        align_corners: How distances are upsampled, see `build_upsampling_matrix`. Upstream aligns corners, the authors
            of PatchCore do not.
        through: Size in pixels to which distances are upsampled first; the result is then resized to ``out`` without
            aligned corners and without smoothing, and blurred (``evaluation_batch`` of Dinomaly). None: directly.

    Raises:
        ValueError: If an argument has a value not listed above.
    """

    def __init__(
        self,
        sizes: Sequence[Size],
        out: Size,
        blur: Literal["reflect", "zero5"] | None = "reflect",
        reduce: Literal["sum", "mean"] = "sum",
        method: Literal["auto", "fused", "matmul"] = "auto",
        align_corners: bool = True,
        through: Size | None = None,
    ):
        _check_choice("blur", blur, ("reflect", "zero5", None))
        _check_choice("reduce", reduce, ("sum", "mean"))
        _check_choice("method", method, ("auto", "fused", "matmul"))
        self.sizes = [_to_height_width(size) for size in sizes]
        self.out = _to_height_width(out)
        middle = self.out if through is None else _to_height_width(through)
        if not self.sizes or min(min(size) for size in [*self.sizes, self.out, middle]) < 1:
            raise ValueError(f"AnomalyMap: sizes and out: wanted at least 1 px, got {self.sizes} and {self.out}")
        self.blur, self.reduce, self.method = blur, reduce, method
        blur_y, blur_x = (build_blur_matrix(size, blur) for size in self.out)
        if through is not None:
            blur_y, blur_x = (
                blur @ build_upsampling_matrix(out, side, align_corners=False)
                for blur, out, side in zip((blur_y, blur_x), self.out, middle, strict=True)
            )
        rows = [build_upsampling_matrix(middle[0], h, align_corners) for h, _ in self.sizes]  # each (H, h)
        cols = [build_upsampling_matrix(middle[1], w, align_corners) for _, w in self.sizes]  # each (W, w)
        self._rows = [(blur_y @ matrix).float() for matrix in rows]
        self._cols = [(blur_x @ matrix).float() for matrix in cols]

        self._region: _Region | None = None  # the last one

    def __call__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Compute the anomaly maps of (teacher, student) pairs.

        Args:
            pairs: Features (N, C, h, w), floating point, group by group, each with one pair per level in the order of
                ``sizes``.

        Returns:
            Maps (N, H, W), float32.

        Raises:
            ValueError: If the pairs do not fit each other or ``sizes``.
        """
        return self.from_distances(point_distances(pairs))[0]

    def maps_and_scores(self, pairs: Sequence[tuple[Tensor, Tensor]], how: Score = "max") -> tuple[Tensor, Tensor]:
        """Compute anomaly maps and image scores.

        Args:
            pairs: Features (N, C, h, w), as in `__call__`.
            how: Reduction of a map to a score, as in `score`.

        Returns:
            Maps (N, H, W) and scores (N,), both float32.

        Raises:
            ValueError: If the pairs do not fit, or ``how`` is unknown.
        """
        maps, maximum = self.from_distances(point_distances(pairs))
        return maps, maximum if how == "max" else self.score(maps, how)

    def matrices(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the matrices (H, h) and (W, w) of each level, float32, which combine upsampling and blur."""
        return list(self._rows), list(self._cols)

    def score(self, maps: Tensor, how: Score = "max", inside: Tensor | None = None) -> Tensor:
        """Compute the image scores of maps. The score of a map that holds a NaN or an infinity is NaN.

        Args:
            maps: Anomaly maps (N, H, W), float16, bfloat16, float32 or float64.
            how: "max" (upstream's default), "mean" (upstream for ISIC 2018), or a fraction in (0, 1]: the mean of this
                share of the pixels with the largest values, rounded down but at least one (0.01 in upstream's unified
                protocol).
            inside: Whether each pixel counts, (N, H, W) or (1, H, W), bool. None: all do.

        Returns:
            Scores (N,), in the dtype of ``maps``.

        Raises:
            ValueError: If ``how`` is unknown, or the maps have another dtype.
        """
        if how not in ("max", "mean") and (isinstance(how, str) or not 0 < how <= 1):
            raise ValueError(f"AnomalyMap.score: how: wanted 'max', 'mean' or a fraction in (0, 1], got {how!r}")
        _check_dtype("AnomalyMap.score: maps", maps)
        if inside is not None:
            return score_inside(maps, inside, how)
        if how == "max":
            return ops.compute_maximum(maps)
        if how == "mean":
            return ops.void_unless_finite(maps.mean(dim=(1, 2)), maps)
        pixels = maps.flatten(1)
        largest = pixels.topk(max(math.floor(pixels.shape[1] * how), 1), sorted=False).values
        return ops.void_unless_finite(largest.mean(dim=1), maps)

    def from_distances(self, distances: Sequence[Tensor], inside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Compute anomaly maps from point distances.

        In a region of interest, the map of a level is the mean of the distances of its points inside, with the same
        weights, those of upsampling and blur, as without a region: sum of weight times distance, divided by the sum of
        the weights. Outside it is 0. No distance outside has an effect, and the map neither rises nor falls towards the
        border of the region. Points inside are those of `recontrast.inside.pool_inside`.

        Args:
            distances: Distances (N, h, w), floating point, group by group, each with one tensor per level in the order
                of ``sizes``.
            inside: Region of interest, whether each pixel of the map is inside, (N, H, W), or (1, H, W) for all images,
                bool. None: all pixels are.

        Returns:
            maps: Anomaly maps (N, H, W), float32.
            maximum: Largest value inside of each map, (N,), float32; NaN if a value inside is NaN or infinite.

        Raises:
            ValueError: If the number, the sizes or the dtypes of the distances, or the shape of ``inside``, do not fit.
        """
        levels = len(self.sizes)
        if not distances or len(distances) % levels:
            raise ValueError(
                f"AnomalyMap: wanted a multiple of {levels} pairs, one for each level, got {len(distances)}"
            )
        for i, d in enumerate(distances):
            _check_dtype(f"AnomalyMap: pair {i}", d)
            if tuple(d.shape[1:]) != self.sizes[i % levels]:
                wanted, got = self.sizes[i % levels], tuple(d.shape[1:])
                raise ValueError(f"AnomalyMap: pair {i}: wanted features of size {wanted}, got {got}")
        distances = [d.float() for d in distances]
        self._move_to(distances[0].device)
        scale = 1 / len(distances) if self.reduce == "mean" else 1.0
        needs_gradient = torch.is_grad_enabled() and any(d.requires_grad for d in distances)
        multiplies = self.method == "matmul" or (self.method == "auto" and needs_gradient)
        if inside is not None:
            return self._map_inside(distances, inside, scale, multiplies)
        if multiplies:
            return self._multiply(distances, scale)
        level = [i % levels for i in range(len(distances))]
        with torch.no_grad():
            return ops.anomaly_map(distances, [self._rows[i] for i in level], [self._cols[i] for i in level], scale)

    def _map_inside(
        self, distances: Sequence[Tensor], inside: Tensor, scale: float, multiplies: bool
    ) -> tuple[Tensor, Tensor]:
        """Compute the maps of a region of interest, see `from_distances`."""
        images = distances[0].shape[0]
        if inside.dtype != torch.bool or tuple(inside.shape) not in ((images, *self.out), (1, *self.out)):
            wanted, got = (images, *self.out), f"{inside.dtype} {tuple(inside.shape)}"
            raise ValueError(f"AnomalyMap: inside: wanted bool {wanted} or {(1, *self.out)}, got {got}")
        region = self._prepare(inside)
        if region.is_whole:
            return self.from_distances(distances)
        if not multiplies and ops.has_kernel("anomaly_map_inside", inside.device):
            with torch.no_grad():
                sums = [torch.where(p, d, 0) for p, d in zip(region.points, self._sum_groups(distances), strict=True)]
                return ops.anomaly_map_inside(sums, self._rows, self._cols, region.whole_factors, scale)
        parts: list[Tensor] = []  # the sum of the levels so far
        for d, mask, factor, rows, cols in zip(
            self._sum_groups(distances), region.points, region.factors, region.rows, region.cols, strict=True
        ):
            d = torch.where(mask, d, 0)
            if multiplies:
                with torch.autocast(d.device.type, enabled=False), full_matrix_products():
                    level = (rows @ d @ cols.mT) * (factor * scale)
                    parts = [parts[0] + level if parts else level]
            else:
                with torch.no_grad():
                    level, _ = ops.anomaly_map([d], [rows], [cols], scale)
                    parts = [parts[0].addcmul_(level, factor) if parts else level.mul_(factor)]
        maps = torch.where(region.inside, parts[0], 0)  # also where a value that is not finite was spread outside
        return F.pad(maps, region.margins), score_inside(maps, region.inside, "max")

    def _prepare(self, inside: Tensor) -> "_Region":
        """Return what the maps of a region need; for one that is constant over batches it is computed once."""
        if self._region is None or self._region.source is not inside:
            points, factors = self.weigh_inside(inside)
            rows, cols = (inside.any(axis).any(0).nonzero()[:, 0].tolist() or [0] for axis in (2, 1))
            (top, bottom), (left, right) = ((span[0], span[-1] + 1) for span in (rows, cols))
            box = (slice(None), slice(top, bottom), slice(left, right))
            self._region = _Region(
                inside, bool(inside.all()), inside[box], points, factors,
                [factor[box].contiguous() for factor in factors],
                [matrix[top:bottom].contiguous() for matrix in self._rows],
                [matrix[left:right].contiguous() for matrix in self._cols],
                (left, self.out[1] - right, top, self.out[0] - bottom),
            )  # fmt: skip
        return self._region

    def weigh_inside(self, inside: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Compute what `from_distances` multiplies by in a region of interest.

        Args:
            inside: Region of interest (N, H, W), bool, on the device of the matrices.

        Returns:
            points: For each level, whether each point is inside, (N, h, w), bool.
            factors: For each level, what renormalises the weights of each pixel, (N, H, W), float32; 0 outside.
        """
        points, factors = [], []
        with torch.no_grad(), torch.autocast(inside.device.type, enabled=False), full_matrix_products():
            for size, rows, cols in zip(self.sizes, self._rows, self._cols, strict=True):
                mask = pool_inside(inside, size)
                weights = rows @ mask.to(rows.dtype) @ cols.mT  # of the points inside
                total = rows.sum(1)[:, None] * cols.sum(1)  # of all points; below 1 at the border if zeros lie outside
                factors.append(torch.where(inside, total / weights.clamp_min(1e-12), 0))
                points.append(mask)
        return points, factors

    def _sum_groups(self, distances: Sequence[Tensor]) -> list[Tensor]:
        """Return the sum over all groups for each level."""
        levels = len(self.sizes)
        return [sum(distances[i::levels][1:], distances[i]) for i in range(levels)]

    def _multiply(self, distances: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """Compute [K_1 .. K_L] @ stack(D_l K_l^T) with two matrix products in full precision."""
        by_level = self._sum_groups(distances)
        # The metrics depend on the ranks of the map values.
        with torch.autocast(distances[0].device.type, enabled=False), full_matrix_products():
            products = torch.cat([d @ cols.mT for d, cols in zip(by_level, self._cols, strict=True)], dim=1)
            maps = torch.cat(self._rows, dim=1) @ products * scale
        return maps, ops.compute_maximum(maps)

    def _move_to(self, device: torch.device) -> None:
        if self._rows[0].device != device:
            self._rows = [t.to(device) for t in self._rows]
            self._cols = [t.to(device) for t in self._cols]
