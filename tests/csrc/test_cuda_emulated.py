"""The CUDA kernels, emulated on the CPU (`emulate_cuda`), against the float64 oracle."""

import functools
import itertools
import subprocess

import emulate_cuda
import pytest
import torch
from emulate_cuda import twice
from op_cases import (
    GROUPS,
    LAYOUTS,
    ROUNDING,
    RULES,
    find_far_points,
    make_anomaly_map_arguments,
    make_features,
    make_inside,
    make_sums,
    relative_error,
)
from pairs import cover_pairs

from recontrast import reference

pytestmark = [
    pytest.mark.skipif(emulate_cuda.COMPILER is None, reason="NO G++: THE CUDA KERNELS WERE NOT EMULATED"),
    pytest.mark.usefixtures("_poisoned_memory"),
]
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Whole vectors; odd sizes; more channels than a batch of loads; few positions; one position.
SHAPES = [(2, 64, 8, 8), (3, 5, 7, 13), (1, 1030, 2, 2), (1, 40, 16, 12), (1, 1, 1, 1)]


def check(emulated, x, y, processors=4):
    (sums,) = twice(emulated, lambda ops: ops.cosine_sums_group(x, y), processors)
    assert sums.dtype == reference.group_dtype(x, y)
    wide = [[t.double() for t in ts] for ts in (x, y)]
    assert relative_error(sums, reference.cosine_sums_group(*wide)) < (1e-6 if sums.dtype == F32 else 1e-14)
    grad = torch.randn_like(sums)
    for part in reference.split_pairs(grad, [t.shape[0] for t in y], [t.shape[2] * t.shape[3] for t in y]):
        part *= torch.rand_like(part[:1]) < 0.4
    gradients = twice(emulated, lambda ops: ops.cosine_sums_group_backward(grad, x, y), processors)
    for ours, theirs, t in zip(gradients, reference.cosine_sums_group_backward(grad.double(), *wide), y, strict=True):
        assert ours.dtype == t.dtype
        assert ours.stride() == torch.empty_like(t).stride()
        assert relative_error(ours, theirs) < ROUNDING[t.dtype]


@pytest.mark.parametrize("processors", [1, 132], ids=["small", "large"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
def test_features(emulated, dtype, layout, processors):
    check(emulated, *make_features(SHAPES, dtype, layout=layout), processors)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1024, 4, 4), (1, 1030, 2, 2), (2, 515, 1, 3), (1, 4099, 1, 1)], ids=str)
def test_few_positions_split_their_channels(emulated, dtype, layout, shape):
    """One pair, on GPUs with few multiprocessors and with enough to split the channels down to one load per thread."""
    x, y = make_features([shape], dtype, layout=layout)
    for processors in (1, 3, 132):
        check(emulated, x, y, processors)


def test_splitting_changes_the_order_of_sums(emulated):
    """Shows that the cases above do split: the blocks of one pair occupy one multiprocessor, but not 132."""
    x, y = make_features([(1, 1024, 16, 16)])
    for layout in (torch.contiguous_format, torch.channels_last):
        pair = [[t.contiguous(memory_format=layout) for t in ts] for ts in (x, y)]
        one, many = (twice(emulated, lambda ops, p=pair: ops.cosine_sums_group(*p), n)[0] for n in (1, 132))
        assert not torch.equal(one, many)
        torch.testing.assert_close(one, many)


def test_a_small_pair_beside_a_large_one(emulated):
    """Both pairs, one of them or none are split, depending on the number of multiprocessors."""
    x, y = make_features([(1, 600, 2, 2), (2, 24, 16, 16), (1, 3, 5, 5), (3, 0, 2, 2)])
    for processors in (1, 2, 7, 40):
        check(emulated, x, y, processors)
    x, y = make_features([(1, 700, 2, 3)], F32, other=BF16, layout="transposed")
    check(emulated, x, y, 132)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(emulated, layout):
    check(emulated, *make_features([(2, 8, 4, 6), (3, 5, 7, 13)], layout=layout))


def test_mixed_pairs(emulated):
    """Every way to read a pair in one call, and more pairs of one kind than fit into a launch."""
    x, y = make_features([(1, 3, 2, 2)] * 18)
    for dtype, other in itertools.product([F32, BF16, F16], repeat=2):
        for layout in ("nchw", "channels_last", "transposed"):
            a, b = make_features([(2, 8, 4, 4)], dtype, layout=layout, other=other)
            x, y = x + a, y + b
    check(emulated, x, y)
    x[0], y[20] = x[0].double(), y[20].double()
    check(emulated, x, y)


