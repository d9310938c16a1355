"""Anomaly map: (teacher, student) pairs -> map at image size -> image score.

Upstream's ``utils.cal_anomaly_map`` upsamples each pair's distances, adds them up and blurs the sum. Both steps are
linear and separable, so here each level has one matrix per axis, blur @ upsampling, built once in float64.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from recontrast import ops
from recontrast.loss import point_distances

Size = int | tuple[int, int]
Score = Literal["max", "mean"] | float
SIGMA = 4.0  # pixels, of both upstream protocols
TRUNCATE = 4.0  # of scipy.ndimage.gaussian_filter: 4 sigma, 33 taps
ZERO5_RADIUS = 2  # upstream's kernel on the GPU has 5 taps, whatever its sigma


def build_upsampling_matrix(out: int, size: int) -> Tensor:
    """Linear interpolation with aligned corners along one axis, as ``F.interpolate`` of upstream's map does it.

    Args:
        out: pixels of the map, at least 1.
        size: points of the features, at least 1.

    Returns:
        (out, size), float64.
    """
    at = torch.arange(out, dtype=torch.float64) * ((size - 1) / (out - 1) if out > 1 else 0.0)
    low = at.floor().clamp_max(max(size - 2, 0)).long()
    high = (low + 1).clamp_max(size - 1)
    share = (at - low).unsqueeze(1)
    identity = torch.eye(size, dtype=torch.float64)
    return (1 - share) * identity[low] + share * identity[high]


def build_blur_matrix(size: int, blur: str | None) -> Tensor:
    """Gaussian blur along one axis, with its border rule.

    Args:
        size: pixels of the map, at least 1.
        blur: as in `AnomalyMap`.

    Returns:
        (size, size), float64.
    """
    if blur is None:
        return torch.eye(size, dtype=torch.float64)
    radius = int(TRUNCATE * SIGMA + 0.5) if blur == "reflect" else ZERO5_RADIUS
    offset = torch.arange(-radius, radius + 1)
    taps = torch.exp(-0.5 * (offset.double() / SIGMA) ** 2)
    taps /= taps.sum()
    source = torch.arange(size).unsqueeze(1) + offset  # (size, taps)
    if blur == "reflect":  # d c b a | a b c d | d c b a, as often as the radius asks for
        source = source.remainder(2 * size)
        source = torch.where(source < size, source, 2 * size - 1 - source)
    inside = (source >= 0) & (source < size)  # what lies outside counts as zero
    matrix = torch.zeros(size, size, dtype=torch.float64)
    return matrix.scatter_add_(1, source.clamp(0, size - 1), taps * inside)


def _one_of(argument: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"AnomalyMap: {argument} must be one of {allowed}, got {value!r}")


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


@contextmanager
def _full_float32() -> Iterator[None]:
    """Matrix products in full float32, whatever the process allows: ranks of map values decide the metrics."""
    if torch.compiler.is_compiling():
        yield
        return
    kinds = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        for kind, precision in zip(kinds, before, strict=True):
            kind.fp32_precision = precision


class AnomalyMap:
    """Turns the pairs of a model into anomaly maps at image size, and maps into image scores.

    Guo et al. (https://arxiv.org/abs/2306.02602); upstream's utils.py: ``cal_anomaly_map`` with SciPy's
    ``gaussian_filter`` for one class, ``cal_anomaly_maps`` with ``get_gaussian_kernel`` for all in one model.

    Args:
        sizes: height and width of the features of each level, fine to coarse; an int means a square.
        out: size of the map in pixels.
        blur: "reflect": Gaussian of sigma 4 px, 33 taps, mirrored border (upstream's single-class protocol);
            "zero5": 5 taps, sigma 4 px, zeros outside (its unified protocol); None: none.
        reduce: "sum" or "mean" over the pairs: values in [0, 2 x pairs] or [0, 2].
        method: "fused": one kernel; "matmul": two matrix products, differentiable, stock operators only; "auto": the
            faster of the two, and "matmul" where a gradient is wanted.

    Raises:
        ValueError: an argument outside of what is named here.
    """

    def __init__(
        self,
        sizes: Sequence[Size],
        out: Size,
        blur: Literal["reflect", "zero5"] | None = "reflect",
        reduce: Literal["sum", "mean"] = "sum",
        method: Literal["auto", "fused", "matmul"] = "auto",
    ):
        _one_of("blur", blur, ("reflect", "zero5", None))
        _one_of("reduce", reduce, ("sum", "mean"))
        _one_of("method", method, ("auto", "fused", "matmul"))
        self.sizes = [_pair(size) for size in sizes]
        self.out = _pair(out)
        if not self.sizes or min(min(size) for size in [*self.sizes, self.out]) < 1:
            raise ValueError(f"AnomalyMap: sizes and out must be at least 1 px, got {self.sizes} and {self.out}")
        self.blur, self.reduce, self.method = blur, reduce, method
        blur_y, blur_x = (build_blur_matrix(size, blur) for size in self.out)
        self._rows = [(blur_y @ build_upsampling_matrix(self.out[0], h)).float() for h, _ in self.sizes]  # each (H, h)
        self._cols = [(blur_x @ build_upsampling_matrix(self.out[1], w)).float() for _, w in self.sizes]  # each (W, w)

    def __call__(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Anomaly maps of (teacher, student) pairs.

        Args:
            pairs: (N, C, h, w) each, floating point; a multiple of the levels, in the order of ``sizes``, group by
                group.

        Returns:
            (N, H, W), float32.

        Raises:
            ValueError: pairs that do not go together, or not with ``sizes``.
        """
        return self.from_distances(point_distances(pairs))[0]

    def maps_and_scores(self, pairs: Sequence[tuple[Tensor, Tensor]], how: Score = "max") -> tuple[Tensor, Tensor]:
        """Anomaly maps and image scores in one go.

        Args:
            pairs: (N, C, h, w) each, as in `__call__`.
            how: as in `score`.

        Returns:
            Maps (N, H, W) and scores (N,), both float32.

        Raises:
            ValueError: as `__call__` and `score`.
        """
        maps, maximum = self.from_distances(point_distances(pairs))
        return maps, maximum if how == "max" else self.score(maps, how)

    def matrices(self) -> tuple[list[Tensor], list[Tensor]]:
        """The upsampling and blur of each level as matrices (H, h), and (W, w), float32, for the map elsewhere."""
        return list(self._rows), list(self._cols)

    def score(self, maps: Tensor, how: Score = "max") -> Tensor:
        """Image scores of maps.

        Args:
            maps: (N, H, W), floating point.
            how: "max" (upstream's for most data), "mean" (for ISIC 2018), or a fraction in (0, 1]: the mean of that
                share of the pixels, rounded down but at least one, with the largest values (0.01 in its unified one).

        Returns:
            (N,), in the dtype of ``maps``.

        Raises:
            ValueError: ``how`` is none of these.
        """
        if how == "max":
            return maps.amax(dim=(1, 2))
        if how == "mean":
            return maps.mean(dim=(1, 2))
        if isinstance(how, str) or not 0 < how <= 1:
            raise ValueError(f"AnomalyMap.score: how must be 'max', 'mean' or a fraction in (0, 1], got {how!r}")
        pixels = maps.flatten(1)
        return pixels.topk(max(math.floor(pixels.shape[1] * how), 1), sorted=False).values.mean(dim=1)

    def from_distances(self, distances: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Anomaly maps from point distances.

        Args:
            distances: (N, h, w) each, floating point; a multiple of the levels, in the order of ``sizes``, group by
                group.

        Returns:
            maps: (N, H, W), float32.
            maximum: the largest value of each map, (N,), float32.

        Raises:
            ValueError: another number of distances, or other sizes.
        """
        levels = len(self.sizes)
        if not distances or len(distances) % levels:
            got = len(distances)
            raise ValueError(f"AnomalyMap: wanted a multiple of {levels} pairs, one for each level, got {got}")
        distances = [d.float() for d in distances]
        for i, d in enumerate(distances):
            if tuple(d.shape[1:]) != self.sizes[i % levels]:
                wanted, found = self.sizes[i % levels], tuple(d.shape[1:])
                raise ValueError(f"AnomalyMap: pair {i} must have features of size {wanted}, got {found}")
        self._to(distances[0].device)
        scale = 1 / len(distances) if self.reduce == "mean" else 1.0
        wants_gradient = torch.is_grad_enabled() and any(d.requires_grad for d in distances)
        if self.method == "matmul" or (self.method == "auto" and wants_gradient):
            return self._matmul(distances, scale)
        level = [i % levels for i in range(len(distances))]
        with torch.no_grad():
            return ops.anomaly_map(distances, [self._rows[i] for i in level], [self._cols[i] for i in level], scale)

    def _matmul(self, distances: Sequence[Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """Two matrix products: [K_1 .. K_L] @ stack(D_l K_l^T), in full precision."""
        levels = len(self.sizes)
        by_level = [sum(distances[i::levels][1:], distances[i]) for i in range(levels)]
        with torch.autocast(distances[0].device.type, enabled=False), _full_float32():
            products = torch.cat([d @ cols.mT for d, cols in zip(by_level, self._cols, strict=True)], dim=1)
            maps = torch.cat(self._rows, dim=1) @ products * scale
        return maps, maps.amax(dim=(1, 2)) if len(maps) else maps.new_zeros(0)

    def _to(self, device: torch.device) -> None:
        if self._rows[0].device != device:
            self._rows = [t.to(device) for t in self._rows]
            self._cols = [t.to(device) for t in self._cols]
