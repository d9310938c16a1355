"""Grouped cosine sums and the fused mined loss equal the float64 reference on every available device."""

import math

import pytest
import torch
from op_cases import (
    DTYPES,
    GROUPS,
    LAYOUTS,
    ROUNDING,
    RULES,
    SHAPES,
    find_far_points,
    make_features,
    make_sums,
    relative_error,
)

from recontrast import deviation, hard_mined_cosine, hardest, ops, power, reference
from recontrast.loss import point_distance, point_distances
from recontrast.ops import cosine_sums_group, mined_cosine

group_backward = torch.ops.recontrast.cosine_sums_group_backward


def to_double(ts):
    return [t.detach().double() for t in ts]


def check_group(x, y):
    sums = cosine_sums_group(x, y)
    assert sums.dtype == reference.group_dtype(x, y)
    assert relative_error(sums, reference.cosine_sums_group(to_double(x), to_double(y))) < (
        1e-5 if sums.dtype == torch.float32 else 1e-13
    )
    grad = torch.randn_like(sums)
    points = [t.shape[2] * t.shape[3] for t in y]
    for part in reference.split_pairs(grad, [t.shape[0] for t in y], points):
        part *= torch.rand_like(part[:1]) < 0.4  # most points are easy
    gradients = group_backward(grad, x, y)
    expected = reference.cosine_sums_group_backward(grad.double(), to_double(x), to_double(y))
    for gradient, expected_gradient, t in zip(gradients, expected, y, strict=True):
        assert gradient.dtype == t.dtype
        assert gradient.stride() == torch.empty_like(t).stride()
        assert relative_error(gradient, expected_gradient) < ROUNDING[t.dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_equals_reference(dtype, layout, device):
    check_group(*make_features(SHAPES, dtype, device, layout))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: SIZES THAT FILL ONE WERE NOT TRIED")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_group_of_training_sizes(dtype, layout):
    """As in training and in the benchmarks, where the kernel uses another number of lanes per position."""
    check_group(*make_features([(16, 256, 64, 64), (16, 512, 32, 32), (16, 1024, 16, 16)] * 2, dtype, "cuda", layout))


def test_group_of_mixed_pairs(device):
    """One call with all dtypes, layouts and alignments, and with more pairs than one kernel launch takes."""
    x, y = [], []
    for layout in LAYOUTS:
        for dtypes in [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16,) * 2]:
            for shape in [(2, 8, 4, 4), (3, 5, 7, 13)]:
                a, b = make_features([shape], dtypes[0], device, layout, dtypes[1])
                x, y = x + a, y + b
    check_group(x, y)
    x[3], y[5] = x[3].double(), y[5].double()
    check_group(x, y)


def test_group_with_empty_pairs(device):
    check_group(*make_features([(0, 3, 4, 5), (2, 3, 4, 5), (2, 0, 3, 3), (2, 3, 0, 5)], device=device))


def test_group_equals_each_pair_alone(device):
    x, y = make_features([(2, 64, 16, 16), (2, 40, 5, 3)], device=device, requires_grad=True)
    weights = [torch.randn(3, t.shape[0], *t.shape[2:], device=device) for t in x]
    flat_weights = torch.cat([w.flatten() for w in weights])
    gradients = torch.autograd.grad((cosine_sums_group(x, y) * flat_weights).sum(), [*x, *y])
    total = sum((ops.cosine_sums(a, b) * w).sum() for a, b, w in zip(x, y, weights, strict=True))
    for a, b in zip(gradients, torch.autograd.grad(total, [*x, *y]), strict=True):
        torch.testing.assert_close(a, b)


def test_point_distances_equal_each_pair_alone(device):
    x, y = make_features([(2, 64, 16, 16), (0, 3, 2, 2), (2, 40, 5, 3)], torch.bfloat16, device)
    distances = point_distances(list(zip(x, y, strict=True)))
    for d, a, b in zip(distances, x, y, strict=True):
        assert d.shape == (a.shape[0], *a.shape[2:])
        torch.testing.assert_close(d, point_distance(a, b))


