"""norm_act in Triton; recontrast/reference.py defines it, and csrc/norm_act.cu has the same kernels in CUDA.

Memory-bound. A program reads tiles of channels x positions by the strides of image, channel and position; the shape of
a tile depends on which of the two is contiguous. A reduction over positions is divided into parts, which are merged in
float64 in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from recontrast.kernels.autotune import OPTIONS
from recontrast.kernels.feature_pairs import readable

NONE, RELU, GELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2}
TILE = 4096  # elements of a tile: 16 for each of the 256 threads of a program
PARTS = 512  # parts of a reduction at most: about four for each multiprocessor of a large GPU


@triton.jit
def _offsets(c, q, P, strides):
    """Return the offsets of channels c and positions q of the whole batch."""
    n = (q // P).to(tl.int64)
    return c.to(tl.int64)[:, None] * strides[1] + (n * strides[0] + (q - n * P) * strides[2])[None, :]


@triton.jit
def _gelu_cdf(v):
    return 0.5 * (1 + tl.math.erf(v * 0.7071067811865476))


@triton.jit
def _moments_part(
    x_ptr, out_ptr, count, P, C, share, strides,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Compute mean and squared deviations of one part of the positions; out (parts, 2, C), float64."""
    acc: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1).to(tl.int64)
    first = part * share
    end = tl.minimum(first + share, count)
    mean = tl.zeros([BLOCK_C], tl.float64)
    squares = tl.zeros([BLOCK_C], tl.float64)
    seen = tl.zeros([], tl.float64)
    while first < end:
        q = first + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (q < end)[None, :]
        x = tl.load(x_ptr + _offsets(c, q, P, strides), mask=inside, other=0.0).to(acc)
        values = tl.minimum(end - first, BLOCK_P).to(tl.float64)
        centre = tl.sum(x, 1) / values.to(acc)
        d = tl.where(inside, x - centre[:, None], 0.0)
        rest = tl.sum(d, 1).to(tl.float64) / values  # what the rounding of the centre left
        delta = centre.to(tl.float64) + rest - mean
        mean += delta * (values / (seen + values))
        squares += tl.sum(d * d, 1).to(tl.float64) - rest * rest * values
        squares += delta * delta * (seen * values / (seen + values))
        seen += values
        first += BLOCK_P
    tl.store(out_ptr + (2 * part) * C + c, mean, mask=c < C)
    tl.store(out_ptr + (2 * part + 1) * C + c, squares, mask=c < C)


