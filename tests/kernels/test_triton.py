"""The Triton kernels against the float64 oracle: on a GPU if there is one, else in Triton's interpreter.

conftest.py enables the interpreter before triton is imported. There is no importorskip: the test extra installs Triton.
"""

import collections
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
from op_cases import GROUPS, RULES, find_far_points, make_inside, make_sums
from pairs import cover_pairs

from recontrast import reference
from recontrast.kernels import anomaly_map, autotune, cosine_sums, mined_loss

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [(F32, F32), (F64, F64), (BF16, BF16), (F16, F16), (BF16, F32), (F32, F16), (F64, BF16)]
ROUNDING = {
    F64: 1e-14,
    F32: 1e-6,
    F16: 1e-3,
    BF16: 8e-3,
}  # relative; the interpreter truncates to bfloat16
ODD = (3, 5, 7, 13)
SHAPES = [(2, 64, 8, 8), (1, 1, 1, 1), (2, 40, 4, 4), (2, 3, 1, 9), (2, 130, 5, 1)]


@pytest.fixture(autouse=True)
def _first_configuration(monkeypatch):
    """One configuration per kernel, as in the interpreter: compiling and timing all of them takes minutes on a GPU."""
    for name, kernel in (("_sums_of", cosine_sums._sums), ("_gradient_of", cosine_sums._gradient)):
        first = {
            "planes": autotune.Untuned(kernel, cosine_sums.PLANES),
            "rows": autotune.Untuned(kernel, cosine_sums.ROWS),
        }
        monkeypatch.setattr(cosine_sums, name, first)
    monkeypatch.setattr(anomaly_map, "_tuned_tile", autotune.Untuned(anomaly_map._compute_tile, anomaly_map.CONFIGS))


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


def cut(t, dim):
    """``t`` as the second half of a tensor whose first half is NaN."""
    return torch.cat([t * math.nan, t], dim).narrow(dim, t.shape[dim], t.shape[dim])


LAYOUTS = {
    "nchw": lambda t: t,
    "channels_last": channels_last,
    "batch_slice": lambda t: cut(t, 0),
    "channel_slice": lambda t: cut(t, 1),
    "channels_last_channel_slice": lambda t: channels_last(torch.cat([t * math.nan, t], 1))[:, t.shape[1] :],
    "transposed": lambda t: t.mT.contiguous().mT,
}


def features(shape, dtype, layout="nchw"):
    return LAYOUTS[layout](torch.randn(shape, device=DEVICE).to(dtype))


def assert_near(ours, oracle, rounding, terms=None):
    """Compare the norm of the error with that of the float64 oracle, or of ``terms`` if they cancel in the oracle."""
    assert ours.shape == oracle.shape
    terms = oracle if terms is None else terms
    assert (ours.double() - oracle).norm() <= rounding * terms.norm().clamp_min(1e-30)


def check_cosine(x, y):
    sums = cosine_sums.cosine_sums(x, y)
    dtype = reference.sum_dtype(x, y)
    assert sums.dtype == dtype
    assert_near(sums, reference.cosine_sums(x.double(), y.double()), ROUNDING[dtype])
    grad = torch.randn_like(sums)
    dy = cosine_sums.cosine_sums_backward(grad, x, y)
    assert dy.dtype == y.dtype
    assert dy.stride() == torch.empty_like(y).stride()
    doubles = [t.double() for t in (grad, x, y)]
    terms = reference.cosine_sums_backward(*(t.abs() for t in doubles))
    assert_near(dy, reference.cosine_sums_backward(*doubles), max(ROUNDING[y.dtype], ROUNDING[dtype]), terms)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: f"{pair[0]}-{pair[1]}".replace("torch.", ""))
def test_cosine_by_dtype_and_layout(dtypes, layout):
    check_cosine(*(features(ODD, dtype, layout) for dtype in dtypes))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cosine_by_shape(shape, layout):
    check_cosine(features(shape, F32, layout), features(shape, F32, layout))


