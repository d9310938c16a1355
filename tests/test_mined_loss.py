"""Grouped sums and the fused mined loss through the dispatcher, on every device here, against the oracle in float64."""

import math

import pytest
import torch
from op_cases import DTYPES, GROUPS, LAYOUTS, ROUNDING, RULES, SHAPES, error, far_points, features, random_sums

from recontrast import deviation, hard_mined_cosine, hardest, ops, power, reference
from recontrast.loss import point_distance, point_distances
from recontrast.ops import cosine_sums_group, mined_cosine

group_backward = torch.ops.recontrast.cosine_sums_group_backward


def doubles(ts):
    return [t.detach().double() for t in ts]


def check_group(x, y):
    sums = cosine_sums_group(x, y)
    assert sums.dtype == reference.group_dtype(x, y)
    assert error(sums, reference.cosine_sums_group(doubles(x), doubles(y))) < (
        1e-5 if sums.dtype == torch.float32 else 1e-13
    )
    grad = torch.randn_like(sums)
    points = [t.shape[2] * t.shape[3] for t in y]
    for part in reference.split_pairs(grad, [t.shape[0] for t in y], points):
        part *= torch.rand_like(part[:1]) < 0.4  # most points are easy
    gradients = group_backward(grad, x, y)
    expected = reference.cosine_sums_group_backward(grad.double(), doubles(x), doubles(y))
    for ours, theirs, t in zip(gradients, expected, y, strict=True):
        assert ours.dtype == t.dtype
        assert ours.stride() == torch.empty_like(t).stride()
        assert error(ours, theirs) < ROUNDING[t.dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_group_matches_oracle(dtype, layout, device):
    check_group(*features(SHAPES, dtype, device, layout))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: SIZES THAT FILL ONE WERE NOT TRIED")
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_group_that_fills_the_device(dtype, layout):
    """As in training: other lanes a position than small shapes take, which the benchmarks time."""
    check_group(*features([(16, 256, 64, 64), (16, 512, 32, 32), (16, 1024, 16, 16)] * 2, dtype, "cuda", layout))


def test_group_of_mixed_pairs(device):
    """Dtypes, layouts and alignments that take different kernels, in one call; more pairs than travel in one launch."""
    x, y = [], []
    for layout in LAYOUTS:
        for dtypes in [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16,) * 2]:
            for shape in [(2, 8, 4, 4), (3, 5, 7, 13)]:
                a, b = features([shape], dtypes[0], device, layout, dtypes[1])
                x, y = x + a, y + b
    check_group(x, y)
    x[3], y[5] = x[3].double(), y[5].double()
    check_group(x, y)


def test_group_with_empty_pairs(device):
    check_group(*features([(0, 3, 4, 5), (2, 3, 4, 5), (2, 0, 3, 3), (2, 3, 0, 5)], device=device))


def test_group_is_the_pairs_one_by_one(device):
    x, y = features([(2, 64, 16, 16), (2, 40, 5, 3)], device=device, requires_grad=True)
    weights = [torch.randn(3, t.shape[0], *t.shape[2:], device=device) for t in x]
    whole = torch.cat([w.flatten() for w in weights])
    one = torch.autograd.grad((cosine_sums_group(x, y) * whole).sum(), [*x, *y])
    each = sum((ops.cosine_sums(a, b) * w).sum() for a, b, w in zip(x, y, weights, strict=True))
    for a, b in zip(one, torch.autograd.grad(each, [*x, *y]), strict=True):
        torch.testing.assert_close(a, b)


def test_distances_are_those_of_each_pair(device):
    x, y = features([(2, 64, 16, 16), (0, 3, 2, 2), (2, 40, 5, 3)], torch.bfloat16, device)
    found = point_distances(list(zip(x, y, strict=True)))
    for ours, a, b in zip(found, x, y, strict=True):
        assert ours.shape == (a.shape[0], *a.shape[2:])
        torch.testing.assert_close(ours, point_distance(a, b))


def test_group_gradient(device):
    x, y = features([(2, 3, 2, 2), (1, 2, 1, 3)], torch.float64, device, requires_grad=True)
    torch.autograd.gradcheck(lambda *t: cosine_sums_group(t[:2], t[2:]), (*x, *y))


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_mined_loss_matches_oracle(rule, dtype, group, device):
    name, parameter, factor = rule
    sums, wide = random_sums(*group, dtype, device)
    tolerance = {"rtol": 3e-6 if dtype == torch.float32 else 1e-12, "atol": 1e-6 if dtype == torch.float32 else 1e-13}
    loss, state = torch.ops.recontrast.mined_loss(sums, *group, name, parameter, None, factor)
    expected, expected_state = reference.mined_loss(wide, *group, name, parameter, None, factor)
    torch.testing.assert_close(loss.double(), expected, equal_nan=True, **tolerance)
    torch.testing.assert_close(state.double(), expected_state, equal_nan=True, **tolerance)
    grad = torch.tensor(-1.7, dtype=dtype, device=device)
    ours = torch.ops.recontrast.mined_loss_backward(grad, sums, state, *group, name, parameter, factor)
    theirs = reference.mined_loss_backward(grad.double(), wide, expected_state, *group, name, parameter, factor)
    far = far_points(wide, expected_state, *group, 1e-6 if dtype == torch.float32 else 1e-13)
    if name == "power":
        far[:] = True
    assert far.double().mean() > 0.9 or wide.numel() < 300
    torch.testing.assert_close(ours.double()[far], theirs[far], **tolerance)


