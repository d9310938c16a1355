"""The k-th largest distance of each pair in Triton, by radix selection: no sort.

Distances are multiples of 2^-24 (2^-53 in float64), because 1 - cosine is rounded to them. Converted to integers, they
are compared digit by digit, with a histogram and two launches for each digit.
"""

import triton
import triton.language as tl

from recontrast.kernels.point_blocks import _count_point, _distance, _find_pair

DIGIT = 13  # bits per digit: two digits hold a float32 distance, five a float64 one
BINS = 1 << DIGIT


@triton.jit
def _key(d, FRACTION: tl.constexpr):
    """Map distances from -1 to 3, multiples of 2^-FRACTION, to integers in the same order; NaN counts as largest."""
    one: tl.constexpr = 1 << FRACTION
    in_range = tl.where(d < 3, tl.where(d > -1, d, 0.0), 0.0)  # NaN cannot be converted
    key = (in_range * one).to(tl.int64) + one
    return tl.where(d < 3, tl.where(d > -1, key, 0), 4 * one - 1)


@triton.jit
def _count_bins(bins_ptr, bin, counted):
    """Add 1 to the counters of the bins of all points that are ``counted``.

    Additions to one counter wait for each other, and the points of dead features all have the same distance. So the
    points in the lowest and in the highest bin of a program are added at once.
    """
    lowest = tl.min(tl.where(counted, bin, 2147483647))
    highest = tl.max(tl.where(counted, bin, -1))
    in_lowest = counted & (bin == lowest)
    in_highest = counted & (bin == highest) & (bin != lowest)
    low_count = tl.sum(in_lowest.to(tl.int32))
    high_count = tl.sum(in_highest.to(tl.int32))
    tl.atomic_add(bins_ptr + lowest, low_count, mask=low_count > 0, sem="relaxed")
    tl.atomic_add(bins_ptr + highest, high_count, mask=high_count > 0, sem="relaxed")
    between = counted & (bin != lowest) & (bin != highest)
    tl.atomic_add(bins_ptr + bin, 1, mask=between, sem="relaxed")


@triton.jit
def _select_digit(
    bins_ptr,  # (pairs, BINS)
    selected_ptr,  # (pairs, 2): first digits of the k-th largest distance, its rank among those with these digits
    ranks,  # tuple of k; with a mask, k follows from the number of points inside
    fraction,  # tuple of three numbers whose sum it is: k must not be off by one
    MASKED: tl.constexpr,
    FIRST: tl.constexpr,
    BINS: tl.constexpr,
    DIGIT: tl.constexpr,
):
    """Select the next digit of the k-th largest distance of a pair, with one program per pair."""
    number = tl.program_id(0)
    pair_ptr = selected_ptr + 2 * number
    rank = tl.full([], 0, tl.int64)
    prefix = tl.full([], 0, tl.int64)
    offsets = tl.arange(0, BINS)
    counts = tl.load(bins_ptr + number * BINS + BINS - 1 - offsets).to(tl.int64)  # the largest distances first
    if not FIRST:
        prefix = tl.load(pair_ptr) << DIGIT
        rank = tl.load(pair_ptr + 1)
    elif MASKED:  # the first histogram holds all points that count
        share = tl.cast(fraction[0], tl.float64) + tl.cast(fraction[1], tl.float64) + tl.cast(fraction[2], tl.float64)
        rank = tl.maximum((tl.sum(counts).to(tl.float64) * share).to(tl.int64), 1)
    else:
        for i in tl.static_range(len(ranks)):
            rank = tl.where(number == i, ranks[i], rank)
    cumulative = tl.cumsum(counts, 0)
    bins_above = tl.sum((cumulative < rank).to(tl.int64))
    points_above = tl.max(tl.where(cumulative < rank, cumulative, 0))
    tl.store(pair_ptr, prefix | (BINS - 1 - bins_above))
    tl.store(pair_ptr + 1, rank - points_above)


@triton.jit
def _count_digits(
    sums_ptr,  # flat
    selected_ptr,  # (pairs, 2)
    bins_ptr,  # (pairs, BINS), zeros
    inside_ptr,  # mask of the points that count, or None, see `_count_point`
    N,  # tuple
    P,  # tuple
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    FRACTION: tl.constexpr,
    SHIFT: tl.constexpr,
    BINS: tl.constexpr,
    DIGIT: tl.constexpr,
):
    """Count the next digits of all distances that begin with the selected digits."""
    number, images, points, first, block = _find_pair(tl.program_id(0), N, P, BLOCK, False)
    volume = images * points
    i = block * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = i < volume
    if inside_ptr is not None:
        inside = _count_point(inside_ptr, number, i, points, inside, N, P, SHARED)
    xy_ptr = sums_ptr + first + i
    xy = tl.load(xy_ptr, mask=inside, other=0.0)
    xx = tl.load(xy_ptr + volume, mask=inside, other=0.0)
    yy = tl.load(xy_ptr + 2 * volume, mask=inside, other=0.0)
    key = _key(_distance(xy, xx, yy), FRACTION) >> SHIFT
    same_prefix = inside & ((key >> DIGIT) == tl.load(selected_ptr + 2 * number))
    _count_bins(bins_ptr + number * BINS, key & (BINS - 1), same_prefix)
