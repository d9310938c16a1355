"""mined_loss in Triton; recontrast/reference.py defines it, and csrc/mined_loss.cu has the same kernels in CUDA.

Launch latency dominates, so one launch serves all pairs. "deviation" and "power" need two launches,
"hardest" more (`recontrast.kernels.radix_select`). Counts are integers and all other sums have a fixed order, so
results are reproducible bit by bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recontrast.kernels.autotune import OPTIONS
from recontrast.kernels.point_blocks import _distance, _find_pair, _norm
from recontrast.kernels.radix_select import BINS, DIGIT, _count_digits, _key, _select_digit

PIECE = 1024  # points per program
FIELDS = 5  # per piece: mean ("power": sum) of distances, squares about the mean, the three sums
STEP = 128  # pieces or images at a time in _combine_pieces
DEVIATION, HARDEST, POWER = (tl.constexpr(i) for i in range(3))
RULES = {"deviation": 0, "hardest": 1, "power": 2}


@triton.jit
def _summarise_pieces(
    sums_ptr,  # flat
    fields_ptr,  # (programs, FIELDS)
    bins_ptr,  # (pairs, BINS), zeros
    N,  # tuple
    P,  # tuple
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
    FRACTION: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
):
    """Summarise pieces of BLOCK points of one image; for "hardest", count the first digits of their distances."""
    number, images, points, first, block = _find_pair(tl.program_id(0), N, P, BLOCK, True)
    tiles = tl.cdiv(points, BLOCK)
    i = block % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = i < points
    xy_ptr = sums_ptr + first + block // tiles * points + i
    volume = images * points
    xy = tl.load(xy_ptr, mask=inside, other=0.0)
    xx = tl.load(xy_ptr + volume, mask=inside, other=0.0)
    yy = tl.load(xy_ptr + 2 * volume, mask=inside, other=0.0)
    d = _distance(xy, xx, yy)
    piece_ptr = fields_ptr + tl.program_id(0).to(tl.int64) * 5
    if RULE == DEVIATION:
        mean = tl.sum(tl.where(inside, d, 0.0)) / tl.sum(inside.to(d.dtype))
        tl.store(piece_ptr, mean)
        tl.store(piece_ptr + 1, tl.sum(tl.where(inside, (d - mean) * (d - mean), 0.0)))
    if RULE == POWER:
        tl.store(piece_ptr, tl.sum(tl.where(inside, tl.where(d < 0, 0.0, d), 0.0)))
    if RULE == HARDEST:
        tl.atomic_add(bins_ptr + number * BINS + (_key(d, FRACTION) >> SHIFT), 1, mask=inside, sem="relaxed")
    tl.store(piece_ptr + 2, tl.sum(xy))
    tl.store(piece_ptr + 3, tl.sum(xx))
    tl.store(piece_ptr + 4, tl.sum(yy))


@triton.jit
def _slope(xy, square, inverse):
    """Return the derivative of the loss by ``square``, <x, x> or <y, y>; inverse: 1 / (norm of x * norm of y)."""
    small = square < tl.full([], 1e-16, square.dtype)
    return tl.where(small, 0.0, xy * inverse / (2 * tl.where(small, 1.0, square)))


@triton.jit
def _pair_offsets(number, N, P, BLOCK: tl.constexpr):
    """Return N and P of pair ``number``, and the number of pieces and of elements of the state before it."""
    images = tl.full([], 0, tl.int64)
    points = tl.full([], 0, tl.int64)
    pieces = tl.full([], 0, tl.int64)
    state = tl.full([], 0, tl.int64)
    for i in tl.static_range(len(N)):
        images = tl.where(number == i, N[i], images)
        points = tl.where(number == i, P[i], points)
        pieces += tl.where(i < number, tl.cast(N[i], tl.int64) * tl.cdiv(P[i], BLOCK), 0)
        state += tl.where(i < number, 1 + 3 * tl.cast(N[i], tl.int64), 0)
    return images, points, pieces, state


@triton.jit
def _mean_distance(fields_ptr, images, points, RULE: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Return the mean distance of a pair, from the means ("power": sums) of its pieces; NaN without points."""
    lanes = tl.arange(0, STEP).to(tl.int64)
    tiles = tl.cdiv(points, BLOCK)
    volume = images * points
    total = tl.zeros([STEP], tl.float64)
    first = tl.full([], 0, tl.int64)
    while first < images * tiles:
        piece = first + lanes
        size = tl.minimum(points - piece % tl.maximum(tiles, 1) * BLOCK, BLOCK).to(tl.float64)
        value = tl.load(fields_ptr + piece * 5, mask=piece < images * tiles, other=0.0).to(tl.float64)
        total += value * size if RULE == DEVIATION else value
        first += STEP
    return tl.where(volume > 0, tl.sum(total) / tl.maximum(volume, 1).to(tl.float64), float("nan"))


