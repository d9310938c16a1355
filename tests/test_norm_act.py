"""The norm_act operator equals the layers of PyTorch in float64 on every available device."""

import pytest
import torch
import torch.nn.functional as F
from norm_act_cases import SHAPES, VARIANTS, far_from_zero, make_arguments, restate
from op_cases import DTYPES, LAYOUTS, ROUNDING, relative_error

from recontrast import ops, reference
from recontrast.ops import norm_act

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
LAYOUT_NAMES = [name for name in LAYOUTS if name != "broadcast over the batch"]


def check(arguments, act, *, operator=norm_act):
    x, residual, weight, bias, mean, var = arguments
    tolerance = max(3 * ROUNDING[x.dtype], 3e-6 if x.dtype == F32 else 0)
    leaves = [t for t in (x, residual, weight, bias) if t is not None]
    for t in leaves:
        t.requires_grad_()
    y, moments = operator(x, residual, weight, bias, mean=mean, var=var, act=act)
    assert y.dtype == x.dtype and y.stride() == torch.empty_like(x).stride()
    grad = torch.randn_like(y)
    if act == "relu":  # where rounding decides on the sign, there is no gradient to compare
        grad = (grad * far_from_zero(*arguments, 10 * tolerance).to(grad)).to(x.dtype)
    gradients = torch.autograd.grad(y, leaves, grad)
    expected, wide_gradients = restate(*arguments, act, grad)
    assert relative_error(y, expected) < tolerance
    for ours, theirs, t in zip(gradients, [g for g in wide_gradients if g is not None], leaves, strict=True):
        assert ours.dtype == t.dtype and ours.shape == t.shape
        assert relative_error(ours, theirs) < (2 if t.dim() == 4 else 10) * tolerance  # sums may cancel
    wide = x.detach().double()
    if mean is None:
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    scale = (var.sqrt() + 1e-3).cpu()
    error = (moments.double().cpu() - torch.stack([mean, var]).cpu()).abs()
    assert (error[0] <= 1e-5 * scale + 3e-7 * mean.abs().cpu()).all()
    assert (error[1] <= 2e-5 * (var.cpu() + 1e-3)).all()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_equals_float64(variant, dtype, layout, device):
    act, has_residual, training = variant
    for shape in SHAPES:
        check(make_arguments(shape, dtype, layout, has_residual=has_residual, training=training, device=device), act)


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("variant", [("relu", True, True), ("gelu", False, False), ("none", True, False)], ids=str)
def test_layouts(variant, dtype, layout, device):
    act, has_residual, training = variant
    for shape in [(2, 8, 4, 6), (3, 5, 7, 13)]:
        check(make_arguments(shape, dtype, layout, has_residual=has_residual, training=training, device=device), act)


@pytest.mark.parametrize("layouts", [("nchw", "channels_last"), ("channels_last", "transposed")], ids=str)
def test_mixed_layouts(layouts, device):
    x, residual, *rest = make_arguments((2, 40, 9, 11), F32, has_residual=True, device=device)
    check((LAYOUTS[layouts[0]](x), LAYOUTS[layouts[1]](residual), *rest), "relu")


def test_expanded_input(device):
    x, _, *rest = make_arguments((3, 5, 7, 13), F32, device=device)
    y, _ = norm_act(x[:1].expand(x.shape), None, *rest[:2], act="relu")
    expected, _ = norm_act(x[:1].repeat(3, 1, 1, 1), None, *rest[:2], act="relu")
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("variant", [("relu", False, True), ("relu", True, False), ("gelu", False, True)], ids=str)
def test_large_results_are_written_completely(variant, dtype, layout, device):
    """Large results use recycled memory, and pass by the caches."""
    act, has_residual, training = variant
    for shape in [(4, 72, 180, 180), (3, 65, 64, 66)]:
        check(make_arguments(shape, dtype, layout, has_residual=has_residual, training=training, device=device), act)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_mean_far_from_zero_does_not_cancel(layout, device):
    """``E[x^2] - E[x]^2`` in float32 would give a variance of zero or less."""
    x = LAYOUTS[layout](torch.randn(4, 6, 33, 35) + 1e4).to(device)
    _, moments = norm_act(x)
    torch.testing.assert_close(
        moments[1].double().cpu(), x.double().cpu().var((0, 2, 3), correction=0), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_mean_that_changes_along_the_positions_does_not_cancel(layout, device):
    """Each part is centred on the mean of those before it, which may be far from its own."""
    x = torch.randn(3, 40, 61, 67)
    x[:, ::2, 30:] += 1e3
    x[1:, 1::2] -= 1e4
    x[:1, :, 0, :3] += 1e4
    _, moments = norm_act(LAYOUTS[layout](x).to(device))
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(moments[1].double().cpu(), var, rtol=1e-5, atol=0)
    assert ((moments[0].double().cpu() - mean).abs() <= 1e-6 * var.sqrt()).all()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
def test_bfloat16_is_float32_rounded_to_the_nearest(act, layout):
    """On a CPU: every number has the parameters of its channel, and ties go to even."""
    for shape in [(2, 64, 5, 7), (3, 97, 4, 9), (1, 31, 3, 3), (2, 1, 40, 41)]:
        x, residual, weight, bias, mean, var = make_arguments(shape, BF16, layout, has_residual=True, training=False)
        for added in (None, residual):
            y, _ = norm_act(x, added, weight, bias, mean=mean, var=var, act=act if added is None else "none")
            wide, _ = norm_act(x.float(), None, weight, bias, mean=mean, var=var, act=act if added is None else "none")
            expected = wide if added is None else wide.bfloat16().float() + added.float()
            assert torch.equal(y, expected.bfloat16())


def test_weights_of_other_dtypes(device):
    for dtype in DTYPES:
        x, _, weight, bias, *_ = make_arguments((2, 6, 5, 4), F32, device=device)
        weight, bias = weight.to(dtype).requires_grad_(), bias.to(dtype).requires_grad_()
        y, _ = norm_act(x, None, weight, bias)
        y.sum().backward()
        assert weight.grad.dtype == dtype and bias.grad.dtype == dtype
        assert relative_error(y, F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True)) < 1e-5
    y, _ = norm_act(x)
    assert relative_error(y, F.batch_norm(x.double(), None, None, None, None, True)) < 1e-5


