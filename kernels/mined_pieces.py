"""Forward kernels of mined_loss in Triton: the summary of each piece of points, and what follows for each pair."""

import triton
import triton.language as tl

from recontrast.kernels.point_blocks import _count_point, _distance, _find_pair, _norms
from recontrast.kernels.radix_select import _count_bins, _key

# Per piece: mean ("power": sum) of distances, squares about the mean, the three sums, and the number of points that
# count, those inside if there is a mask.
FIELDS = 6
DEVIATION, HARDEST, POWER = (tl.constexpr(i) for i in range(3))
RULES = {"deviation": 0, "hardest": 1, "power": 2}


@triton.jit
def _summarise_pieces(
    sums_ptr,  # flat
    fields_ptr,  # (programs, FIELDS)
    bins_ptr,  # (pairs, BINS), zeros
    inside_ptr,  # mask of the points that count, or None: P bytes of each pair if SHARED, else N * P
    N,  # tuple
    P,  # tuple
    SHARED: tl.constexpr,
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
    if inside_ptr is not None:
        inside = _count_point(inside_ptr, number, block // tiles * points + i, points, inside, N, P, SHARED)
    xy_ptr = sums_ptr + first + block // tiles * points + i
    volume = images * points
    xy = tl.load(xy_ptr, mask=inside, other=0.0)
    xx = tl.load(xy_ptr + volume, mask=inside, other=0.0)
    yy = tl.load(xy_ptr + 2 * volume, mask=inside, other=0.0)
    d = _distance(xy, xx, yy)
    piece_ptr = fields_ptr + tl.program_id(0).to(tl.int64) * 6
    count = tl.sum(inside.to(d.dtype))
    if RULE == DEVIATION:
        mean = tl.sum(tl.where(inside, d, 0.0)) / tl.maximum(count, 1.0)
        tl.store(piece_ptr, mean)
        tl.store(piece_ptr + 1, tl.sum(tl.where(inside, (d - mean) * (d - mean), 0.0)))
    if RULE == POWER:
        tl.store(piece_ptr, tl.sum(tl.where(inside, tl.where(d < 0, 0.0, d), 0.0)))
    if RULE == HARDEST:
        _count_bins(bins_ptr + number * BINS, _key(d, FRACTION) >> SHIFT, inside)
    tl.store(piece_ptr + 2, tl.sum(xy))
    tl.store(piece_ptr + 3, tl.sum(xx))
    tl.store(piece_ptr + 4, tl.sum(yy))
    tl.store(piece_ptr + 5, count)


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
def _count_points(fields_ptr, pieces, STEP: tl.constexpr):
    """Return the number of points of a pair that count, from those of its pieces."""
    lanes = tl.arange(0, STEP).to(tl.int64)
    total = tl.zeros([STEP], tl.float64)
    first = tl.full([], 0, tl.int64)
    while first < pieces:
        piece = first + lanes
        total += tl.load(fields_ptr + piece * 6 + 5, mask=piece < pieces, other=0.0).to(tl.float64)
        first += STEP
    return tl.sum(total)


@triton.jit
def _mean_distance(fields_ptr, pieces, count, RULE: tl.constexpr, STEP: tl.constexpr):
    """Return the mean of ``count`` distances, from the means ("power": sums) of the pieces; NaN without points."""
    lanes = tl.arange(0, STEP).to(tl.int64)
    total = tl.zeros([STEP], tl.float64)
    first = tl.full([], 0, tl.int64)
    while first < pieces:
        piece = first + lanes
        value = tl.load(fields_ptr + piece * 6, mask=piece < pieces, other=0.0).to(tl.float64)
        size = tl.load(fields_ptr + piece * 6 + 5, mask=piece < pieces, other=0.0).to(tl.float64)
        total += value * size if RULE == DEVIATION else value
        first += STEP
    return tl.where(count > 0, tl.sum(total) / tl.maximum(count, 1.0), float("nan"))


@triton.jit
def _standard_deviation(fields_ptr, mean, pieces, count, STEP: tl.constexpr):
    """Return the unbiased standard deviation of ``count`` distances, from their ``mean`` and the pieces."""
    lanes = tl.arange(0, STEP).to(tl.int64)
    squares = tl.zeros([STEP], tl.float64)
    first = tl.full([], 0, tl.int64)
    while first < pieces:
        piece = first + lanes
        inside = piece < pieces
        size = tl.load(fields_ptr + piece * 6 + 5, mask=inside, other=0.0).to(tl.float64)
        delta = tl.load(fields_ptr + piece * 6, mask=inside, other=0.0).to(tl.float64) - mean
        piece_squares = (
            tl.load(fields_ptr + piece * 6 + 1, mask=inside, other=0.0).to(tl.float64) + size * delta * delta
        )
        squares += tl.where(inside, piece_squares, 0.0)
        first += STEP
    return tl.sqrt(tl.sum(squares) / tl.maximum(count - 1, 1.0))


@triton.jit
def _combine_images(fields_ptr, slopes_ptr, images, tiles, MASKED: tl.constexpr, STEP: tl.constexpr):
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
        count = tl.zeros([STEP], tl.float64)
        tile = tl.full([], 0, tl.int64)
        while tile < tiles:
            piece_ptr = fields_ptr + (n * tiles + tile) * 6
            xy += tl.load(piece_ptr + 2, mask=inside, other=0.0).to(tl.float64)
            xx += tl.load(piece_ptr + 3, mask=inside, other=0.0).to(tl.float64)
            yy += tl.load(piece_ptr + 4, mask=inside, other=0.0).to(tl.float64)
            count += tl.load(piece_ptr + 5, mask=inside, other=0.0).to(tl.float64)
            tile += 1
        inverse = 1 / _norms(xx, yy)
        if MASKED:  # an image without points inside has no distance and no gradient
            has_points = count > 0
            loss += tl.where(inside & has_points, 1 - xy * inverse, 0.0)
            xy = tl.where(has_points, xy, 0.0)
            inverse = tl.where(has_points, inverse, 0.0)
        else:
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
    MASKED: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    FRACTION: tl.constexpr,
):
    """Combine the pieces of a pair into its threshold, slopes and loss, with one program per pair."""
    number = tl.program_id(0)
    images, points, pieces, state = _pair_offsets(number, N, P, BLOCK)
    fields_ptr += pieces * 6
    state_ptr += state
    own_pieces = images * tl.cdiv(points, BLOCK)
    count = _count_points(fields_ptr, own_pieces, STEP)
    if RULE != HARDEST:  # which leaves the field of the mean unwritten
        threshold = _mean_distance(fields_ptr, own_pieces, count, RULE, STEP)
    if RULE == DEVIATION:
        times = tl.cast(parameter, tl.float64) + tl.cast(parameter_rest, tl.float64)
        if alpha_ptr is not None:
            times = tl.load(alpha_ptr).to(tl.float64)
        deviation = _standard_deviation(fields_ptr, threshold, own_pieces, count, STEP)
        threshold = tl.where(count > 1, threshold + times * deviation, float("-inf"))
    if RULE == HARDEST:
        one: tl.constexpr = 1 << FRACTION
        key = tl.load(selected_ptr + 2 * number)
        threshold = (key - one).to(tl.float64) / one
        threshold = tl.where(key == 4 * one - 1, float("nan"), threshold)
        threshold = tl.where(count > 0, threshold, float("-inf"))
    tl.store(state_ptr, threshold.to(state_ptr.dtype.element_ty))
    loss = _combine_images(fields_ptr, state_ptr + 1, images, tl.cdiv(points, BLOCK), MASKED, STEP)
    loss /= tl.maximum(images, 1).to(tl.float64)
    tl.store(losses_ptr + number, tl.where(images > 0, loss, float("nan")))  # like the mean of an empty tensor
