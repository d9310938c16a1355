"""mined_loss in Triton. What it computes: recontrast/reference.py; the plan is that of csrc/mined_loss.cu.

Bound by the latency of launches, therefore one launch serves all pairs. "deviation" and "power" need two launches,
"hardest" more (`recontrast.kernels.radix_select`). Counts are integers and all other sums have a fixed order, so
results are reproducible bit by bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recontrast.kernels.autotune import OPTIONS
from recontrast.kernels.radix_select import BINS, DIGIT, _distance, _key, _member, _norm, _refine, _select

PIECE = 1024  # points of a program
FIELDS = 5  # of a piece: mean (or sum) of distances, squares about it, and the three sums
STEP = 128  # pieces or images at a time in the last launch
DEVIATION, HARDEST, POWER = (tl.constexpr(i) for i in range(3))
RULES = {"deviation": 0, "hardest": 1, "power": 2}


@triton.jit
def _pieces(
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
    number, images, points, first, block = _member(tl.program_id(0), N, P, BLOCK, True)
    tiles = tl.cdiv(points, BLOCK)
    i = block % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = i < points
    at = sums_ptr + first + block // tiles * points + i
    volume = images * points
    xy = tl.load(at, mask=inside, other=0.0)
    xx = tl.load(at + volume, mask=inside, other=0.0)
    yy = tl.load(at + 2 * volume, mask=inside, other=0.0)
    d = _distance(xy, xx, yy)
    to = fields_ptr + tl.program_id(0).to(tl.int64) * 5
    if RULE == DEVIATION:
        mean = tl.sum(tl.where(inside, d, 0.0)) / tl.sum(inside.to(d.dtype))
        tl.store(to, mean)
        tl.store(to + 1, tl.sum(tl.where(inside, (d - mean) * (d - mean), 0.0)))
    if RULE == POWER:
        tl.store(to, tl.sum(tl.where(inside, tl.where(d < 0, 0.0, d), 0.0)))
    if RULE == HARDEST:
        tl.atomic_add(bins_ptr + number * BINS + (_key(d, FRACTION) >> SHIFT), 1, mask=inside, sem="relaxed")
    tl.store(to + 2, tl.sum(xy))
    tl.store(to + 3, tl.sum(xx))
    tl.store(to + 4, tl.sum(yy))


@triton.jit
def _slope(xy, square, inverse):
    small = square < tl.full([], 1e-16, square.dtype)
    return tl.where(small, 0.0, xy * inverse / (2 * tl.where(small, 1.0, square)))


@triton.jit
def _finish(
    fields_ptr,  # (programs of _pieces, FIELDS)
    found_ptr,  # (pairs, 2)
    alpha_ptr,  # one number, or None
    parameter,  # in two parts, for a kernel takes numbers as float32
    rest,
    state_ptr,  # flat
    losses_ptr,  # (pairs,)
    N,  # tuple
    P,  # tuple
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    FRACTION: tl.constexpr,
):
    number = tl.program_id(0)
    images = tl.full([], 0, tl.int64)
    points = tl.full([], 0, tl.int64)
    fields = tl.full([], 0, tl.int64)
    state = tl.full([], 0, tl.int64)
    for i in tl.static_range(len(N)):
        images = tl.where(number == i, N[i], images)
        points = tl.where(number == i, P[i], points)
        fields += tl.where(i < number, tl.cast(N[i], tl.int64) * tl.cdiv(P[i], BLOCK), 0)
        state += tl.where(i < number, 1 + 3 * tl.cast(N[i], tl.int64), 0)
    fields_ptr += fields * 5
    state_ptr += state
    tiles = tl.cdiv(points, BLOCK)
    volume = images * points
    lanes = tl.arange(0, STEP).to(tl.int64)

    # Distances: the mean of the pieces' means, then all squares about it.
    total = tl.zeros([STEP], tl.float64)
    first = tl.full([], 0, tl.int64)
    while first < images * tiles:
        b = first + lanes
        size = tl.minimum(points - b % tl.maximum(tiles, 1) * BLOCK, BLOCK).to(tl.float64)
        value = tl.load(fields_ptr + b * 5, mask=b < images * tiles, other=0.0).to(tl.float64)
        total += value * size if RULE == DEVIATION else value
        first += STEP
    mean = tl.where(volume > 0, tl.sum(total) / tl.maximum(volume, 1).to(tl.float64), float("nan"))
    threshold = mean
    if RULE == DEVIATION:
        squares = tl.zeros([STEP], tl.float64)
        first = tl.full([], 0, tl.int64)
        while first < images * tiles:
            b = first + lanes
            inside = b < images * tiles
            size = tl.minimum(points - b % tl.maximum(tiles, 1) * BLOCK, BLOCK).to(tl.float64)
            off = tl.load(fields_ptr + b * 5, mask=inside, other=0.0).to(tl.float64) - mean
            about = tl.load(fields_ptr + b * 5 + 1, mask=inside, other=0.0).to(tl.float64) + size * off * off
            squares += tl.where(inside, about, 0.0)
            first += STEP
        times = tl.cast(parameter, tl.float64) + tl.cast(rest, tl.float64)
        if alpha_ptr is not None:
            times = tl.load(alpha_ptr).to(tl.float64)
        deviation = tl.sqrt(tl.sum(squares) / tl.maximum(volume - 1, 1).to(tl.float64))
        threshold = tl.where(volume > 1, mean + times * deviation, float("-inf"))
    if RULE == HARDEST:
        one: tl.constexpr = 1 << FRACTION
        key = tl.load(found_ptr + 2 * number)
        threshold = (key - one).to(tl.float64) / one
        threshold = tl.where(key == 4 * one - 1, float("nan"), threshold)
        threshold = tl.where(volume > 0, threshold, float("-inf"))
    tl.store(state_ptr, threshold.to(state_ptr.dtype.element_ty))

    # Images: sums of the pieces, slopes, loss.
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
            at = fields_ptr + (n * tiles + tile) * 5
            xy += tl.load(at + 2, mask=inside, other=0.0).to(tl.float64)
            xx += tl.load(at + 3, mask=inside, other=0.0).to(tl.float64)
            yy += tl.load(at + 4, mask=inside, other=0.0).to(tl.float64)
            tile += 1
        inverse = 1 / (_norm(xx) * _norm(yy))
        loss += tl.where(inside, 1 - xy * inverse, 0.0)
        to = state_ptr + 1 + n
        tl.store(to, (-inverse / images.to(tl.float64)).to(state_ptr.dtype.element_ty), mask=inside)
        of_xx = _slope(xy, xx, inverse) / images.to(tl.float64)
        tl.store(to + images, of_xx.to(state_ptr.dtype.element_ty), mask=inside)
        of_yy = _slope(xy, yy, inverse) / images.to(tl.float64)
        tl.store(to + 2 * images, of_yy.to(state_ptr.dtype.element_ty), mask=inside)
        first += STEP
    loss = tl.sum(loss) / tl.maximum(images, 1).to(tl.float64)
    tl.store(losses_ptr + number, tl.where(images > 0, loss, float("nan")))  # as a mean over nothing


@triton.jit
def _weigh(
    grad_ptr,  # one number
    sums_ptr,  # flat
    state_ptr,  # flat
    out_ptr,  # flat
    N,  # tuple
    P,  # tuple
    parameter,  # in two parts
    rest,
    factor,  # in two parts
    factor_rest,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number, images, points, first, block = _member(tl.program_id(0), N, P, BLOCK, False)
    for i in tl.static_range(len(N)):
        state_ptr += tl.where(i < number, 1 + 3 * tl.cast(N[i], tl.int64), 0)
    volume = images * points
    i = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = i < volume
    at = first + i
    xy = tl.load(sums_ptr + at, mask=inside, other=0.0)
    xx = tl.load(sums_ptr + at + volume, mask=inside, other=0.0)
    d = _distance(xy, xx, tl.load(sums_ptr + at + 2 * volume, mask=inside, other=0.0))
    threshold = tl.load(state_ptr)
    if RULE == POWER:
        relative = tl.where(d < 0, 0.0, d).to(tl.float64) / tl.where(threshold > 0, threshold, 1.0).to(tl.float64)
        exponent = tl.cast(parameter, tl.float64) + tl.cast(rest, tl.float64)
        some = relative > 0
        powers = tl.exp2(exponent * tl.log2(tl.where(some, relative, 1.0)))
        nothing = tl.where(exponent == 0, 1.0, tl.where(exponent > 0, 0.0, float("inf")))  # 0 ** exponent
        powers = tl.where(relative == relative, tl.where(some, powers, nothing), relative)
        weight = tl.where(threshold > 0, powers, 1.0).to(d.dtype)
    else:
        easy = tl.cast(factor, tl.float64) + tl.cast(factor_rest, tl.float64)
        weight = tl.where(d < threshold, easy.to(d.dtype), tl.full([], 1, d.dtype))
    weight *= tl.load(grad_ptr)
    slope = state_ptr + 1 + i // tl.maximum(points, 1)
    for q in tl.static_range(3):
        value = weight * tl.load(slope + q * images, mask=inside, other=0.0)
        tl.store(out_ptr + at + q * volume, value, mask=inside)


def _parts(number: float) -> tuple[float, float]:
    """``number`` as the sum of two float32."""
    large = torch.tensor(number, dtype=torch.float32).item()
    return large, number - large


def _fraction(sums: Tensor) -> int:
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
    """`reference.mined_loss`: flat sums -> the loss, and the state that its gradient needs."""
    sums = sums.contiguous()
    N, P, which = tuple(images), tuple(points), RULES[rule]
    pairs, fraction = len(N), _fraction(sums)
    programs = sum(n * triton.cdiv(p, PIECE) for n, p in zip(N, P, strict=True))
    fields = sums.new_empty(programs, FIELDS)
    state, losses = sums.new_empty(pairs + 3 * sum(N)), sums.new_empty(pairs)
    digits = triton.cdiv(fraction + 2, DIGIT) if rule == "hardest" and programs else 0
    bins = torch.zeros(max(digits, 1), pairs, BINS if digits else 1, dtype=torch.int32, device=sums.device)
    found = torch.zeros(pairs, 2, dtype=torch.int64, device=sums.device)
    with torch.cuda.device_of(sums):
        if programs:
            first = DIGIT * (digits - 1)
            _pieces[(programs,)](sums, fields, bins, N, P, which, PIECE, fraction, first, BINS, **OPTIONS)
        ranks = tuple(max(int(n * p * parameter), 1) for n, p in zip(N, P, strict=True)) if digits else ()
        tiles = sum(triton.cdiv(n * p, PIECE) for n, p in zip(N, P, strict=True))
        for turn in range(digits):
            if turn:
                shift = DIGIT * (digits - 1 - turn)
                _refine[(tiles,)](
                    sums, found, bins[turn], N, P, PIECE, fraction, shift, BINS, DIGIT, num_warps=4, **OPTIONS
                )
            _select[(pairs,)](bins[turn], found, ranks, turn == 0, BINS, DIGIT, num_warps=8, **OPTIONS)
        level = _parts(parameter)
        _finish[(pairs,)](fields, found, alpha, *level, state, losses, N, P, which, PIECE, STEP, fraction, **OPTIONS)
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
        arguments = (*_parts(parameter), *_parts(factor))
        with torch.cuda.device_of(sums):
            _weigh[(tiles,)](grad, sums, state, out, N, P, *arguments, RULES[rule], PIECE, **OPTIONS)
    return out
