"""mined_loss in Triton; recontrast/reference.py defines it, and csrc/mined_loss.cu has the same kernels in CUDA.

Launch latency dominates, so one launch serves all pairs. "deviation" and "power" need two launches,
"hardest" more (`recontrast.kernels.radix_select`). Counts are integers and all other sums have a fixed order, so
results are reproducible bit by bit. `recontrast.kernels.mined_pieces` has the kernels of the forward pass.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recontrast.kernels.autotune import OPTIONS
from recontrast.kernels.mined_pieces import FIELDS, POWER, RULES, _combine_pieces, _summarise_pieces
from recontrast.kernels.point_blocks import _count_point, _distance, _find_pair
from recontrast.kernels.radix_select import BINS, DIGIT, _count_digits, _select_digit

PIECE = 1024  # points per program
STEP = 128  # pieces or images at a time in _combine_pieces


@triton.jit
def _gradient(
    grad_ptr,  # one number
    sums_ptr,  # flat
    state_ptr,  # flat
    out_ptr,  # flat
    inside_ptr,  # mask of the points that count, or None, see `_count_point`
    N,  # tuple
    P,  # tuple
    SHARED: tl.constexpr,
    parameter,  # the sum of two numbers
    parameter_rest,
    factor,  # the sum of two numbers
    factor_rest,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the gradient of the sums. The BLOCK points of a program belong to one pair."""
    number, images, points, first, block = _find_pair(tl.program_id(0), N, P, BLOCK, False)
    for i in tl.static_range(len(N)):
        state_ptr += tl.where(i < number, 1 + 3 * tl.cast(N[i], tl.int64), 0)
    volume = images * points
    i = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = i < volume
    index = first + i
    xy = tl.load(sums_ptr + index, mask=inside, other=0.0)
    xx = tl.load(sums_ptr + index + volume, mask=inside, other=0.0)
    d = _distance(xy, xx, tl.load(sums_ptr + index + 2 * volume, mask=inside, other=0.0))
    threshold = tl.load(state_ptr)
    if RULE == POWER:
        relative = tl.where(d < 0, 0.0, d).to(tl.float64) / tl.where(threshold > 0, threshold, 1.0).to(tl.float64)
        exponent = tl.cast(parameter, tl.float64) + tl.cast(parameter_rest, tl.float64)
        positive = relative > 0
        powers = tl.exp2(exponent * tl.log2(tl.where(positive, relative, 1.0)))
        power_of_zero = tl.where(exponent == 0, 1.0, tl.where(exponent > 0, 0.0, float("inf")))
        powers = tl.where(relative == relative, tl.where(positive, powers, power_of_zero), relative)  # keeps NaN
        weight = tl.where(threshold > 0, powers, 1.0).to(d.dtype)
    else:
        easy_weight = tl.cast(factor, tl.float64) + tl.cast(factor_rest, tl.float64)
        weight = tl.where(d < threshold, easy_weight.to(d.dtype), tl.full([], 1, d.dtype))
    weight *= tl.load(grad_ptr)
    slope_ptr = state_ptr + 1 + i // tl.maximum(points, 1)
    counts = inside
    if inside_ptr is not None:
        counts = _count_point(inside_ptr, number, i, points, inside, N, P, SHARED)
    for q in tl.static_range(3):
        value = weight * tl.load(slope_ptr + q * images, mask=inside, other=0.0)
        value = tl.where(counts, value, 0.0)
        tl.store(out_ptr + index + q * volume, value, mask=inside)


def _split_number(number: float) -> tuple[float, float]:
    """Split ``number`` into two float32 numbers whose sum it is."""
    rounded = torch.tensor(number, dtype=torch.float32).item()
    return rounded, number - rounded


def _count_fraction_bits(sums: Tensor) -> int:
    """Return the fraction bits of the distances, which are multiples of 2^-fraction."""
    return 53 if sums.dtype == torch.float64 else 24


