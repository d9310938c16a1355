"""anomaly_map and anomaly_map_inside in Triton; recontrast/reference.py defines them.

The matrices of upsampling and blur are banded. A small first kernel finds the band of each tile of rows. A program of
the second kernel computes a tile of the map, from the bands of its rows and columns alone, and the tile's maximum.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recontrast.kernels.autotune import OPTIONS, autotuned

BLOCK = 64  # side of a tile of the map: its bands of 26, 14 and 8 at 256 px contain few zeros


@triton.jit
def _find_bands(
    matrices,  # tuple of (H, h)
    heights,  # tuple of H
    widths,  # tuple of h
    out_ptr,  # (matrices, tiles, 2)
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Find the band [start, end) of the columns with nonzeros, for each tile of BLOCK rows of each matrix."""
    y = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for m in tl.static_range(len(matrices)):
        if tl.program_id(1) == m:
            start = tl.full([], 0, tl.int32) + widths[m]
            end = tl.full([], 0, tl.int32)
            first = tl.full([], 0, tl.int32)
            while first < widths[m]:
                x = first + tl.arange(0, STEP)
                inside = (y < heights[m])[:, None] & (x < widths[m])[None, :]
                pointers = matrices[m] + y.to(tl.int64)[:, None] * widths[m] + x[None, :]
                nonzero = tl.load(pointers, mask=inside, other=0.0) != 0
                start = tl.minimum(start, tl.min(tl.where(nonzero, x[None, :], widths[m])))
                end = tl.maximum(end, tl.max(tl.where(nonzero, x[None, :] + 1, 0)))
                first += STEP
            out_at = out_ptr + (m * tl.num_programs(0) + tl.program_id(0)) * 2
            tl.store(out_at, start)
            tl.store(out_at + 1, end)