def test_one_pair(emulated):
    (x,), (y,) = make_features([(2, 12, 5, 4)])
    (sums,) = twice(emulated, lambda ops: ops.cosine_sums(x, y))
    assert relative_error(sums, reference.cosine_sums(x.double(), y.double())) < 1e-6
    grad = torch.randn_like(sums)
    (gradient,) = twice(emulated, lambda ops: ops.cosine_sums_backward(grad, x, y))
    expected = reference.cosine_sums_backward(grad.double(), x.double(), y.double())
    assert relative_error(gradient, expected) < ROUNDING[F32]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_easy_points_and_empty_pairs(emulated, layout):
    x, y = make_features([(2, 20, 6, 7), (0, 3, 4, 5), (2, 0, 3, 3), (2, 3, 0, 5)], layout=layout)
    sums = [t.double() for t in (*x, *y)]
    grad = torch.randn(sum(3 * t.shape[0] * t.shape[2] * t.shape[3] for t in x))
    easy = torch.rand(2, 6, 7) < 0.7
    grad[: 3 * easy.numel()].view(3, *easy.shape)[:, easy] = 0
    expected = reference.cosine_sums_group_backward(grad.double(), sums[:4], sums[4:])
    for t in (x[0], y[0]):
        t.permute(0, 2, 3, 1)[easy] = torch.nan
    gradients = twice(emulated, lambda ops: ops.cosine_sums_group_backward(grad, x, y))
    for ours, theirs in zip(gradients, expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs) < ROUNDING[F32]


@cover_pairs(rule=RULES, dtype=[F32, F64], group=GROUPS)
def test_mining(emulated, rule, dtype, group):
    name, parameter, factor = rule
    sums, wide = make_sums(*group, dtype, "cpu")
    tolerance = {"rtol": 3e-6 if dtype == F32 else 1e-12, "atol": 1e-6 if dtype == F32 else 1e-13}
    alpha = torch.tensor(parameter, dtype=dtype) if name == "deviation" and factor else None
    loss, state = twice(emulated, lambda ops: ops.mined_loss(sums, *group, name, parameter, alpha, factor))
    expected = reference.mined_loss(wide, *group, name, parameter, None, factor)
    for ours, theirs in zip((loss, state), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, equal_nan=True, **tolerance)
    grad = torch.tensor(-1.7, dtype=dtype)
    (ours,) = twice(emulated, lambda ops: ops.mined_loss_backward(grad, sums, state, *group, name, parameter, factor))
    theirs = reference.mined_loss_backward(grad.double(), wide, expected[1], *group, name, parameter, factor)
    far = find_far_points(wide, expected[1], *group, 1e-6 if dtype == F32 else 1e-13)
    if name == "power":
        far[:] = True
    torch.testing.assert_close(ours.double()[far], theirs[far], **tolerance)


@cover_pairs(rule=RULES[1::2], dtype=[F32, F64], group=GROUPS, shared={"shared": True, "each": False})
def test_mining_inside(emulated, rule, dtype, group, shared):
    name, parameter, factor = rule
    sums, wide = make_sums(*group, dtype, "cpu")
    inside = make_inside(*group, shared, "cpu")
    flat = torch.cat([m.expand(3, -1, -1).flatten() for m in reference.split_inside(inside, shared, *group)])
    sums[~flat] = torch.nan
    tolerance = {"rtol": 3e-6 if dtype == F32 else 1e-12, "atol": 1e-6 if dtype == F32 else 1e-13}
    rest = (inside, shared, *group, name, parameter, None, factor)
    loss, state = twice(emulated, lambda ops: ops.mined_loss_inside(sums, *rest))
    expected = reference.mined_loss_inside(wide, *rest)
    for ours, theirs in zip((loss, state), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, equal_nan=True, **tolerance)
    grad, rest = torch.tensor(-1.7, dtype=dtype), (*group, name, parameter, factor)
    (ours,) = twice(emulated, lambda ops: ops.mined_loss_inside_backward(grad, sums, inside, shared, state, *rest))
    theirs = reference.mined_loss_inside_backward(grad.double(), wide, inside, shared, expected[1], *rest)
    far = find_far_points(wide, expected[1], *group, 1e-6 if dtype == F32 else 1e-13)
    if name == "power":
        far[:] = True
    torch.testing.assert_close(ours.double()[far & flat], theirs[far & flat], **tolerance)
    assert not ours[~flat].any()


