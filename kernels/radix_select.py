"""Point distances in Triton, and the k-th largest of each pair without a sort.

Distances are multiples of 2^-24 (2^-53 in float64), because 1 - cosine rounds to them. As whole numbers they are told
apart digit by digit, with a histogram for each digit, in two launches each.
"""

import triton
import triton.language as tl

DIGIT = 13  # bits: two digits hold a float32 distance, five a float64 one
BINS = 1 << DIGIT


@triton.jit
def _norm(square):
    least = tl.maximum(square, tl.full([], 1e-16, square.dtype), propagate_nan=tl.PropagateNan.ALL)  # EPS ** 2
    if square.dtype == tl.float64:
        return tl.sqrt(least)
    else:
        return tl.sqrt_rn(least)


@triton.jit
def _distance(xy, xx, yy):
    """1 - cosine, to the same bits wherever it is computed."""
    norms = _norm(xx) * _norm(yy)
    if xy.dtype == tl.float64:
        return 1 - xy / norms
    else:
        return 1 - tl.div_rn(xy, norms)


@triton.jit
def _key(d, FRACTION: tl.constexpr):
    """Distances from -1 to 3, multiples of 2^-FRACTION, as whole numbers; what is no number is the largest."""
    one: tl.constexpr = 1 << FRACTION
    whole = (d * one).to(tl.int64) + one
    return tl.where(d < 3, tl.where(d > -1, whole, 0), 4 * one - 1)


@triton.jit
def _member(block, N, P, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Of the running program: number of its pair, the pair's N, P and first sum, its own number in the pair."""
    number = tl.full([], 0, tl.int32)
    images = tl.full([], 0, tl.int64)
    points = tl.full([], 0, tl.int64)
    first = tl.full([], 0, tl.int64)
    before = tl.full([], 0, tl.int64)  # sums
    mine = block
    for i in tl.static_range(len(N)):
        programs = N[i] * tl.cdiv(P[i], BLOCK) if WHOLE else tl.cdiv(N[i] * P[i], BLOCK)
        here = (block >= 0) & (block < programs)
        number = tl.where(here, i, number)
        images = tl.where(here, N[i], images)
        points = tl.where(here, P[i], points)
        first = tl.where(here, before, first)
        mine = tl.where(here, block, mine)
        block -= programs
        before += 3 * tl.cast(N[i], tl.int64) * P[i]
    return number, images, points, first, mine


@triton.jit
def _select(
    bins_ptr,  # (pairs, BINS)
    found_ptr,  # (pairs, 2): digits of the k-th largest so far, its place among what begins with them
    ranks,  # tuple of k
    FIRST: tl.constexpr,
    BINS: tl.constexpr,
    DIGIT: tl.constexpr,
):
    number = tl.program_id(0)
    at = found_ptr + 2 * number
    place = tl.full([], 0, tl.int64)
    prefix = tl.full([], 0, tl.int64)
    if FIRST:
        for i in tl.static_range(len(ranks)):
            place = tl.where(number == i, ranks[i], place)
    else:
        prefix = tl.load(at) << DIGIT
        place = tl.load(at + 1)
    turned = tl.arange(0, BINS)
    counts = tl.load(bins_ptr + number * BINS + BINS - 1 - turned).to(tl.int64)  # the largest first
    upto = tl.cumsum(counts, 0)
    above = tl.sum((upto < place).to(tl.int64))
    before = tl.max(tl.where(upto < place, upto, 0))
    tl.store(at, prefix | (BINS - 1 - above))
    tl.store(at + 1, place - before)


@triton.jit
def _refine(
    sums_ptr,  # flat
    found_ptr,  # (pairs, 2)
    bins_ptr,  # (pairs, BINS), zeros
    N,  # tuple
    P,  # tuple
    BLOCK: tl.constexpr,
    FRACTION: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    DIGIT: tl.constexpr,
):
    number, images, points, first, block = _member(tl.program_id(0), N, P, BLOCK, False)
    volume = images * points
    i = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = i < volume
    at = sums_ptr + first + i
    xy = tl.load(at, mask=inside, other=0.0)
    d = _distance(xy, tl.load(at + volume, mask=inside, other=0.0), tl.load(at + 2 * volume, mask=inside, other=0.0))
    key = _key(d, FRACTION) >> SHIFT
    alike = inside & ((key >> DIGIT) == tl.load(found_ptr + 2 * number))
    tl.atomic_add(bins_ptr + number * BINS + (key & (BINS - 1)), 1, mask=alike, sem="relaxed")
