"""Values that are not finite, that overflow or that underflow; gradients and dtypes that no kernel has."""

import math

import pytest
import torch
import torch.nn.functional as F
from op_cases import make_anomaly_map_arguments
from torch.utils.checkpoint import checkpoint

from recontrast import ops, reference
from recontrast.anomaly_map import AnomalyMap
from recontrast.loss import global_cosine, hard_mined_cosine, point_cosine, point_distance
from recontrast.mining import deviation, hardest, power

NOT_FINITE = [math.nan, math.inf, -math.inf]
LOSSES = {
    "deviation": lambda x, y: hard_mined_cosine(x, y, deviation(1.0)),
    "hardest": lambda x, y: hard_mined_cosine(x, y, hardest(0.1)),
    "power": lambda x, y: hard_mined_cosine(x, y, power(3.0)),
    "own rule": lambda x, y: hard_mined_cosine(x, y, lambda distances, _: torch.ones_like(distances)),
    "global": global_cosine,
    "point": point_cosine,
}


def make_pair(device="cpu", scale=1.0, other_scale=1.0):
    x = torch.randn(2, 8, 4, 4, device=device) * scale
    return x, (torch.randn(2, 8, 4, 4, device=device) * other_scale).requires_grad_()


# ---- scores of maps that are not finite --------------------------------------


@pytest.mark.parametrize("position", [(0, 0), (3, 40), (69, 68), (31, 64)], ids=str)
@pytest.mark.parametrize("value", NOT_FINITE)
def test_score_of_a_map_that_is_not_finite_is_nan(value, position, device):
    """Positions in a whole vector, in the rest of a row and in another strip; without blur one pixel is hit."""
    distances, rows, cols = make_anomaly_map_arguments([(70, 69)], (70, 69), 3, device, blur=None)
    expected = ops.anomaly_map(distances, rows, cols)[1]
    distances[0][1, position[0], position[1]] = value
    maps, maximum = ops.anomaly_map(distances, rows, cols)
    assert torch.equal(maximum[[0, 2]], expected[[0, 2]])
    assert maximum[1].isnan()
    assert reference.anomaly_map(distances, rows, cols, 1.0)[1].isnan().tolist() == [False, True, False]
    assert not maps[1].isfinite().all()


@pytest.mark.parametrize("method", ["fused", "matmul"])
@pytest.mark.parametrize("how", ["max", "mean", 0.01, 1.0])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_every_score_of_every_method_is_nan(value, how, method):
    amap = AnomalyMap([8, 4], 32, method=method)
    distances = [torch.rand(3, 8, 8), torch.rand(3, 4, 4)]
    distances[1][2, 1, 1] = value
    maps, maximum = amap.from_distances(distances)
    assert maximum.isnan().tolist() == [False, False, True]
    assert amap.score(maps, how).isnan().tolist() == [False, False, True]


def test_scores_of_finite_maps_of_any_size_are_finite():
    amap = AnomalyMap([4], 8)
    for scale in (1e-44, 1.0, 1e36):
        maps = torch.rand(2, 8, 8) * scale
        for how in ("max", 0.1):
            assert amap.score(maps, how).isfinite().all()


# ---- overflow and underflow --------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scales", [(1e20, 1e20), (1.0, 1e20), (1e20, 1.0), (1e-30, 1e25)], ids=str)
def test_loss_of_features_whose_squares_overflow_is_nan(name, scales, device):
    """Infinite norms would give a cosine of 0, which looks like a result."""
    x, y = make_pair(device, *scales)
    assert LOSSES[name](x, y).isnan()
    assert point_distance(x, y).isnan().all()


@pytest.mark.parametrize("scales", [(1e-30, 1e-30), (1e-20, 1.0), (1e-9, 1e-9), (1e15, 1e-15), (1e17, 1e17)], ids=str)
def test_point_distances_of_small_and_large_features(scales, device):
    x, y = make_pair(device, *scales)
    expected = 1 - F.cosine_similarity(x.double(), y.double())
    torch.testing.assert_close(point_distance(x, y).double(), expected, rtol=1e-6, atol=1e-6)
    if scales == (1e-9, 1e-9):  # below EPS, PyTorch differentiates as if it had not clamped the norms
        return
    (ours,) = torch.autograd.grad(point_distance(x, y).sum(), y)
    (theirs,) = torch.autograd.grad((1 - F.cosine_similarity(x.double(), y.double())).sum(), y)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_float64_features_whose_squares_overflow_in_float32_are_right(device):
    if device == "cuda" and ops.BACKEND["cuda"] == "torch":
        pytest.skip("the same code as on the CPU")
    x, y = make_pair(device, 1e20, 1e20)
    expected = 1 - F.cosine_similarity(x.double(), y.double())
    torch.testing.assert_close(point_distance(x.double(), y.double()), expected)


# ---- derivatives that do not exist -------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivative_raises(name, device):
    x, y = make_pair(device)
    (gradient,) = torch.autograd.grad(LOSSES[name](x, y), y, create_graph=True)
    with pytest.raises(RuntimeError, match="has no gradient: the losses can be differentiated once, not twice"):
        torch.autograd.grad(gradient.square().sum(), y)