def test_group_gradient(device):
    x, y = make_features([(2, 3, 2, 2), (1, 2, 1, 3)], torch.float64, device, requires_grad=True)
    torch.autograd.gradcheck(lambda *t: cosine_sums_group(t[:2], t[2:]), (*x, *y))


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_mined_loss_equals_reference(rule, dtype, group, device):
    name, parameter, factor = rule
    sums, wide = make_sums(*group, dtype, device)
    tolerance = {"rtol": 3e-6 if dtype == torch.float32 else 1e-12, "atol": 1e-6 if dtype == torch.float32 else 1e-13}
    loss, state = torch.ops.recontrast.mined_loss(sums, *group, name, parameter, None, factor)
    expected, expected_state = reference.mined_loss(wide, *group, name, parameter, None, factor)
    torch.testing.assert_close(loss.double(), expected, equal_nan=True, **tolerance)
    torch.testing.assert_close(state.double(), expected_state, equal_nan=True, **tolerance)
    grad = torch.tensor(-1.7, dtype=dtype, device=device)
    gradient = torch.ops.recontrast.mined_loss_backward(grad, sums, state, *group, name, parameter, factor)
    expected_gradient = reference.mined_loss_backward(
        grad.double(), wide, expected_state, *group, name, parameter, factor
    )
    far = find_far_points(wide, expected_state, *group, 1e-6 if dtype == torch.float32 else 1e-13)
    if name == "power":
        far[:] = True
    assert far.double().mean() > 0.9 or wide.numel() < 300
    torch.testing.assert_close(gradient.double()[far], expected_gradient[far], **tolerance)


@pytest.mark.parametrize("rule", RULES[:5], ids=str)
def test_hardest_points_keep_their_weight(rule, device):
    """The threshold can equal a distance, so that forward and backward must compute bit-identical distances."""
    name, parameter, factor = rule
    sums, _ = make_sums([3], [37], torch.float32, device)
    _, state = torch.ops.recontrast.mined_loss(sums, [3], [37], name, parameter, None, factor)
    d = 1 - reference.cosine(sums.cpu().view(3, -1))
    grad = torch.ops.recontrast.mined_loss_backward(
        torch.ones((), device=device), sums, state, [3], [37], name, parameter, 0.0
    )
    hard = (grad.view(3, -1)[0] != 0).cpu()
    if name == "hardest":
        assert hard.sum() == max(int(d.numel() * parameter), 1)
        assert d[hard].min() >= d[~hard].max() if (~hard).any() else True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_alpha_on_the_device(dtype, device):
    group = ([2, 3], [50, 20])
    sums, _ = make_sums(*group, torch.float32, device)
    alpha = torch.tensor(0.75, dtype=dtype, device=device)
    for value in (0.75, -1.0):
        alpha.fill_(value)
        with_tensor = torch.ops.recontrast.mined_loss(sums, *group, "deviation", 0.0, alpha, 0.0)
        with_number = torch.ops.recontrast.mined_loss(sums, *group, "deviation", value, None, 0.0)
        assert all(torch.equal(a, b) for a, b in zip(with_tensor, with_number, strict=True))


def test_number_of_threads_does_not_change_the_result():
    threads = torch.get_num_threads()
    sums, _ = make_sums([9, 7], [331, 64], torch.float32, "cpu")
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(torch.ops.recontrast.mined_loss(sums, [9, 7], [331, 64], "deviation", 1.0, None, 0.0))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


def test_nan_features_give_a_nan_loss(device):
    sums, _ = make_sums([2], [30], torch.float32, device)
    sums[7] = math.nan
    for name, parameter, factor in RULES:
        loss, _ = torch.ops.recontrast.mined_loss(sums, [2], [30], name, parameter, None, factor)
        assert loss.isnan()


# ---- hard_mined_cosine ----------------------------------------------------------


class Unfused:
    """Wrap a rule in a class that the kernels do not know."""

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, distances, all_distances):
        return self.rule(distances, all_distances)


LEVELS = [(4, 16, 8, 8), (4, 32, 4, 4), (4, 64, 2, 3)]


