"""Triton kernels whose indices exceed 32 bits, in the interpreter; a page of memory exists only where it is touched."""

import mmap

import pytest
import torch

from recontrast.kernels import cosine_sums, mined_loss

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="THE INTERPRETER RUNS ON THE CPU ALONE")
GIB = 1 << 30
FLOAT = 4  # bytes


class SparseFloats:
    """Float32 numbers with indices from -2^31 to ``length``, of which the kernels touch a few."""

    def __init__(self, length):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
        self.before = 2 * GIB
        self.memory = mmap.mmap(-1, (self.before + length) * FLOAT, flags=flags)

    def view(self, index, count):
        return torch.frombuffer(self.memory, dtype=torch.float32, count=count, offset=(self.before + index) * FLOAT)


def test_sums_of_many_positions():
    """<y, y> of N * P = 2^30 begins at element 2^31."""
    count, C, block = GIB, 4, 16
    x, y = torch.randn(C), torch.randn(C)
    out = SparseFloats(3 * count)
    strides = ((0, 1, 0),)  # all positions have the same channels
    cosine_sums._sums[(1,)](
        (x,), (y,), out.view(0, 4), 3 * count, (0,), (2,), (C,), (count // 2,), strides, strides,
        PARTS=1, BITS=32, BLOCK_C=C, BLOCK_P=block,
    )  # fmt: skip
    for q, expected in enumerate((x @ y, x @ x, y @ y)):
        torch.testing.assert_close(out.view(q * count, block), expected.expand(block))


def test_gradient_of_many_positions():
    count, C, block = GIB, 4, 16
    x, y = torch.randn(C), torch.randn(C)
    grad, dy = SparseFloats(3 * count), SparseFloats(64)
    grad.view(0, block).fill_(2.0)
    grad.view(2 * count, block).fill_(3.0)
    strides = ((0, 1, 0),)
    cosine_sums._gradient[(1,)](
        grad.view(0, 4), (x,), (y,), (dy.view(0, 4),), (0,), (2,), (C,), (count // 2,), strides, strides, ((0, 1, C),),
        BITS=32, SKIP=False, BLOCK_C=C, BLOCK_P=block,
    )  # fmt: skip
    torch.testing.assert_close(dy.view(0, block * C).view(block, C), (2 * x + 6 * y).expand(block, C))


def test_mining_of_many_points():
    """A pair of 2^31 points."""
    N, P, block = 2, GIB, 16
    sums, out = SparseFloats(3 * N * P), SparseFloats(3 * N * P)
    for q, value in enumerate((0.5, 1.0, 1.0)):
        sums.view(q * N * P, block).fill_(value)
    state = torch.tensor([-1.0, *(float(i) for i in range(3 * N))])  # all points are hard
    mined_loss._gradient[(1,)](
        torch.ones(1), sums.view(0, 4), state, out.view(0, 4), None, (N,), (P,), SHARED=False, parameter=0.0,
        parameter_rest=0.0, factor=0.0, factor_rest=0.0, RULE=0, BLOCK=block,
    )  # fmt: skip
    for q in range(3):
        assert (out.view(q * N * P, block) == q * N).all()
