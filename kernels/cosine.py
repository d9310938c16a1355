"""cosine_sums in Triton, for GPUs without a CUDA compiler and for those that are not NVIDIA's.

What it computes: recontrast/reference.py. Memory-bound: each feature is read once, in place, by the strides of image,
channel and position. A program takes a tile of channels x positions; its shape follows which of the two lies along
memory.
"""

import torch
import triton
import triton.language as tl
from recontrast.kernels.tune import OPTIONS, tuned
from torch import Tensor


@triton.jit
def _sums(
    x_ptr,  # (N, C, P) by strides
    y_ptr,  # (N, C, P) by strides
    out_ptr,  # (3, N, P)
    count,  # N * P
    C: tl.constexpr,  # few values, and a mask less where a block divides it
    P,
    x_n,
    x_c,
    x_p,
    y_n,
    y_c,
    y_p,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    tiles = tl.cdiv(P, BLOCK_P)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    p = (tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    c = tl.arange(0, BLOCK_C).to(tl.int64)
    x_at = x_ptr + n * x_n + c[:, None] * x_c + p[None, :] * x_p
    y_at = y_ptr + n * y_n + c[:, None] * y_c + p[None, :] * y_p
    acc: tl.constexpr = out_ptr.dtype.element_ty
    xy = tl.zeros([BLOCK_C, BLOCK_P], acc)
    xx = tl.zeros([BLOCK_C, BLOCK_P], acc)
    yy = tl.zeros([BLOCK_C, BLOCK_P], acc)
    for first in range(0, C, BLOCK_C):
        inside = (first + c < C)[:, None] & (p < P)[None, :]
        x = tl.load(x_at, mask=inside, other=0.0).to(acc)
        y = tl.load(y_at, mask=inside, other=0.0).to(acc)
        xy += x * y
        xx += x * x
        yy += y * y
        x_at += BLOCK_C * x_c
        y_at += BLOCK_C * y_c
    out_at = out_ptr + n * P + p
    tl.store(out_at, tl.sum(xy, 0), mask=p < P)
    tl.store(out_at + count, tl.sum(xx, 0), mask=p < P)
    tl.store(out_at + 2 * count, tl.sum(yy, 0), mask=p < P)


@triton.jit
def _gradient(
    grad_ptr,  # (3, N, P)
    x_ptr,  # (N, C, P) by strides
    y_ptr,  # (N, C, P) by strides
    dy_ptr,  # (N, C, P) by strides
    count,  # N * P
    C: tl.constexpr,  # few values, and a mask less where a block divides it
    P,
    x_n,
    x_c,
    x_p,
    y_n,
    y_c,
    y_p,
    dy_n,
    dy_c,
    dy_p,
    SKIP: tl.constexpr,  # read no position of weight 0; off in NCHW, where a mask by position would break up wide loads
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    tiles = tl.cdiv(P, BLOCK_P)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    p = (tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    grad_at = grad_ptr + n * P + p
    of_x = tl.load(grad_at, mask=p < P, other=0.0)
    of_y = 2 * tl.load(grad_at + 2 * count, mask=p < P, other=0.0)
    keep = (of_x != 0) | (of_y != 0)
    inside = (c < C)[:, None] & (p < P)[None, :]
    read = inside & keep[None, :] if SKIP else inside
    x_at = x_ptr + n * x_n + c[:, None] * x_c + p[None, :] * x_p
    y_at = y_ptr + n * y_n + c[:, None] * y_c + p[None, :] * y_p
    x = tl.load(x_at, mask=read, other=0.0).to(of_x.dtype)
    y = tl.load(y_at, mask=read, other=0.0).to(of_x.dtype)
    dy = tl.where(keep[None, :], of_x[None, :] * x + of_y[None, :] * y, 0.0)  # features of weight 0 may hold NaN
    dy_at = dy_ptr + n * dy_n + c[:, None] * dy_c + p[None, :] * dy_p
    if dy_ptr.dtype.element_ty == tl.bfloat16:
        dy = dy.to(tl.float32)  # the interpreter knows no way from float64 to bfloat16
    tl.store(dy_at, dy.to(dy_ptr.dtype.element_ty), mask=inside)


def _config(channels: int, positions: int, warps: int) -> triton.Config:
    return triton.Config({"BLOCK_C": channels, "BLOCK_P": positions}, num_warps=warps)


KEY = ["C", "P"]
# Positions lie along memory (NCHW).
PLANES = [
    _config(32, 64, 4),  # two (16-bit) or four 16-byte loads of each tensor a thread: the usual middle
    _config(16, 256, 8),  # many positions: long runs, few lanes to add up
    _config(
        128, 16, 8
    ),  # few positions (16 x 16 and less): runs of 64 bytes, so that programs suffice to fill the chip
]
# Channels lie along memory (channels_last).
ROWS = [
    _config(128, 16, 4),  # as above, turned
    _config(32, 64, 4),  # few channels, many positions
    _config(512, 4, 8),  # many channels, few positions
]
_sums_of = {"planes": tuned(_sums, PLANES, KEY), "rows": tuned(_sums, ROWS, KEY)}
_gradient_of = {"planes": tuned(_gradient, PLANES, KEY), "rows": tuned(_gradient, ROWS, KEY)}


def _strides(t: Tensor) -> tuple[int, int, int] | None:
    """Strides of (image, channel, position), or None where one stride does not walk through all positions."""
    n, c, h, w = t.stride()
    height, width = t.shape[2:]
    if width == 1:
        return n, c, h
    return (n, c, w) if height == 1 or h == width * w else None


def _readable(t: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """``t`` with its strides; a copy of it (the only one made here) where the layout is a rare one."""
    strides = _strides(t)
    _, C, H, W = t.shape
    return (t, strides) if strides else (t.contiguous(), (C * H * W, H * W, 1))


def _layout(*all_strides: tuple[int, int, int]) -> str:
    return "rows" if all(c == 1 for _, c, _ in all_strides) else "planes"


def cosine_sums(x: Tensor, y: Tensor) -> Tensor:
    """`reference.cosine_sums`: (N, C, H, W) x 2 -> (3, N, H, W)."""
    N, C, H, W = x.shape
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    out = x.new_empty(3, N, H, W, dtype=dtype)
    if out.numel() == 0:
        return out
    (x, xs), (y, ys) = _readable(x), _readable(y)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (N * triton.cdiv(H * W, meta["BLOCK_P"]),)

    with torch.cuda.device_of(x):
        _sums_of[_layout(xs, ys)][grid](x, y, out, N * H * W, C, H * W, *xs, *ys, **OPTIONS)
    return out


def cosine_sums_backward(grad: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`reference.cosine_sums_backward`: (3, N, H, W), (N, C, H, W) x 2 -> (N, C, H, W) with y's dtype and strides."""
    N, C, H, W = y.shape
    dy = torch.empty_like(y)
    if dy.numel() == 0:
        return dy
    (x, xs), (y, ys), (to, dys) = _readable(x), _readable(y), _readable(dy)
    layout = _layout(xs, ys, dys)

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return N * triton.cdiv(H * W, meta["BLOCK_P"]), triton.cdiv(C, meta["BLOCK_C"])

    with torch.cuda.device_of(y):
        _gradient_of[layout][grid](
            grad.contiguous(), x, y, to, N * H * W, C, H * W, *xs, *ys, *dys, SKIP=layout == "rows", **OPTIONS
        )
    return dy if to is dy else dy.copy_(to)