@pytest.mark.parametrize(
    "layouts", [("nchw", "channels_last"), ("channels_last", "channel_slice"), ("transposed", "nchw")]
)
def test_cosine_of_two_layouts(layouts):
    check_cosine(*(features((2, 40, 5, 3), F32, layout) for layout in layouts))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_points_of_weight_zero(layout):
    shape = (2, 20, 6, 7)
    keep = torch.rand(2, 1, 6, 7, device=DEVICE) < 0.2
    x, y = (torch.randn(shape, device=DEVICE) for _ in "xy")
    grad = torch.randn(3, 2, 6, 7, device=DEVICE) * keep[:, 0]
    broken = [LAYOUTS[layout](torch.where(keep, t, math.nan)) for t in (x, y)]
    dy = cosine_sums.cosine_sums_backward(grad, *broken)
    assert (dy[~keep.expand(shape)] == 0).all()
    assert_near(dy, reference.cosine_sums_backward(grad.double(), x.double(), y.double()), ROUNDING[F32])


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", [F32, F64, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1024, 2, 2), (1, 515, 1, 3), (2, 259, 1, 1)], ids=str)
def test_programs_split_the_channels_of_few_positions(shape, dtype, layout, monkeypatch):
    """As on a GPU with 132 multiprocessors."""
    monkeypatch.setattr(cosine_sums, "processors", lambda device: 132)
    x, y = features(shape, dtype, layout), features(shape, dtype, layout)
    assert cosine_sums.parts_of(x.device, [x]) == shape[1] // cosine_sums.LEAST
    check_cosine(x, y)


def test_programs_split_the_channels_of_all_kinds_of_pairs(monkeypatch):
    monkeypatch.setattr(cosine_sums, "processors", lambda device: 132)
    x, y = ([features(s, F32) for s in [(1, 600, 2, 2), (1, 3, 2, 3), (2, 0, 3, 3), (0, 3, 4, 5)]] for _ in "xy")
    x, y = [*x, features(ODD, BF16, "channels_last")], [*y, features(ODD, F32, "channels_last")]
    assert cosine_sums.parts_of(x[0].device, x) == 4
    wide = [[t.double() for t in ts] for ts in (x, y)]
    assert_near(cosine_sums.cosine_sums_group(x, y), reference.cosine_sums_group(*wide), ROUNDING[F32])
    monkeypatch.setattr(cosine_sums, "processors", lambda device: 1)
    assert cosine_sums.parts_of(x[0].device, x) == 1


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)], ids=str)
def test_cosine_of_empty_features(shape):
    x, y = features(shape, F32), features(shape, BF16)
    sums = cosine_sums.cosine_sums(x, y)
    assert sums.shape == (3, shape[0], *shape[2:])
    assert (sums == 0).all()
    assert cosine_sums.cosine_sums_backward(sums, x, y).shape == shape


def test_group_of_mixed_pairs():
    """All layouts and several dtypes in one call, more pairs than fit into one launch, empty pairs."""
    shapes = [(1, 3, 2, 2)] * 17 + [(2, 40, 5, 3), (0, 3, 4, 5), (2, 0, 3, 3), (2, 3, 0, 5)]
    x, y = ([features(shape, F32) for shape in shapes] for _ in "xy")
    for layout in LAYOUTS:
        x, y = [*x, features(ODD, BF16, layout)], [*y, features(ODD, F32, layout)]
    for _ in range(2):
        sums = cosine_sums.cosine_sums_group(x, y)
        wide = [[t.double() for t in ts] for ts in (x, y)]
        assert sums.dtype == reference.group_dtype(x, y)
        assert_near(sums, reference.cosine_sums_group(*wide), ROUNDING[F32])
        grad = torch.randn_like(sums)
        theirs = reference.cosine_sums_group_backward(grad.double(), *wide)
        for dy, t, expected in zip(cosine_sums.cosine_sums_group_backward(grad, x, y), y, theirs, strict=True):
            assert (dy.dtype, dy.stride()) == (t.dtype, torch.empty_like(t).stride())
            assert_near(dy, expected, 5e-6)
        x[0] = x[0].double()  # all sums are now in float64


# ---- mining ------------------------------------------------------------------