def test_number_of_threads_does_not_change_the_result():
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            torch.manual_seed(1)
            results.append([])
            for layout in ("nchw", "channels_last"):
                x, residual, weight, bias, *_ = make_arguments((3, 130, 33, 35), F32, layout, has_residual=True)
                leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
                y, moments = norm_act(*leaves, act="relu")
                results[-1] += [y, moments, *torch.autograd.grad(y, leaves, y.detach() - 1)]
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradient(variant, device):
    act, has_residual, training = variant
    for layout in ("nchw", "channels_last"):
        arguments = make_arguments(
            (2, 3, 4, 5), F64, layout, has_residual=has_residual, training=training, device=device
        )
        x, residual, weight, bias, mean, var = arguments
        leaves = [t.requires_grad_() for t in (x, residual, weight, bias) if t is not None]

        def run(*given, has_residual=has_residual, mean=mean, var=var):
            x, *rest = given
            residual = rest.pop(0) if has_residual else None
            return norm_act(x, residual, *rest, mean=mean, var=var, act=act)[0]

        torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_opcheck(variant, layout, device):
    act, has_residual, training = variant
    arguments = make_arguments((2, 3, 4, 5), F32, layout, has_residual=has_residual, training=training, device=device)
    leaves = [None if t is None else t.requires_grad_() for t in arguments[:4]]
    torch.library.opcheck(torch.ops.recontrast.norm_act.default, (*leaves, *arguments[4:], act, 1e-5))
    x, residual, weight, bias = (None if t is None else t.detach() for t in leaves)
    y, moments = norm_act(x, residual, weight, bias, mean=arguments[4], var=arguments[5], act=act)
    kept = residual if act == "gelu" else y if has_residual and act == "relu" else None
    for wants_x in (True, False):
        inputs = (torch.randn_like(y), x, kept, weight, bias, moments, training, act, 1e-5, wants_x)
        torch.library.opcheck(torch.ops.recontrast.norm_act_backward.default, inputs)