@triton.jit
def _apply(
    x_ptr, residual_ptr, y_ptr, affine_ptr, count, P, C, x_s, residual_s, y_s,
    ACT: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Compute a tile of y; affine (3, C): mean, scale and bias."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    q = tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (c < C)[:, None] & (q < count)[None, :]
    v = _preactivation(x_ptr, residual_ptr, affine_ptr, c, q, inside, P, C, x_s, residual_s, HAS_RESIDUAL)
    if ACT == RELU:
        v = tl.where(v < 0, 0.0, v)  # keeps NaN
    elif ACT == GELU:
        v *= _gelu_cdf(v)
    tl.store(y_ptr + _offsets(c, q, P, y_s), v.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _preactivation(
    x_ptr, residual_ptr, affine_ptr, c, q, inside, P, C, x_s, residual_s, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    acc: tl.constexpr = affine_ptr.dtype.element_ty
    mean = tl.load(affine_ptr + c, mask=c < C, other=0.0)
    scale = tl.load(affine_ptr + C + c, mask=c < C, other=0.0)
    bias = tl.load(affine_ptr + 2 * C + c, mask=c < C, other=0.0)
    x = tl.load(x_ptr + _offsets(c, q, P, x_s), mask=inside, other=0.0).to(acc)
    v = (x - mean[:, None]) * scale[:, None] + bias[:, None]
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + _offsets(c, q, P, residual_s), mask=inside, other=0.0)
        v = v.to(residual_ptr.dtype.element_ty).to(acc) + residual.to(acc)
    return v


@triton.jit
def _masked_gradient(
    grad_ptr, x_ptr, kept_ptr, affine_ptr, c, q, inside, P, C, grad_s, x_s, kept_s,
    ACT: tl.constexpr, HAS_KEPT: tl.constexpr,
):  # fmt: skip
    """Compute the gradient before the activation."""
    g = tl.load(grad_ptr + _offsets(c, q, P, grad_s), mask=inside, other=0.0).to(affine_ptr.dtype.element_ty)
    if ACT == RELU:
        if HAS_KEPT:
            gate = tl.load(kept_ptr + _offsets(c, q, P, kept_s), mask=inside, other=0.0)
            g = tl.where(gate <= 0, 0.0, g)
        else:
            v = _preactivation(x_ptr, kept_ptr, affine_ptr, c, q, inside, P, C, x_s, kept_s, False)
            g = tl.where(v <= 0, 0.0, g)
    elif ACT == GELU:
        v = _preactivation(x_ptr, kept_ptr, affine_ptr, c, q, inside, P, C, x_s, kept_s, HAS_KEPT)
        g *= _gelu_cdf(v) + v * tl.exp(-0.5 * v * v) * 0.3989422804014327
    return g


@triton.jit
def _sums_part(
    grad_ptr, x_ptr, kept_ptr, masked_ptr, affine_ptr, out_ptr, count, P, C, share, grad_s, x_s, kept_s, masked_s,
    ACT: tl.constexpr, HAS_KEPT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sum the masked gradient, alone and times x - mean, over one part; out (parts, 2, C). Writes it if HAS_KEPT."""
    acc: tl.constexpr = out_ptr.dtype.element_ty
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    part = tl.program_id(1).to(tl.int64)
    first = part * share
    end = tl.minimum(first + share, count)
    mean = tl.load(affine_ptr + c, mask=c < C, other=0.0)
    total = tl.zeros([BLOCK_C], acc)
    dot = tl.zeros([BLOCK_C], acc)
    while first < end:
        q = first + tl.arange(0, BLOCK_P)
        inside = (c < C)[:, None] & (q < end)[None, :]
        g = _masked_gradient(
            grad_ptr, x_ptr, kept_ptr, affine_ptr, c, q, inside, P, C, grad_s, x_s, kept_s, ACT, HAS_KEPT
        )
        g = tl.where(inside, g, 0.0)
        if HAS_KEPT:
            tl.store(masked_ptr + _offsets(c, q, P, masked_s), g.to(masked_ptr.dtype.element_ty), mask=inside)
        x = tl.load(x_ptr + _offsets(c, q, P, x_s), mask=inside, other=0.0).to(acc)
        total += tl.sum(g, 1)
        dot += tl.sum(tl.where(inside, g * (x - mean[:, None]), 0.0), 1)
        first += BLOCK_P
    tl.store(out_ptr + (2 * part) * C + c, total, mask=c < C)
    tl.store(out_ptr + (2 * part + 1) * C + c, dot, mask=c < C)


@triton.jit
def _gradient(
    grad_ptr, x_ptr, dx_ptr, affine_ptr, slopes_ptr, count, P, C, grad_s, x_s, dx_s,
    ACT: tl.constexpr, TRAINING: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Compute a tile of the gradient in x; slopes (2, C): what to subtract for each unit of x - mean, and in all."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    q = tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (c < C)[:, None] & (q < count)[None, :]
    g = _masked_gradient(grad_ptr, x_ptr, x_ptr, affine_ptr, c, q, inside, P, C, grad_s, x_s, x_s, ACT, False)
    g *= tl.load(affine_ptr + C + c, mask=c < C, other=0.0)[:, None]
    if TRAINING:
        x = tl.load(x_ptr + _offsets(c, q, P, x_s), mask=inside, other=0.0).to(g.dtype)
        mean = tl.load(affine_ptr + c, mask=c < C, other=0.0)
        slope = tl.load(slopes_ptr + c, mask=c < C, other=0.0)
        offset = tl.load(slopes_ptr + C + c, mask=c < C, other=0.0)
        g -= (x - mean[:, None]) * slope[:, None] + offset[:, None]
    tl.store(dx_ptr + _offsets(c, q, P, dx_s), g.to(dx_ptr.dtype.element_ty), mask=inside)


class _Plan:
    """Tiles and grids of the kernels for features in one layout."""

    def __init__(self, x: Tensor) -> None:
        N, self.C, H, W = x.shape
        self.P, self.count = H * W, N * H * W
        largest = min(64 if x.stride(1) == 1 else 4, triton.next_power_of_2(self.C))
        self.block = {"BLOCK_C": largest, "BLOCK_P": TILE // largest}
        self.columns, self.tiles = triton.cdiv(self.C, largest), triton.cdiv(self.count, TILE // largest)
        parts = min(self.tiles, triton.cdiv(PARTS, self.columns))
        self.share = triton.cdiv(self.tiles, parts) * (TILE // largest)
        self.parts = triton.cdiv(self.count, self.share)

    def counts(self, like: Tensor) -> Tensor:
        """Return the number of positions of each part, (parts, 1)."""
        first = torch.arange(self.parts, device=like.device, dtype=like.dtype)[:, None] * self.share
        return (self.count - first).clamp_max(self.share)


def _affine(moments: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    scale = (moments[1] + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    return torch.stack([moments[0], scale, torch.zeros_like(scale) if bias is None else bias.to(scale)]).to(moments)


def _compute_moments(x: Tensor, plan: _Plan, dtype: torch.dtype) -> Tensor:
    x, strides = readable(x)
    parts = torch.empty(plan.parts, 2, plan.C, dtype=torch.float64, device=x.device)
    _moments_part[plan.columns, plan.parts](
        x, parts, plan.count, plan.P, plan.C, plan.share, strides, **plan.block, num_warps=8, **OPTIONS
    )
    means, squares = parts.unbind(1)
    counts = plan.counts(means)
    mean = (means * counts).sum(0) / plan.count
    deviations = squares + counts * (means - mean).square()
    return torch.stack([mean, deviations.sum(0) / plan.count]).to(dtype)


def norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    act: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`reference.norm_act`: features (N, C, H, W) and parameters (C,) -> features, and moments (2, C)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = torch.empty_like(x)
    moments = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)
    if mean is not None and var is not None:
        moments = torch.stack([mean.to(dtype), var.to(dtype)])
    if not x.numel():
        return y, moments
    plan = _Plan(y)
    with torch.cuda.device_of(x):
        if mean is None:
            moments = _compute_moments(x, plan, dtype)
        x, x_s = readable(x)
        other, other_s = (x, x_s) if residual is None else readable(residual)
        out, out_s = readable(y)
        _apply[plan.columns, plan.tiles](
            x, other, out, _affine(moments, weight, bias, eps), plan.count, plan.P, plan.C, x_s, other_s, out_s,
            ACT=ACTIVATIONS[act], HAS_RESIDUAL=residual is not None, **plan.block, num_warps=8, **OPTIONS,
        )  # fmt: skip
    return y if out is y else y.copy_(out), moments


def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    kept: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Tensor,
    training: bool,
    act: str,
    eps: float,
    wants_x: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.norm_act_backward`: gradients of features and parameters."""
    has_kept = kept is not None and act != "none"
    dx = torch.empty_like(x) if wants_x else x.new_empty(0)
    masked = torch.empty_like(x) if has_kept else x.new_empty(0)
    sums = torch.zeros_like(moments)
    if not x.numel():
        return dx, masked, sums
    plan, affine = _Plan(torch.empty_like(x)), _affine(moments, weight, bias, eps)
    x, x_s = readable(x)
    grad, grad_s = readable(grad)
    other, other_s = readable(kept) if kept is not None and has_kept else (x, x_s)
    out, out_s = readable(masked) if has_kept else (x, x_s)
    kind = ACTIVATIONS[act]
    parts = torch.empty(plan.parts, 2, plan.C, dtype=moments.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _sums_part[plan.columns, plan.parts](
            grad, x, other, out, affine, parts, plan.count, plan.P, plan.C, plan.share, grad_s, x_s, other_s, out_s,
            ACT=kind, HAS_KEPT=has_kept, **plan.block, num_warps=8, **OPTIONS,
        )  # fmt: skip
        total, dot = parts.double().sum(0)
        inverse = (moments[1].double() + eps).rsqrt()
        sums.copy_(torch.stack([total, dot * inverse]))
        if has_kept:
            masked = masked if out is masked else masked.copy_(out)
            grad, grad_s, kind = out, out_s, 0
        if wants_x:
            slopes = torch.stack([dot * inverse * inverse, total]) * (affine[1] / plan.count)
            out, out_s = readable(dx)
            _gradient[plan.columns, plan.tiles](
                grad, x, out, affine, slopes.to(moments.dtype), plan.count, plan.P, plan.C, grad_s, x_s, out_s,
                ACT=kind, TRAINING=training, **plan.block, num_warps=8, **OPTIONS,
            )  # fmt: skip
            dx = dx if out is dx else dx.copy_(out)
    return dx, masked, sums