@cover_pairs(rule=RULES[1:4] + RULES[5:], dtype=[F32, F64], group=GROUPS)
def test_mining(rule, dtype, group):
    name, parameter, factor = rule
    sums, wide = make_sums(*group, dtype, DEVICE)
    tolerance = {"rtol": 3e-6 if dtype == F32 else 1e-12, "atol": 1e-6 if dtype == F32 else 1e-13}
    alpha = torch.tensor(parameter, dtype=dtype, device=DEVICE) if name == "deviation" and factor else None
    loss, state = mined_loss.mined_loss(sums, *group, name, parameter, alpha, factor)
    expected = reference.mined_loss(wide, *group, name, parameter, None, factor)
    for ours, theirs in zip((loss, state), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, equal_nan=True, **tolerance)
    grad = torch.tensor(-1.7, dtype=dtype, device=DEVICE)
    ours = mined_loss.mined_loss_backward(grad, sums, state, *group, name, parameter, factor)
    theirs = reference.mined_loss_backward(grad.double(), wide, expected[1], *group, name, parameter, factor)
    far = find_far_points(wide, expected[1], *group, 1e-6 if dtype == F32 else 1e-13)
    if name == "power":
        far[:] = True
    torch.testing.assert_close(ours.double()[far], theirs[far], **tolerance)


@cover_pairs(
    rule=[RULES[1], RULES[3], RULES[5], RULES[6]],
    dtype=[F32, F64],
    group={"odd": GROUPS["odd"], "empty": GROUPS["empty"], "levels": ([4, 4], [256, 64])},
    shared={"shared": True, "each": False},
)
def test_mining_inside(rule, dtype, group, shared):
    name, parameter, factor = rule
    sums, wide = make_sums(*group, dtype, DEVICE)
    inside = make_inside(*group, shared, DEVICE)
    flat = torch.cat([m.expand(3, -1, -1).flatten() for m in reference.split_inside(inside, shared, *group)])
    sums[~flat] = 1e30  # whatever lies outside; the interpreter warns of NaN
    tolerance = {"rtol": 3e-6 if dtype == F32 else 1e-12, "atol": 1e-6 if dtype == F32 else 1e-13}
    rest = (inside, shared, *group, name, parameter, None, factor)
    loss, state = mined_loss.mined_loss_inside(sums, *rest)
    expected = reference.mined_loss_inside(wide, *rest)
    for ours, theirs in zip((loss, state), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, equal_nan=True, **tolerance)
    grad, rest = torch.tensor(-1.7, dtype=dtype, device=DEVICE), (*group, name, parameter, factor)
    ours = mined_loss.mined_loss_inside_backward(grad, sums, inside, shared, state, *rest)
    theirs = reference.mined_loss_inside_backward(grad.double(), wide, inside, shared, expected[1], *rest)
    far = find_far_points(wide, expected[1], *group, 1e-6 if dtype == F32 else 1e-13)
    if name == "power":
        far[:] = True
    torch.testing.assert_close(ours.double()[far & flat], theirs[far & flat], **tolerance)
    assert not ours[~flat].any()


