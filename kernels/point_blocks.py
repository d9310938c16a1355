"""Point distances, and how the points of all pairs are distributed over programs, for the kernels of mined_loss."""

import triton
import triton.language as tl


@triton.jit
def _norm(square):
    """Return the square root of ``square``, at least EPS."""
    clamped = tl.maximum(square, tl.full([], 1e-16, square.dtype), propagate_nan=tl.PropagateNan.ALL)  # EPS ** 2
    if square.dtype == tl.float64:
        return tl.sqrt(clamped)
    else:
        return tl.sqrt_rn(clamped)


@triton.jit
def _norms(xx, yy):
    """Return the product of both norms; NaN if a square overflowed to infinity: the cosine is unknown, not 0."""
    norms = _norm(xx) * _norm(yy)
    return tl.where(norms == float("inf"), float("nan"), norms)


@triton.jit
def _distance(xy, xx, yy):
    """Return 1 - cosine, with the same bits in every kernel."""
    norms = _norms(xx, yy)
    if xy.dtype == tl.float64:
        return 1 - xy / norms
    else:
        return 1 - tl.div_rn(xy, norms)


@triton.jit
def _count_point(inside_ptr, number, i, points, valid, N, P, SHARED: tl.constexpr):
    """Return which of the points ``i`` of pair ``number`` are inside, among those that are ``valid``.

    The mask holds ``points`` bytes of each pair that its images share if SHARED, else those of all its images.
    """
    for k in tl.static_range(len(N)):
        size = tl.cast(P[k], tl.int64) if SHARED else tl.cast(N[k], tl.int64) * P[k]
        inside_ptr += tl.where(k < number, size, 0)
    if SHARED:
        i = i % tl.maximum(points, 1)
    return valid & (tl.load(inside_ptr + i, mask=valid, other=0) != 0)


@triton.jit
def _find_pair(program, N, P, BLOCK: tl.constexpr, BY_IMAGE: tl.constexpr):
    """Find the pair that ``program`` works on.

    BY_IMAGE: the BLOCK points of a program belong to one image, otherwise to one pair.

    Returns the number of the pair, its N and P, the index of its first sum, and the program's index in the pair.
    """
    number = tl.full([], 0, tl.int32)
    images = tl.full([], 0, tl.int64)
    points = tl.full([], 0, tl.int64)
    first = tl.full([], 0, tl.int64)
    sums_before = tl.full([], 0, tl.int64)
    program = tl.cast(program, tl.int64)  # a pair may have more than 2^31 points
    block = program
    for i in tl.static_range(len(N)):
        programs = N[i] * tl.cdiv(P[i], BLOCK) if BY_IMAGE else tl.cdiv(tl.cast(N[i], tl.int64) * P[i], BLOCK)
        in_pair = (program >= 0) & (program < programs)
        number = tl.where(in_pair, i, number)
        images = tl.where(in_pair, N[i], images)
        points = tl.where(in_pair, P[i], points)
        first = tl.where(in_pair, sums_before, first)
        block = tl.where(in_pair, program, block)
        program -= programs
        sums_before += 3 * tl.cast(N[i], tl.int64) * P[i]
    return number, images, points, first, block