def mined_loss(
    sums: Tensor,
    images: Sequence[int],
    points: Sequence[int],
    rule: str,
    parameter: float,
    alpha: Tensor | None,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """`reference.mined_loss`: flat sums -> the loss, and the state that the backward pass needs."""
    return _compute_loss(sums, None, True, images, points, rule, parameter, alpha)


def mined_loss_inside(
    sums: Tensor,
    inside: Tensor,
    shared: bool,
    images: Sequence[int],
    points: Sequence[int],
    rule: str,
    parameter: float,
    alpha: Tensor | None,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """`reference.mined_loss_inside`: flat sums and mask -> the loss, and the state that the backward pass needs."""
    return _compute_loss(sums, inside.contiguous().view(torch.uint8), shared, images, points, rule, parameter, alpha)


def _compute_loss(
    sums: Tensor,
    inside: Tensor | None,
    shared: bool,
    images: Sequence[int],
    points: Sequence[int],
    rule: str,
    parameter: float,
    alpha: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute both losses; ``inside`` holds a byte for each point, or is None if all points count."""
    sums = sums.contiguous()
    N, P = tuple(images), tuple(points)
    pairs, fraction, masked = len(N), _count_fraction_bits(sums), inside is not None
    programs = sum(n * triton.cdiv(p, PIECE) for n, p in zip(N, P, strict=True))
    fields = sums.new_empty(programs, FIELDS)
    state, losses = sums.new_empty(pairs + 3 * sum(N)), sums.new_empty(pairs)
    digits = triton.cdiv(fraction + 2, DIGIT) if rule == "hardest" and programs else 0
    bins = torch.zeros(max(digits, 1), pairs, BINS if digits else 1, dtype=torch.int32, device=sums.device)
    selected = torch.zeros(pairs, 2, dtype=torch.int64, device=sums.device)
    share = _split_number(parameter)
    exact_share = (share[0], *_split_number(share[1]))
    with torch.cuda.device_of(sums):
        if programs:
            shift = DIGIT * (digits - 1)
            _summarise_pieces[(programs,)](
                sums, fields, bins, inside, N, P, shared, RULES[rule], PIECE, fraction, shift, BINS, **OPTIONS
            )
        ranks = tuple(max(int(n * p * parameter), 1) for n, p in zip(N, P, strict=True)) if digits else ()
        tiles = sum(triton.cdiv(n * p, PIECE) for n, p in zip(N, P, strict=True))
        for digit in range(digits):
            if digit:
                shift = DIGIT * (digits - 1 - digit)
                _count_digits[(tiles,)](
                    sums, selected, bins[digit], inside, N, P, shared, PIECE, fraction, shift, BINS, DIGIT,
                    num_warps=4, **OPTIONS,
                )  # fmt: skip
            _select_digit[(pairs,)](
                bins[digit], selected, ranks, exact_share, masked, digit == 0, BINS, DIGIT, num_warps=8, **OPTIONS
            )
        _combine_pieces[(pairs,)](
            fields, selected, alpha, *share, state, losses, N, P, masked, RULES[rule], PIECE, STEP, fraction, **OPTIONS
        )
    return losses.sum(), state


def mined_loss_backward(
    grad: Tensor,
    sums: Tensor,
    state: Tensor,
    images: Sequence[int],
    points: Sequence[int],
    rule: str,
    parameter: float,
    factor: float,
) -> Tensor:
    """`reference.mined_loss_backward`: gradient of the loss, flat sums and state -> gradient of the sums."""
    return _compute_gradient(grad, sums, None, True, state, images, points, rule, parameter, factor)


def mined_loss_inside_backward(
    grad: Tensor,
    sums: Tensor,
    inside: Tensor,
    shared: bool,
    state: Tensor,
    images: Sequence[int],
    points: Sequence[int],
    rule: str,
    parameter: float,
    factor: float,
) -> Tensor:
    """`reference.mined_loss_inside_backward`: gradient of the sums, 0 outside."""
    mask = inside.contiguous().view(torch.uint8)
    return _compute_gradient(grad, sums, mask, shared, state, images, points, rule, parameter, factor)


def _compute_gradient(
    grad: Tensor,
    sums: Tensor,
    inside: Tensor | None,
    shared: bool,
    state: Tensor,
    images: Sequence[int],
    points: Sequence[int],
    rule: str,
    parameter: float,
    factor: float,
) -> Tensor:
    """Compute the gradient of both losses, see `_compute_loss`."""
    sums, N, P = sums.contiguous(), tuple(images), tuple(points)
    out = torch.empty_like(sums)
    tiles = sum(triton.cdiv(n * p, PIECE) for n, p in zip(N, P, strict=True))
    if tiles:
        arguments = (*_split_number(parameter), *_split_number(factor))
        with torch.cuda.device_of(sums):
            _gradient[(tiles,)](grad, sums, state, out, inside, N, P, shared, *arguments, RULES[rule], PIECE, **OPTIONS)
    return out