@triton.jit
def _compute_tile(
    distances,  # tuple of (N, h, w), ordered by level
    rows,  # tuple of (H, h), one per level
    cols,  # tuple of (W, w)
    heights,  # tuple of h
    widths,  # tuple of w
    bands_ptr,  # (2 * levels, tiles, 2), of rows, then of cols
    maps_ptr,  # (N, H, W)
    tops_ptr,  # (N, tiles of the map)
    tiles,
    H,
    W,
    scale,
    PAIRS: tl.constexpr,  # per level
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,  # rows or columns of distances at a time
):
    """Compute a tile of BLOCK x BLOCK pixels of one map, and its maximum: NaN if a pixel is not finite."""
    n = tl.program_id(0).to(tl.int64)
    y = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    acc: tl.constexpr = maps_ptr.dtype.element_ty
    total = tl.zeros([BLOCK, BLOCK], acc)
    for level in tl.static_range(len(rows)):
        h = heights[level]
        w = widths[level]
        down = bands_ptr + (level * tiles + tl.program_id(1)) * 2
        across = bands_ptr + ((len(rows) + level) * tiles + tl.program_id(2)) * 2
        first = tl.load(down)
        bottom = tl.load(down + 1)
        right = tl.load(across + 1)
        while first < bottom:
            i = first + tl.arange(0, STEP)
            product = tl.zeros([STEP, BLOCK], acc)  # distances @ cols^T
            start = tl.load(across)
            while start < right:
                j = start + tl.arange(0, STEP)
                inside = (i < bottom)[:, None] & (j < right)[None, :]
                d = tl.zeros([STEP, STEP], acc)
                for pair in tl.static_range(PAIRS):
                    d_at = distances[level * PAIRS + pair] + (n * h + i[:, None]) * w + j[None, :]
                    d += tl.load(d_at, mask=inside, other=0.0)
                c_at = cols[level] + x.to(tl.int64)[None, :] * w + j[:, None]
                c = tl.load(c_at, mask=(j < right)[:, None] & (x < W)[None, :], other=0.0)
                product = tl.dot(d, c, product, input_precision="ieee", out_dtype=acc)
                start += STEP
            r_at = rows[level] + y.to(tl.int64)[:, None] * h + i[None, :]
            r = tl.load(r_at, mask=(y < H)[:, None] & (i < bottom)[None, :], other=0.0)
            total = tl.dot(r, product, total, input_precision="ieee", out_dtype=acc)
            first += STEP
    total *= scale
    inside = (y < H)[:, None] & (x < W)[None, :]
    tl.store(maps_ptr + (n * H + y[:, None]) * W + x[None, :], total, mask=inside)
    largest = tl.max(tl.where(inside, total, float("-inf")))
    is_finite = tl.abs(total) < float("inf")  # False for NaN, which tl.max ignores
    has_nonfinite = tl.max((inside & (is_finite == 0)).to(tl.int32))
    tile = (n * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(tops_ptr + tile, tl.where(has_nonfinite > 0, float("nan"), largest))


def _config(step: int, warps: int) -> triton.Config:
    return triton.Config({"STEP": step}, num_warps=warps)


CONFIGS = [
    _config(16, 8),  # the smallest size of tl.dot, closest to the size of the bands
    _config(32, 8),  # covers the bands of a tile (26, 14, 8 at 256 px) in one step
]
_tuned_tile = autotuned(_compute_tile, CONFIGS, ["H", "W"])


def _group_by_level(
    distances: Sequence[Tensor], rows: Sequence[Tensor], cols: Sequence[Tensor]
) -> tuple[list[int], int]:
    """Return the pairs grouped by matrices, and the number of pairs per level; 1 if the levels differ in number."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, (d, r, c) in enumerate(zip(distances, rows, cols, strict=True)):
        groups.setdefault((d.shape, r.data_ptr(), r.stride(), c.data_ptr(), c.stride()), []).append(i)
    order = [i for group in groups.values() for i in group]
    sizes = {len(group) for group in groups.values()}
    return order, sizes.pop() if len(sizes) == 1 else 1


def anomaly_map(
    distances: Sequence[Tensor], rows: Sequence[Tensor], cols: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """`reference.anomaly_map`: [(N, h, w)], [(H, h)], [(W, w)] -> (N, H, W) and (N,)."""
    N, H, W = distances[0].shape[0], rows[0].shape[0], cols[0].shape[0]
    maps = rows[0].new_empty(N, H, W)
    if maps.numel() == 0:
        return maps, maps.new_zeros(N)
    order, pairs = _group_by_level(distances, rows, cols)
    d = tuple(distances[i].contiguous() for i in order)
    r = tuple(rows[i].contiguous() for i in order[::pairs])
    c = tuple(cols[i].contiguous() for i in order[::pairs])
    heights, widths = tuple(t.shape[1] for t in r), tuple(t.shape[1] for t in c)
    down, across = triton.cdiv(H, BLOCK), triton.cdiv(W, BLOCK)
    tiles = max(down, across)
    bands = torch.empty(2 * len(r), tiles, 2, dtype=torch.int32, device=maps.device)
    tops = maps.new_empty(N, down * across)
    with torch.cuda.device_of(maps):
        _find_bands[tiles, 2 * len(r)](
            r + c, (H,) * len(r) + (W,) * len(c), heights + widths, bands, BLOCK=BLOCK, STEP=32, **OPTIONS
        )
        _tuned_tile[N, down, across](
            d, r, c, heights, widths, bands, maps, tops, tiles, H, W, scale, PAIRS=pairs, BLOCK=BLOCK, **OPTIONS
        )
    return maps, tops.amax(1)


def anomaly_map_inside(
    distances: Sequence[Tensor], rows: Sequence[Tensor], cols: Sequence[Tensor], factors: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """`reference.anomaly_map_inside`: one map for each pair, which is multiplied by its factors."""
    maps, outside = rows[0].new_zeros(distances[0].shape[0], rows[0].shape[0], cols[0].shape[0]), factors[0] == 0
    for d, r, c, factor in zip(distances, rows, cols, factors, strict=True):
        maps.addcmul_(anomaly_map([d], [r], [c], scale)[0], factor)
    maps.masked_fill_(outside, 0)  # also where a value that is not finite was spread outside
    if maps.numel() == 0:
        return maps, maps.new_zeros(len(maps))
    tops = maps.masked_fill(outside, -torch.inf).amax(dim=(1, 2))
    tops = torch.where(outside.all(2).all(1), 0.0, tops)
    return maps, torch.where(maps.isfinite().flatten(1).all(1), tops, torch.nan)