@pytest.mark.parametrize("rule", RULES[:5], ids=str)
def test_the_hardest_point_keeps_its_weight(rule, device):
    """The threshold is one of the distances, or above none of them: computed twice, they must not differ by a bit."""
    name, parameter, factor = rule
    sums, _ = random_sums([3], [37], torch.float32, device)
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
    sums, _ = random_sums(*group, torch.float32, device)
    alpha = torch.tensor(0.75, dtype=dtype, device=device)
    for value in (0.75, -1.0):
        alpha.fill_(value)
        ours = torch.ops.recontrast.mined_loss(sums, *group, "deviation", 0.0, alpha, 0.0)
        theirs = torch.ops.recontrast.mined_loss(sums, *group, "deviation", value, None, 0.0)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_threads_do_not_change_the_result():
    threads = torch.get_num_threads()
    sums, _ = random_sums([9, 7], [331, 64], torch.float32, "cpu")
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(torch.ops.recontrast.mined_loss(sums, [9, 7], [331, 64], "deviation", 1.0, None, 0.0))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_broken_features_break_the_loss(device):
    sums, _ = random_sums([2], [30], torch.float32, device)
    sums[7] = math.nan
    for name, parameter, factor in RULES:
        loss, _ = torch.ops.recontrast.mined_loss(sums, [2], [30], name, parameter, None, factor)
        assert loss.isnan()


# ---- the whole loss ----------------------------------------------------------


class Unfused:
    """A rule that the kernels do not know, though it is one they do."""

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, d, everyone):
        return self.rule(d, everyone)


LEVELS = [(4, 16, 8, 8), (4, 32, 4, 4), (4, 64, 2, 3)]


@pytest.mark.parametrize("stop", [True, False], ids=["stopped", "both sides"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", [deviation(0.3, 0.2), deviation(1.0), hardest(0.25, 0.1), power(3)], ids=str)
def test_fused_loss_is_the_unfused(rule, dtype, stop, device):
    x, y = features(LEVELS, dtype, device, "channels_last", requires_grad=True)
    points = [1 - reference.cosine(ops.cosine_sums(a, b)).detach() for a, b in zip(x, y, strict=True)]
    results = []
    for which in (rule, Unfused(rule)):
        loss = hard_mined_cosine(x, y, which, stop_gradient=stop)
        wanted = y if stop else [*x, *y]
        results.append((loss.detach(), torch.autograd.grad(loss, wanted)))
    (loss, ours), (other, theirs) = results
    small = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(loss, other, rtol=min(small, 1e-6), atol=0)
    for a, b, d in zip(ours, theirs, points * 2, strict=False):
        far = torch.ones_like(d, dtype=torch.bool)
        if isinstance(rule, deviation):
            far = (d - (d.mean() + rule.alpha * d.std())).abs() > 1e-6
        a, b = (t.movedim(1, -1)[far] for t in (a, b))
        torch.testing.assert_close(a, b, rtol=small, atol=small * b.abs().max().item())


def test_gradient_of_the_whole(device):
    """With every weight 1 the mined gradient is that of the loss."""
    x, y = features([(2, 3, 2, 2), (1, 2, 1, 3)], torch.float64, device, requires_grad=True)
    torch.autograd.gradcheck(lambda *t: hard_mined_cosine(t[:2], t[2:], power(0), stop_gradient=False), (*x, *y))


@pytest.mark.parametrize("rule", RULES[1::2], ids=str)
def test_opcheck(rule, device):
    name, parameter, factor = rule
    x, y = features([(2, 3, 4, 5), (1, 2, 3, 3)], device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.recontrast.cosine_sums_group.default, (x, y))
    x, y = [t.detach() for t in x], [t.detach() for t in y]
    sums = cosine_sums_group(x, y)
    torch.library.opcheck(torch.ops.recontrast.cosine_sums_group_backward.default, (sums, x, y))
    group = [2, 1], [20, 9]
    arguments = (sums.clone().requires_grad_(), *group, name, parameter, None, factor)
    # Autograd through AOT is compared with the mined gradient elsewhere: it is not that of the value.
    torch.library.opcheck(torch.ops.recontrast.mined_loss.default, arguments)
    _, state = torch.ops.recontrast.mined_loss(sums, *group, name, parameter, None, factor)
    one = torch.ones((), device=device)
    torch.library.opcheck(
        torch.ops.recontrast.mined_loss_backward.default, (one, sums, state, *group, name, parameter, factor)
    )


def test_wrong_arguments(device):
    one = torch.ones(1, 2, 3, 4, device=device)
    with pytest.raises(ValueError, match="cosine_sums_group: x and y must be lists of one length > 0, got 1 and 0"):
        cosine_sums_group([one], [])
    with pytest.raises(ValueError, match=r"cosine_sums_group: x \(1, 2, 3, 4\) and y \(2, 3, 4\) differ"):
        cosine_sums_group([one], [one[0]])
    with pytest.raises(ValueError, match="all pairs must be on"):
        cosine_sums_group([one, one.to("meta")], [one, one.to("meta")])
    with pytest.raises(ValueError, match=r"mined_cosine: rule must be one of .*, got 'easy'"):
        mined_cosine([one], [one], "easy", 1.0)


def test_kernels_guard_their_memory(device):
    if ops.BACKEND[device] != "native":
        return
    sums, _ = random_sums([2], [30], torch.float32, device)
    with pytest.raises(RuntimeError, match=r"sums must be Float \(186\), got Float \(180\)"):
        torch.ops.recontrast.mined_loss(sums, [2], [31], "deviation", 1.0, None, 0.0)
    with pytest.raises(RuntimeError, match="state must be"):
        torch.ops.recontrast.mined_loss_backward(sums[0], sums, sums[:3], [2], [30], "deviation", 1.0, 0.0)
    x, y = features([(2, 3, 5, 6)], device=device)
    with pytest.raises(RuntimeError, match=r"grad must be Float \(180\)"):
        group_backward(sums[:9], x, y)
