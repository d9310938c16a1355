"""cosine_sums in Triton, for machines without a CUDA compiler and for GPUs that are not NVIDIA's.

recontrast/reference.py defines it. Memory-bound: each feature is read once, in place, by the strides of image, channel
and position. A program processes a tile of channels x positions of one pair, whose shape depends on which of the two is
contiguous. One launch processes all pairs of a group.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recontrast.kernels.autotune import OPTIONS, autotuned
from recontrast.kernels.feature_pairs import Shapes, by_layout, read, shapes


@triton.jit
def _sums_tile(
    x_ptr,
    y_ptr,
    out_ptr,
    tile,
    part,
    count,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    P,
    x_s,
    y_s,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    SHARE: tl.constexpr = (C + PARTS - 1) // PARTS
    tiles = tl.cdiv(P, BLOCK_P)
    n = (tile // tiles).to(tl.int64)
    p = (tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    c = (part * SHARE + tl.arange(0, BLOCK_C)).to(tl.int64)
    end = C if PARTS == 1 else tl.minimum(part * SHARE + SHARE, C)
    x_ptrs = x_ptr + n * x_s[0] + c[:, None] * x_s[1] + p[None, :] * x_s[2]
    y_ptrs = y_ptr + n * y_s[0] + c[:, None] * y_s[1] + p[None, :] * y_s[2]
    acc: tl.constexpr = out_ptr.dtype.element_ty
    xy = tl.zeros([BLOCK_C, BLOCK_P], acc)
    xx = tl.zeros([BLOCK_C, BLOCK_P], acc)
    yy = tl.zeros([BLOCK_C, BLOCK_P], acc)
    for first in range(0, SHARE, BLOCK_C):
        inside = (first + c < end)[:, None] & (p < P)[None, :]
        x = tl.load(x_ptrs, mask=inside, other=0.0).to(acc)
        y = tl.load(y_ptrs, mask=inside, other=0.0).to(acc)
        xy += x * y
        xx += x * x
        yy += y * y
        x_ptrs += BLOCK_C * x_s[1]
        y_ptrs += BLOCK_C * y_s[1]
    out_ptrs = out_ptr + n * P + p
    tl.store(out_ptrs, tl.sum(xy, 0), mask=p < P)
    tl.store(out_ptrs + count, tl.sum(xx, 0), mask=p < P)
    tl.store(out_ptrs + 2 * count, tl.sum(yy, 0), mask=p < P)


@triton.jit
def _sums(
    xs,  # tuple of (N, C, P), read by strides
    ys,  # tuple of (N, C, P), read by strides
    out_ptr,  # (PARTS, length)
    length,
    firsts,  # tuple: index of the first element of the sums (3, N, P) of a pair
    N,  # tuple
    C: tl.constexpr,  # tuple; constant: there are few values, and no mask is needed if BLOCK_C divides it
    P,  # tuple
    x_s,  # tuple of strides (n, c, p)
    y_s,
    PARTS: tl.constexpr,  # programs that split the channels of a position
    BITS: tl.constexpr,  # of an element; part of the autotuning key
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    tile = tl.program_id(0)
    for i in tl.static_range(len(xs)):
        tiles = N[i] * tl.cdiv(P[i], BLOCK_P)
        if (tile >= 0) & (tile < tiles * PARTS):
            part = tile // tiles if PARTS > 1 else 0  # a constant 0 needs no mask
            out = out_ptr + firsts[i]
            if PARTS > 1:
                out += (tile // tiles).to(tl.int64) * length
            count = tl.cast(N[i], tl.int64) * P[i]
            _sums_tile(
                xs[i], ys[i], out, tile % tiles, part, count, C[i], PARTS, P[i], x_s[i], y_s[i], BLOCK_C, BLOCK_P
            )
        tile -= tiles * PARTS


@triton.jit
def _gradient_tile(
    grad_ptr,
    x_ptr,
    y_ptr,
    dy_ptr,
    tile,
    group,
    count,
    C: tl.constexpr,
    P,
    x_s,
    y_s,
    dy_s,
    SKIP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    tiles = tl.cdiv(P, BLOCK_P)
    n = (tile // tiles).to(tl.int64)
    p = (tile % tiles * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    c = (group * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    grad_ptrs = grad_ptr + n * P + p
    weight_x = tl.load(grad_ptrs, mask=p < P, other=0.0)
    weight_y = 2 * tl.load(grad_ptrs + 2 * count, mask=p < P, other=0.0)
    keep = (weight_x != 0) | (weight_y != 0)
    inside = (c < C)[:, None] & (p < P)[None, :]
    read = inside & keep[None, :] if SKIP else inside
    x_ptrs = x_ptr + n * x_s[0] + c[:, None] * x_s[1] + p[None, :] * x_s[2]
    y_ptrs = y_ptr + n * y_s[0] + c[:, None] * y_s[1] + p[None, :] * y_s[2]
    x = tl.load(x_ptrs, mask=read, other=0.0).to(weight_x.dtype)
    y = tl.load(y_ptrs, mask=read, other=0.0).to(weight_x.dtype)
    dy = tl.where(keep[None, :], weight_x[None, :] * x + weight_y[None, :] * y, 0.0)  # features of weight 0 may be NaN
    dy_ptrs = dy_ptr + n * dy_s[0] + c[:, None] * dy_s[1] + p[None, :] * dy_s[2]
    if dy_ptr.dtype.element_ty == tl.bfloat16:
        dy = dy.to(tl.float32)  # the interpreter cannot convert float64 to bfloat16
    tl.store(dy_ptrs, dy.to(dy_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    grad_ptr,  # flat
    xs,  # tuple of (N, C, P), read by strides
    ys,  # tuple of (N, C, P), read by strides
    dys,  # tuple of (N, C, P), written by strides
    firsts,  # tuple: index of the first element of the sums (3, N, P) of a pair
    N,  # tuple
    C: tl.constexpr,  # tuple; constant: there are few values, and no mask is needed if BLOCK_C divides it
    P,  # tuple
    x_s,  # tuple of strides (n, c, p)
    y_s,
    dy_s,
    BITS: tl.constexpr,  # of an element; part of the autotuning key
    SKIP: tl.constexpr,  # do not read positions of weight 0; off in NCHW, where the mask would split wide loads
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = tl.program_id(0)
    for i in tl.static_range(len(xs)):
        tiles = N[i] * tl.cdiv(P[i], BLOCK_P)
        programs = tiles * tl.cdiv(C[i], BLOCK_C)
        if (program >= 0) & (program < programs):
            grad = grad_ptr + firsts[i]
            tile, group, count = program % tiles, program // tiles, tl.cast(N[i], tl.int64) * P[i]
            _gradient_tile(
                grad,
                xs[i],
                ys[i],
                dys[i],
                tile,
                group,
                count,
                C[i],
                P[i],
                x_s[i],
                y_s[i],
                dy_s[i],
                SKIP,
                BLOCK_C,
                BLOCK_P,
            )
        program -= programs


PROGRAMS = 3  # per multiprocessor; with fewer, several programs split the channels, as in csrc/cosine_sums.cu
LEAST = 128  # minimum channels per program: one or two loads per thread
POSITIONS = 16  # per program, approximately


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of ``device``; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def parts_of(device: torch.device, features: Sequence[Tensor]) -> int:
    """Return how many programs split the channels of a position: 1 unless ``device`` would have too few programs."""
    programs = sum(t.shape[0] * triton.cdiv(t.shape[2] * t.shape[3], POSITIONS) for t in features)
    max_parts = max((t.shape[1] for t in features), default=0) // LEAST
    return max(min(triton.cdiv(PROGRAMS * processors(device), max(programs, 1)), max_parts), 1)


def _config(channels: int, positions: int, warps: int) -> triton.Config:
    return triton.Config({"BLOCK_C": channels, "BLOCK_P": positions}, num_warps=warps)


KEY = ["N", "C", "P", "BITS"]
# Positions are contiguous (NCHW).
PLANES = [
    _config(32, 64, 4),  # a good default: two (16-bit dtypes) or four 16-byte loads of each tensor per thread
    _config(16, 256, 8),  # many positions: long contiguous reads, few lanes to add up
    _config(128, 16, 8),  # few positions (up to 16 x 16): reads of 64 bytes, so that there are enough programs
]
# Channels are contiguous (channels_last).
ROWS = [
    _config(128, 16, 4),  # as above, transposed
    _config(32, 64, 4),  # few channels, many positions
    _config(512, 4, 8),  # many channels, few positions
]
_sums_of = {"planes": autotuned(_sums, PLANES, KEY), "rows": autotuned(_sums, ROWS, KEY)}
_gradient_of = {"planes": autotuned(_gradient, PLANES, KEY), "rows": autotuned(_gradient, ROWS, KEY)}


def cosine_sums_group(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """`reference.cosine_sums_group`: lists of (N_i, C_i, H_i, W_i) -> flat, (3, N_i, H_i, W_i) of each pair in turn."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in (*x, *y)) else torch.float32
    sizes = [3 * t.shape[0] * t.shape[2] * t.shape[3] for t in x]
    out = x[0].new_empty(sum(sizes), dtype=dtype)
    nonempty = [i for i, size in enumerate(sizes) if size and x[i].shape[1]]
    parts = parts_of(out.device, [x[i] for i in nonempty])
    partial = out[None] if parts == 1 else out.new_empty(parts, len(out))
    if not all(t.shape[1] for t in x):
        partial.zero_()  # no program writes the sums of pairs without channels
    for layout, members in by_layout((x, y), nonempty):
        xs, x_s = read(x, members)
        ys, y_s = read(y, members)
        firsts, N, C, P = shapes(x, members)

        def grid(meta: dict[str, int], of: Shapes = (N, P)) -> tuple[int]:
            return (parts * sum(n * triton.cdiv(p, meta["BLOCK_P"]) for n, p in zip(*of, strict=True)),)

        bits = 8 * xs[0].element_size()
        with torch.cuda.device_of(out):
            _sums_of[layout][grid](
                xs, ys, partial, len(out), firsts, N, C, P, x_s, y_s, PARTS=parts, BITS=bits, **OPTIONS
            )
    return out if parts == 1 else torch.sum(partial, 0, out=out)