@pytest.mark.parametrize("stop", [True, False], ids=["stopped", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", [deviation(0.3, 0.2), deviation(1.0), hardest(0.25, 0.1), power(3)], ids=str)
def test_fused_loss_equals_the_unfused_loss(rule, dtype, stop, device):
    x, y = make_features(LEVELS, dtype, device, "channels_last", requires_grad=True)
    points = [1 - reference.cosine(ops.cosine_sums(a, b)).detach() for a, b in zip(x, y, strict=True)]
    results = []
    for variant in (rule, Unfused(rule)):
        loss = hard_mined_cosine(x, y, variant, stop_gradient=stop)
        inputs = y if stop else [*x, *y]
        results.append((loss.detach(), torch.autograd.grad(loss, inputs)))
    (loss, gradients), (expected, expected_gradients) = results
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(loss, expected, rtol=min(tolerance, 1e-6), atol=0)
    for a, b, d in zip(gradients, expected_gradients, points * 2, strict=False):
        far = torch.ones_like(d, dtype=torch.bool)
        if isinstance(rule, deviation):
            far = (d - (d.mean() + rule.alpha * d.std())).abs() > 1e-6
        a, b = (t.movedim(1, -1)[far] for t in (a, b))
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_unmined_gradient(device):
    """With all weights 1, the mined gradient is the gradient of the loss."""
    x, y = make_features([(2, 3, 2, 2), (1, 2, 1, 3)], torch.float64, device, requires_grad=True)
    torch.autograd.gradcheck(lambda *t: hard_mined_cosine(t[:2], t[2:], power(0), stop_gradient=False), (*x, *y))


@pytest.mark.parametrize("rule", RULES[1::2], ids=str)
def test_opcheck(rule, device):
    name, parameter, factor = rule
    x, y = make_features([(2, 3, 4, 5), (1, 2, 3, 3)], device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.recontrast.cosine_sums_group.default, (x, y))
    x, y = [t.detach() for t in x], [t.detach() for t in y]
    sums = cosine_sums_group(x, y)
    torch.library.opcheck(torch.ops.recontrast.cosine_sums_group_backward.default, (sums, x, y))
    group = [2, 1], [20, 9]
    arguments = (sums.clone().requires_grad_(), *group, name, parameter, None, factor)
    # opcheck does not compare the mined gradient with the value, of which it is not the gradient.
    torch.library.opcheck(torch.ops.recontrast.mined_loss.default, arguments)
    _, state = torch.ops.recontrast.mined_loss(sums, *group, name, parameter, None, factor)
    one = torch.ones((), device=device)
    torch.library.opcheck(
        torch.ops.recontrast.mined_loss_backward.default, (one, sums, state, *group, name, parameter, factor)
    )


def test_invalid_arguments_raise(device):
    one = torch.ones(1, 2, 3, 4, device=device)
    with pytest.raises(ValueError, match="cosine_sums_group: x and y: wanted lists of one length > 0, got 1 and 0"):
        cosine_sums_group([one], [])
    with pytest.raises(ValueError, match=r"y: wanted the shape of x, \(1, 2, 3, 4\), got \(2, 3, 4\)"):
        cosine_sums_group([one], [one[0]])
    with pytest.raises(ValueError, match="wanted all pairs on"):
        cosine_sums_group([one, one.to("meta")], [one, one.to("meta")])
    with pytest.raises(ValueError, match=r"mined_cosine: rule: wanted one of .*, got 'easy'"):
        mined_cosine([one], [one], "easy", 1.0)


def test_kernels_check_the_sizes_of_their_arguments(device):
    if ops.BACKEND[device] != "native":
        return
    sums, _ = make_sums([2], [30], torch.float32, device)
    with pytest.raises(RuntimeError, match=r"sums: wanted Float \(186\), got Float \(180\)"):
        torch.ops.recontrast.mined_loss(sums, [2], [31], "deviation", 1.0, None, 0.0)
    with pytest.raises(RuntimeError, match="state: wanted"):
        torch.ops.recontrast.mined_loss_backward(sums[0], sums, sums[:3], [2], [30], "deviation", 1.0, 0.0)
    x, y = make_features([(2, 3, 5, 6)], device=device)
    with pytest.raises(RuntimeError, match=r"grad: wanted Float \(180\)"):
        group_backward(sums[:9], x, y)