@pytest.mark.parametrize("rule", [RULES[1], RULES[3], RULES[6]], ids=str)
def test_no_kernel_reads_memory_that_none_wrote(rule, monkeypatch):
    """New memory holds infinities and signalling NaN, from which NumPy computes only with a warning, an error here."""
    name, parameter, factor = rule
    sums, _ = make_sums([3, 1, 2], [91, 1, 1300], F32, DEVICE)
    expected = mined_loss.mined_loss(sums, [3, 1, 2], [91, 1, 1300], name, parameter, None, factor)
    garbage = torch.tensor([0x7F800000, 0x7FA00000, -0x00800000, 0x7FA00000], dtype=torch.int32, device=DEVICE)
    new_empty = torch.Tensor.new_empty

    def new_garbage(self, *args, **kwargs):
        memory = new_empty(self, *args, **kwargs)
        if memory.dtype == F32:
            bits = memory.view(-1).view(torch.int32)
            bits.copy_(garbage.repeat(bits.numel() // 4 + 1)[: bits.numel()])
        return memory

    monkeypatch.setattr(torch.Tensor, "new_empty", new_garbage)
    results = mined_loss.mined_loss(sums, [3, 1, 2], [91, 1, 1300], name, parameter, None, factor)
    for ours, theirs in zip(results, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(GPU, reason="THE INTERPRETER COUNTS")
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_equal_distances_do_not_queue(dtype, monkeypatch):
    """Points of dead features all have one distance, and additions to one counter wait for each other."""
    builder = type(triton.runtime.interpreter.interpreter_builder)
    original, counts = builder.create_atomic_rmw, collections.Counter()

    def count(self, operation, pointers, values, mask, *rest):
        counts.update(np.atleast_1d(pointers.data)[np.atleast_1d(mask.data)].tolist())
        return original(self, operation, pointers, values, mask, *rest)

    monkeypatch.setattr(builder, "create_atomic_rmw", count)
    points, programs = 4096, 4
    sums = torch.zeros(3 * points, dtype=dtype)  # distance 1
    sums[:128] = sums[points : points + 128] = sums[2 * points : 2 * points + 128] = 1.0  # distance 0
    _, state = mined_loss.mined_loss(sums, [1], [points], "hardest", 0.5, None, 0.0)
    assert state[0] == 1
    assert counts
    assert max(counts.values()) <= programs


@pytest.mark.parametrize("points", [1, 37, 1025])
def test_number_of_hard_points(points):
    sums, _ = make_sums([2], [points], F32, DEVICE)
    one = torch.ones((), device=DEVICE)
    for fraction in (1e-9, 0.2, 0.7, 1.0):
        _, state = mined_loss.mined_loss(sums, [2], [points], "hardest", fraction, None, 0.0)
        grad = mined_loss.mined_loss_backward(one, sums, state, [2], [points], "hardest", fraction, 0.0)
        assert (grad.view(3, -1)[0] != 0).sum() == max(int(2 * points * fraction), 1)


# ---- the map -----------------------------------------------------------------


def band(out, size, radius):
    """(out, size): weights that fall linearly to zero at ``radius`` cells from the diagonal."""
    at = torch.linspace(0, size - 1, out, device=DEVICE)[:, None]
    return (1 - (torch.arange(size, device=DEVICE) - at).abs() / radius).clamp_min(0)


def matrices(out, sizes, radius=2.5):
    rows = [band(out[0], h, radius) for h, _ in sizes]
    cols = [band(out[1], w, radius) for _, w in sizes]
    return rows, cols


def check_map(distances, rows, cols, scale=1.0):
    maps, maximum = anomaly_map.anomaly_map(distances, rows, cols, scale)
    doubles = [[t.double() for t in tensors] for tensors in (distances, rows, cols)]
    oracle, _ = reference.anomaly_map(*doubles, scale)
    assert maps.dtype == rows[0].dtype
    assert_near(maps, oracle, ROUNDING[F32])
    torch.testing.assert_close(maximum, maps.amax((1, 2)), rtol=0, atol=0)


SIZES = [(24, 20), (12, 10), (3, 5)]


@pytest.mark.parametrize("pairs", [(0,), (0, 1, 2), (0, 1, 0, 1), (0, 1, 2, 0)], ids=str)
def test_map(pairs):
    rows, cols = matrices((70, 48), SIZES)  # 70: a second tile with few rows
    distances = [torch.rand(2, *SIZES[i], device=DEVICE) for i in pairs]
    check_map(distances, [rows[i] for i in pairs], [cols[i] for i in pairs], 1 / len(pairs))


@pytest.mark.parametrize("kind", ["dense", "zero", "negative", "transposed"])
def test_map_of_unusual_values(kind):
    rows, cols = matrices((20, 33), [(40, 17)], radius=99 if kind == "dense" else 3)
    distances = torch.rand(3, 40, 17, device=DEVICE)
    if kind == "zero":
        rows = [torch.zeros_like(rows[0])]
    if kind == "negative":
        distances = -distances - 1
    if kind == "transposed":
        distances, rows, cols = distances.mT.contiguous().mT, [rows[0].T.contiguous().T], [cols[0].T.contiguous().T]
    check_map([distances], rows, cols)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_maximum_of_a_map_that_is_not_finite_is_nan(value):
    rows, cols = matrices((8, 8), [(4, 4)])
    distances = torch.rand(2, 4, 4, device=DEVICE)
    distances[1, 2, 2] = value
    with np.errstate(invalid="ignore"):  # the interpreter computes 0 * infinity
        _, maximum = anomaly_map.anomaly_map([distances], rows, cols, 1.0)
    assert maximum.isnan().tolist() == [False, True]


@pytest.mark.parametrize("N, H", [(0, 8), (2, 0)])
def test_empty_map(N, H):
    rows, cols = torch.zeros(H, 4, device=DEVICE), torch.zeros(8, 4, device=DEVICE)
    maps, maximum = anomaly_map.anomaly_map([torch.zeros(N, 4, 4, device=DEVICE)], [rows], [cols], 1.0)
    assert maps.shape == (N, H, 8)
    assert maximum.tolist() == [0.0] * N


# ---- configurations ----------------------------------------------------------


def test_interpreter_uses_one_configuration():
    assert isinstance(autotune.autotuned(cosine_sums._sums, cosine_sums.ROWS, cosine_sums.KEY), autotune.Untuned) != GPU


@pytest.mark.skipif(not GPU, reason="autotuning needs a GPU")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_tuned_kernels(layout, monkeypatch):
    monkeypatch.undo()  # the fixture above
    check_cosine(features((4, 64, 16, 16), F32, layout), features((4, 64, 16, 16), F32, layout))
    rows, cols = matrices((64, 64), SIZES)
    check_map([torch.rand(2, *size, device=DEVICE) for size in SIZES], rows, cols)


# Compiles for an absent GPU: launches only compile, and autotuning takes the first configuration.
COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from recontrast.kernels import autotune

class NoGPU:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", int(sys.argv[1]), 32))
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)

def compiled(self, grid):
    return lambda *args, **kwargs: print(self.fn.__name__, self.warmup(*args, grid=(1,), **kwargs).metadata.target.arch)

driver.set_active(NoGPU)
triton.JITFunction.__getitem__ = compiled
triton.autotune = lambda configs, key: lambda kernel: autotune.Untuned(kernel, configs)
from recontrast.kernels import anomaly_map, cosine_sums, mined_loss

for dtype in torch.float32, torch.bfloat16:
    for layout in torch.contiguous_format, torch.channels_last:
        x = torch.zeros(2, 64, 16, 16, dtype=dtype).contiguous(memory_format=layout)
        small = x[..., :4, :4].clone(memory_format=layout)
        sums = cosine_sums.cosine_sums_group([x, small], [x, small])
        cosine_sums.cosine_sums_group_backward(sums, [x, small], [x, small])
cosine_sums.processors = lambda device: 132
for layout in torch.contiguous_format, torch.channels_last:
    few = torch.zeros(1, 1024, 4, 4).contiguous(memory_format=layout)
    cosine_sums.cosine_sums(few, few)
for rule in mined_loss.RULES:
    for alpha in [torch.zeros(()), None][rule != "deviation" :]:
        loss, state = mined_loss.mined_loss(torch.zeros(630), [2, 1], [64, 82], rule, 1.0, alpha, 0.0)
        mined_loss.mined_loss_backward(loss, torch.zeros(630), state, [2, 1], [64, 82], rule, 1.0, 0.0)
mined_loss.mined_loss(torch.zeros(630, dtype=torch.float64), [2, 1], [64, 82], "hardest", 1.0, None, 0.0)
matrices = [torch.zeros(256, size) for size in (64, 32, 16)] * 2
anomaly_map.anomaly_map([torch.zeros(2, size, size) for size in (64, 32, 16)] * 2, matrices, matrices, 1.0)
"""


def test_kernels_compile(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "error", "-c", COMPILE, "90"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    digit = ["_count_digits", "_select_digit"]
    forward_hardest = [
        ["_summarise_pieces", "_select_digit", *digit * (digits - 1), "_combine_pieces"] for digits in (2, 5)
    ]
    forward, backward = ["_summarise_pieces", "_combine_pieces"], ["_gradient"]
    names = (
        ["_sums", "_gradient"] * 4
        + ["_sums"] * 2
        + (forward + backward) * 2  # deviation, with alpha and without
        + forward_hardest[0]
        + backward
        + forward
        + backward
        + forward_hardest[1]  # float64
        + ["_find_bands", "_compute_tile"]
    )
    assert run.stdout.splitlines() == [f"{name} 90" for name in names]