@triton.jit
def _standard_deviation(fields_ptr, mean, images, points, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Return the unbiased standard deviation of the distances of a pair, from their ``mean`` and its pieces."""
    lanes = tl.arange(0, STEP).to(tl.int64)
    tiles = tl.cdiv(points, BLOCK)
    squares = tl.zeros([STEP], tl.float64)
    first = tl.full([], 0, tl.int64)
    while first < images * tiles:
        piece = first + lanes
        inside = piece < images * tiles
        size = tl.minimum(points - piece % tl.maximum(tiles, 1) * BLOCK, BLOCK).to(tl.float64)
        delta = tl.load(fields_ptr + piece * 5, mask=inside, other=0.0).to(tl.float64) - mean
        piece_squares = (
            tl.load(fields_ptr + piece * 5 + 1, mask=inside, other=0.0).to(tl.float64) + size * delta * delta
        )
        squares += tl.where(inside, piece_squares, 0.0)
        first += STEP
    return tl.sqrt(tl.sum(squares) / tl.maximum(images * points - 1, 1).to(tl.float64))


@triton.jit
def _combine_images(fields_ptr, slopes_ptr, images, tiles, STEP: tl.constexpr):
    """Return the sum of the losses of a pair's images, from the sums of their pieces; write the slopes (3, images)."""
    lanes = tl.arange(0, STEP).to(tl.int64)
    loss = tl.zeros([STEP], tl.float64)
    first = tl.full([], 0, tl.int64)
    while first < images:
        n = first + lanes
        inside = n < images
        xy = tl.zeros([STEP], tl.float64)
        xx = tl.zeros([STEP], tl.float64)
        yy = tl.zeros([STEP], tl.float64)
        tile = tl.full([], 0, tl.int64)
        while tile < tiles:
            piece_ptr = fields_ptr + (n * tiles + tile) * 5
            xy += tl.load(piece_ptr + 2, mask=inside, other=0.0).to(tl.float64)
            xx += tl.load(piece_ptr + 3, mask=inside, other=0.0).to(tl.float64)
            yy += tl.load(piece_ptr + 4, mask=inside, other=0.0).to(tl.float64)
            tile += 1
        inverse = 1 / (_norm(xx) * _norm(yy))
        loss += tl.where(inside, 1 - xy * inverse, 0.0)
        dtype: tl.constexpr = slopes_ptr.dtype.element_ty
        tl.store(slopes_ptr + n, (-inverse / images.to(tl.float64)).to(dtype), mask=inside)
        slope_xx = _slope(xy, xx, inverse) / images.to(tl.float64)
        tl.store(slopes_ptr + n + images, slope_xx.to(dtype), mask=inside)
        slope_yy = _slope(xy, yy, inverse) / images.to(tl.float64)
        tl.store(slopes_ptr + n + 2 * images, slope_yy.to(dtype), mask=inside)
        first += STEP
    return tl.sum(loss)


@triton.jit
def _combine_pieces(
    fields_ptr,  # (programs of _summarise_pieces, FIELDS)
    selected_ptr,  # (pairs, 2)
    alpha_ptr,  # one number, or None
    parameter,  # the sum of two numbers, because Triton passes numbers as float32
    parameter_rest,
    state_ptr,  # flat
    losses_ptr,  # (pairs,)
    N,  # tuple
    P,  # tuple
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    FRACTION: tl.constexpr,
):
    """Combine the pieces of a pair into its threshold, slopes and loss, with one program per pair."""
    number = tl.program_id(0)
    images, points, pieces, state = _pair_offsets(number, N, P, BLOCK)
    fields_ptr += pieces * 5
    state_ptr += state
    volume = images * points
    threshold = _mean_distance(fields_ptr, images, points, RULE, BLOCK, STEP)
    if RULE == DEVIATION:
        times = tl.cast(parameter, tl.float64) + tl.cast(parameter_rest, tl.float64)
        if alpha_ptr is not None:
            times = tl.load(alpha_ptr).to(tl.float64)
        deviation = _standard_deviation(fields_ptr, threshold, images, points, BLOCK, STEP)
        threshold = tl.where(volume > 1, threshold + times * deviation, float("-inf"))
    if RULE == HARDEST:
        one: tl.constexpr = 1 << FRACTION
        key = tl.load(selected_ptr + 2 * number)
        threshold = (key - one).to(tl.float64) / one
        threshold = tl.where(key == 4 * one - 1, float("nan"), threshold)
        threshold = tl.where(volume > 0, threshold, float("-inf"))
    tl.store(state_ptr, threshold.to(state_ptr.dtype.element_ty))
    loss = _combine_images(fields_ptr, state_ptr + 1, images, tl.cdiv(points, BLOCK), STEP)
    loss /= tl.maximum(images, 1).to(tl.float64)
    tl.store(losses_ptr + number, tl.where(images > 0, loss, float("nan")))  # like the mean of an empty tensor


@triton.jit
def _gradient(
    grad_ptr,  # one number
    sums_ptr,  # flat
    state_ptr,  # flat
    out_ptr,  # flat
    N,  # tuple
    P,  # tuple
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
    for q in tl.static_range(3):
        value = weight * tl.load(slope_ptr + q * images, mask=inside, other=0.0)
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
    sums = sums.contiguous()
    N, P = tuple(images), tuple(points)
    pairs, fraction = len(N), _count_fraction_bits(sums)
    programs = sum(n * triton.cdiv(p, PIECE) for n, p in zip(N, P, strict=True))
    fields = sums.new_empty(programs, FIELDS)
    state, losses = sums.new_empty(pairs + 3 * sum(N)), sums.new_empty(pairs)
    digits = triton.cdiv(fraction + 2, DIGIT) if rule == "hardest" and programs else 0
    bins = torch.zeros(max(digits, 1), pairs, BINS if digits else 1, dtype=torch.int32, device=sums.device)
    selected = torch.zeros(pairs, 2, dtype=torch.int64, device=sums.device)
    with torch.cuda.device_of(sums):
        if programs:
            shift = DIGIT * (digits - 1)
            _summarise_pieces[(programs,)](
                sums, fields, bins, N, P, RULES[rule], PIECE, fraction, shift, BINS, **OPTIONS
            )
        ranks = tuple(max(int(n * p * parameter), 1) for n, p in zip(N, P, strict=True)) if digits else ()
        tiles = sum(triton.cdiv(n * p, PIECE) for n, p in zip(N, P, strict=True))
        for digit in range(digits):
            if digit:
                shift = DIGIT * (digits - 1 - digit)
                _count_digits[(tiles,)](
                    sums, selected, bins[digit], N, P, PIECE, fraction, shift, BINS, DIGIT, num_warps=4, **OPTIONS
                )
            _select_digit[(pairs,)](bins[digit], selected, ranks, digit == 0, BINS, DIGIT, num_warps=8, **OPTIONS)
        _combine_pieces[(pairs,)](
            fields,
            selected,
            alpha,
            *_split_number(parameter),
            state,
            losses,
            N,
            P,
            RULES[rule],
            PIECE,
            STEP,
            fraction,
            **OPTIONS,
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
    sums, N, P = sums.contiguous(), tuple(images), tuple(points)
    out = torch.empty_like(sums)
    tiles = sum(triton.cdiv(n * p, PIECE) for n, p in zip(N, P, strict=True))
    if tiles:
        arguments = (*_split_number(parameter), *_split_number(factor))
        with torch.cuda.device_of(sums):
            _gradient[(tiles,)](grad, sums, state, out, N, P, *arguments, RULES[rule], PIECE, **OPTIONS)
    return out