def test_compiles_as_one_graph(device):
    x, residual, weight, bias, *_ = make_arguments((2, 6, 5, 4), F32, has_residual=True, device=device)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    compiled = torch.compile(lambda *t: norm_act(*t, act="relu")[0], fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(
        torch.autograd.grad(compiled(*leaves).square().sum(), leaves),
        torch.autograd.grad(norm_act(*leaves, act="relu")[0].square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_saves_no_more_than_the_stock_layers(device):
    """With ReLU: x and the parameters, where nn.BatchNorm2d and nn.ReLU save x and y; with a residual also y."""
    for has_residual in (False, True):
        x, residual, weight, bias, *_ = make_arguments((4, 8, 9, 9), F32, has_residual=has_residual, device=device)
        sizes = []

        def record(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(record, lambda t: t):
            norm_act(x.requires_grad_(), residual, weight, bias, act="relu")
        sizes.sort(reverse=True)
        assert sizes[: 1 + has_residual] == [x.numel()] * (1 + has_residual)
        assert sum(sizes[1 + has_residual :]) <= 8 * weight.numel()


def check_finite(ours, theirs):
    """The same numbers are finite, and equal; PyTorch's GELU of infinity is NaN or infinite."""
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    torch.testing.assert_close(ours.nan_to_num(0, 0, 0), theirs.nan_to_num(0, 0, 0), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(ops.BACKEND["cpu"] != "native", reason="THE KERNELS WERE NOT COMPILED")
@pytest.mark.parametrize("height, is_pooled", [(128, True), (64, False)])
def test_only_results_of_32_mb_come_from_the_pool(height, is_pooled):
    """Other layers cannot use the memory of the pool. Its blocks begin at multiples of 2 MB."""
    x = torch.randn(8, 64, height, 128, requires_grad=True)
    residual, weight, bias = torch.randn_like(x).requires_grad_(), torch.ones(64), torch.zeros(64)
    y, _ = norm_act(x, residual, weight, bias, act="relu")
    results = [y, *torch.autograd.grad(y, (x, residual), torch.ones_like(y))]
    assert [t.data_ptr() % 2**21 == 0 for t in results] == [is_pooled] * 3


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_values_that_are_not_finite_spread_as_in_the_oracle(variant, value, device):
    act, has_residual, training = variant
    for layout in ("nchw", "channels_last"):
        arguments = make_arguments(
            (2, 20, 4, 5), F32, layout, has_residual=has_residual, training=training, device=device
        )
        arguments[0][1, 3, 2, 2] = value
        y, moments = torch.ops.recontrast.norm_act(*arguments, act, 1e-5)
        expected, expected_moments = reference.norm_act(*arguments, act, 1e-5)
        check_finite(y, expected)
        check_finite(moments, expected_moments)
        kept = arguments[1] if act == "gelu" else y if has_residual and act == "relu" else None
        grad = torch.randn_like(y)
        inputs = (grad, arguments[0], kept, *arguments[2:4], moments, training, act, 1e-5, True)
        for ours, theirs in zip(
            torch.ops.recontrast.norm_act_backward(*inputs), reference.norm_act_backward(*inputs), strict=True
        ):
            check_finite(ours, theirs)


def test_constant_channels(device):
    x = torch.full((2, 3, 4, 5), 7.0, device=device).requires_grad_()
    y, moments = norm_act(x, None, torch.ones(3, device=device), torch.ones(3, device=device))
    assert torch.equal(y, torch.ones_like(y)) and not moments[1].any()
    y.sum().backward()
    assert x.grad.abs().max() < 1e-2


def test_empty_features(device):
    for shape in [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)]:
        x = torch.ones(shape, device=device).requires_grad_()
        y, moments = norm_act(x, None, *torch.ones(2, shape[1], device=device), act="relu")
        assert y.shape == shape and moments.shape == (2, shape[1]) and not moments.any()
        y.sum().backward()
        assert x.grad.shape == shape


ONES = torch.ones(1, 2, 3, 4)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((torch.ones(2, 3),), {}, r"x: wanted \(N, C, H, W\), got \(2, 3\)"),
        ((ONES, torch.ones(1, 2, 3, 5)), {}, "wanted the shape of x"),
        ((ONES, ONES.half()), {}, "residual: wanted the dtype of x, float32, got float16"),
        ((ONES.int(),), {}, "wanted float16, bfloat16, float32 or float64, got int32"),
        ((ONES.to(torch.complex64),), {}, "wanted float16, bfloat16, float32 or float64, got complex64"),
        ((ONES.to(torch.float8_e4m3fn),), {}, "wanted float16, bfloat16, float32 or float64, got float8_e4m3fn"),
        ((ONES, None, torch.ones(3)), {}, r"weight: wanted floating-point \(2,\) on cpu, got float32 \(3,\)"),
        ((ONES, None, torch.ones(2), torch.ones(2).int()), {}, "bias: wanted floating-point"),
        ((ONES,), {"mean": torch.ones(2)}, "mean and var: wanted both or none"),
        ((ONES,), {"act": "silu"}, "act: wanted one of none, relu, gelu, got 'silu'"),
        ((ONES[:, :, :1, :1],), {}, r"Expected more than 1 value per channel when training, got input size"),
    ],
)
def test_invalid_arguments_raise(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        norm_act(*arguments, **options)


def test_kernel_checks_what_guards_memory(device):
    if ops.BACKEND[device] != "native":
        pytest.skip("the oracle is checked by PyTorch")
    x, channels = torch.ones(2, 3, 4, 5, device=device), torch.ones(3, device=device)
    run = torch.ops.recontrast.norm_act
    for arguments in [
        (x, x[..., :4], None, None, None, None, "none", 1e-5),
        (x, None, channels[:2], None, None, None, "none", 1e-5),
        (x, None, None, None, channels, None, "none", 1e-5),
        (x.to(torch.float8_e4m3fn), None, None, None, None, None, "none", 1e-5),
        (x, None, None, None, None, None, "tanh", 1e-5),
    ]:
        with pytest.raises(RuntimeError, match="norm_act"):
            run(*arguments)
    with pytest.raises(RuntimeError, match="moments: wanted"):
        torch.ops.recontrast.norm_act_backward(x, x, None, None, None, channels, True, "none", 1e-5, True)