def test_second_derivative_of_the_teacher_raises(device):
    x, y = make_pair(device)
    x.requires_grad_()
    loss = hard_mined_cosine(x, y, deviation(1.0), stop_gradient=False)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize("name", ["cosine_sums_backward", "cosine_sums_group_backward", "mined_loss_backward"])
def test_gradient_of_each_backward_operator_raises(name, device):
    x, y = make_pair(device)
    sums = ops.cosine_sums_group([x], [y]).detach().requires_grad_()
    state = torch.ops.recontrast.mined_loss(sums.detach(), [2], [16], "power", 3.0, None, 1.0)[1]
    one = torch.ones((), device=device, requires_grad=True)
    results = {
        "cosine_sums_backward": lambda: torch.ops.recontrast.cosine_sums_backward(sums.view(3, 2, 4, 4), x, y),
        "cosine_sums_group_backward": lambda: torch.ops.recontrast.cosine_sums_group_backward(sums, [x], [y])[0],
        "mined_loss_backward": lambda: torch.ops.recontrast.mined_loss_backward(
            one, sums, state, [2], [16], "power", 3.0, 1.0
        ),
    }
    with pytest.raises(RuntimeError, match=f"recontrast::{name} has no gradient"):
        results[name]().sum().backward()


def test_second_derivative_raises_when_compiled_or_checkpointed():
    x, y = make_pair()
    compiled = torch.compile(LOSSES["deviation"], backend="aot_eager")

    def compute_with_checkpoint(x, y):
        return checkpoint(LOSSES["deviation"], x, y, use_reentrant=False)

    for loss in (compiled, compute_with_checkpoint):
        with pytest.raises(RuntimeError):
            (gradient,) = torch.autograd.grad(loss(x, y), y, create_graph=True)
            torch.autograd.grad(gradient.square().sum(), y)


def test_gradient_of_the_fused_map_raises(device):
    distances, rows, cols = make_anomaly_map_arguments([(4, 4)], (8, 8), 1, device)
    distances[0].requires_grad_()
    with pytest.raises(RuntimeError, match='AnomalyMap\\(method="matmul"\\) is differentiable'):
        ops.anomaly_map(distances, rows, cols)[0].sum().backward()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # from PyTorch itself
def test_forward_mode_raises():
    x, y = make_pair()
    for loss in LOSSES.values():
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.func.jvp(lambda student, loss=loss: loss(x, student), (y.detach(),), (torch.ones_like(x),))


# ---- dtypes ------------------------------------------------------------------

WITHOUT_KERNEL = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int32, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("dtype", WITHOUT_KERNEL, ids=str)
def test_dtypes_without_a_kernel_are_refused(dtype, device):
    x, y = (torch.rand(1, 4, 2, 2, device=device).to(dtype) for _ in "xy")
    refusal = r"wanted float16, bfloat16, float32 or float64, got \S+( and \S+)?$"
    calls = [lambda loss=loss: loss(x, y) for loss in LOSSES.values()]
    calls += [lambda: ops.cosine_sums(x, torch.ones_like(x, dtype=torch.float32))]
    calls += [lambda: ops.cosine_sums(torch.ones_like(x, dtype=torch.float32), x)]
    calls += [lambda: AnomalyMap([2], 4)([(x, y)]), lambda: AnomalyMap([2], 4).from_distances([x[0]])]
    calls += [lambda how=how: AnomalyMap([2], 4).score(x[0], how) for how in ("max", "mean", 0.5)]
    for call in calls:
        with pytest.raises(ValueError, match=refusal):
            call()


@pytest.mark.parametrize("dtype", WITHOUT_KERNEL, ids=str)
def test_native_kernels_check_dtypes_themselves(dtype, device):
    if ops.BACKEND[device] != "native":
        pytest.skip("no compiled kernels")
    x = torch.rand(1, 4, 2, 2, device=device).to(dtype)
    with pytest.raises(RuntimeError, match="x and y: wanted float16, bfloat16, float32 or float64, got "):
        torch.ops.recontrast.cosine_sums(x, x)
    with pytest.raises(RuntimeError, match="x and y: wanted float16, bfloat16, float32 or float64, got "):
        torch.ops.recontrast.cosine_sums_backward(torch.zeros(3, 1, 2, 2, device=device), x, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_alpha_of_any_floating_dtype(dtype, device):
    x, y = make_pair(device)
    alpha = torch.tensor(0.5, dtype=dtype, device=device)
    losses = [hard_mined_cosine(x, y, deviation(a, factor=0.25)) for a in (0.5, alpha)]
    ours, theirs = (torch.autograd.grad(loss, y)[0] for loss in losses)
    assert torch.equal(*losses)
    assert torch.equal(ours, theirs)


def test_complex_alpha_is_refused():
    with pytest.raises(ValueError, match=r"deviation: alpha: wanted a real number, got a tensor of torch\.complex64"):
        deviation(torch.tensor(1j))