def cosine_sums_group_backward(grad: Tensor, x: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
    """`reference.cosine_sums_group_backward`: flat, lists of (N_i, C_i, H_i, W_i) -> list like ``y``."""
    grad = grad.contiguous()
    out = [torch.empty_like(t) for t in y]
    nonempty = [i for i, t in enumerate(out) if t.numel()]
    for layout, members in by_layout((x, y, out), nonempty):
        xs, x_s = read(x, members)
        ys, y_s = read(y, members)
        dys, dy_s = read(out, members)
        firsts, N, C, P = shapes(y, members)

        def grid(meta: dict[str, int], of: Shapes = (N, C, P)) -> tuple[int]:
            p, c = meta["BLOCK_P"], meta["BLOCK_C"]
            return (sum(n * triton.cdiv(P, p) * triton.cdiv(C, c) for n, C, P in zip(*of, strict=True)),)

        bits = 8 * ys[0].element_size()
        with torch.cuda.device_of(grad):
            _gradient_of[layout][grid](
                grad,
                xs,
                ys,
                dys,
                firsts,
                N,
                C,
                P,
                x_s,
                y_s,
                dy_s,
                BITS=bits,
                SKIP=layout == "rows",
                **OPTIONS,
            )
        for i, written in zip(members, dys, strict=True):
            if written is not out[i]:
                out[i].copy_(written)
    return out


def cosine_sums(x: Tensor, y: Tensor) -> Tensor:
    """`reference.cosine_sums`: (N, C, H, W) x 2 -> (3, N, H, W)."""
    return cosine_sums_group([x], [y]).view(3, x.shape[0], *x.shape[2:])


def cosine_sums_backward(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`reference.cosine_sums_backward`: (3, N, H, W), (N, C, H, W) x 2 -> (N, C, H, W) with y's dtype and strides."""
    return cosine_sums_group_backward(grad.reshape(-1), [x], [y])[0]