@pytest.mark.parametrize("points", [1, 37, 1025])
def test_number_of_hard_points(emulated, points):
    sums, _ = make_sums([2], [points], F32, "cpu")
    one = torch.ones(())

    def run(ops, fraction):
        _, state = ops.mined_loss(sums, [2], [points], "hardest", fraction, None, 0.0)
        return ops.mined_loss_backward(one, sums, state, [2], [points], "hardest", 0.0, 0.0)

    for fraction in (1e-9, 0.2, 0.7, 1.0):
        (grad,) = twice(emulated, functools.partial(run, fraction=fraction))
        assert (grad.view(3, -1)[0] != 0).sum() == max(int(2 * points * fraction), 1)


def test_more_pairs_than_a_launch(emulated):
    group = [1 + i % 2 for i in range(35)], [3 + i for i in range(35)]
    sums, wide = make_sums(*group, F32, "cpu")
    for name, parameter, factor in (("deviation", 1.0, 0.0), ("hardest", 0.3, 0.0)):
        loss, state = twice(emulated, lambda ops, n=name, p=parameter: ops.mined_loss(sums, *group, n, p, None, 0.0))
        expected, expected_state = reference.mined_loss(wide, *group, name, parameter, None, factor)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(state.double(), expected_state, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("images", [2, 5])
def test_map(emulated, images):
    """One image per block or several, depending on the number of multiprocessors."""
    distances, rows, cols = make_anomaly_map_arguments([(13, 7), (5, 9)], (40, 37), images, "cpu")
    expected, highest = reference.anomaly_map(*([t.double() for t in ts] for ts in (distances, rows, cols)), 0.5)
    for processors in (1, 132):
        maps, maximum = twice(emulated, lambda ops: ops.anomaly_map(distances, rows, cols, 0.5), processors)
        torch.testing.assert_close(maps.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(maximum.double(), highest, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_maximum_of_a_map_that_is_not_finite_is_nan(emulated, value):
    distances, rows, cols = make_anomaly_map_arguments([(13, 7), (5, 9)], (40, 37), 5, "cpu")
    distances[1][3, 2, 8] = value
    for processors in (1, 132):
        _, maximum = twice(emulated, lambda ops: ops.anomaly_map(distances, rows, cols, 0.5), processors)
        assert maximum.isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("rule", [RULES[1], RULES[3], RULES[6]], ids=str)
def test_sums_that_overflow_give_nan(emulated, rule):
    name, parameter, factor = rule
    sums, _ = make_sums([2], [37], F32, "cpu")
    sums.view(3, 2, 37)[2, 1, 5] = torch.inf  # <y, y> of one point
    loss, state = twice(emulated, lambda ops: ops.mined_loss(sums, [2], [37], name, parameter, None, factor))
    assert loss.isnan() and state[1:].view(3, 2).isnan().any(0).tolist() == [False, True]
    one = torch.ones(())
    (gradient,) = twice(
        emulated, lambda ops: ops.mined_loss_backward(one, sums, state, [2], [37], name, parameter, factor)
    )
    assert gradient.view(3, 2, 37)[:, 1].isnan().any()


WRONG = """
#include <cstdio>
#include "cuda_runtime.h"

int shared[64];
void race(int* out) {
  shared[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}
void missing(int*) {
  if (threadIdx.x < 3) return;
  __syncthreads();
}
int main() {
  int out[2][64];
  for (int backwards = 0; backwards < 2; ++backwards) {
    emulate(1, backwards);
    std::fill(shared, shared + 64, -1);
    int* to = out[backwards];
    const cudaLaunchConfig_t config{1, 64, nullptr};
    cudaLaunchKernelEx(&config, race, to);
  }
  std::printf(std::equal(out[0], out[0] + 64, out[1]) ? "same " : "other ");
  try {
    int* to = out[0];
    const cudaLaunchConfig_t config{1, 64, nullptr};
    cudaLaunchKernelEx(&config, missing, to);
    std::printf("goes on");
  } catch (const std::runtime_error& error) {
    std::printf("%s", error.what());
  }
}
"""


def test_emulator_detects_errors(tmp_path):
    """Without a barrier, results depend on the order of threads; a barrier that a thread does not reach is an error."""
    source, program = tmp_path / "wrong.cpp", tmp_path / "wrong"
    source.write_text(WRONG)
    include = [f"-I{emulate_cuda.HERE}", "-isystem", f"{torch.__path__[0]}/include"]
    flags = ["-std=c++20", "-U_FORTIFY_SOURCE", *include]
    sources = [source, emulate_cuda.HERE / "traffic.cpp"]
    subprocess.run([emulate_cuda.COMPILER, *flags, *sources, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=True)
    assert done.stdout == "other emulated: threads wait at a barrier that others do not reach"
