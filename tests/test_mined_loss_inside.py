"""The mined loss of the points inside a region of interest, against the float64 reference on every available device."""

import math

import half_gradient
import pytest
import torch
from op_cases import DTYPES, GROUPS, LAYOUTS, ROUNDING, RULES, find_far_points, make_features, make_inside, make_sums

from recontrast import deviation, global_cosine, hard_mined_cosine, hardest, ops, point_cosine, power, reference
from recontrast.inside import pool_inside

OPERATORS = torch.ops.recontrast


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "each"])
@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_equals_reference(rule, dtype, group, shared, device):
    name, parameter, factor = rule
    sums, wide = make_sums(*group, dtype, device)
    inside = make_inside(*group, shared, device)
    flat = torch.cat([m.expand(3, -1, -1).flatten() for m in reference.split_inside(inside, shared, *group)])
    sums[~flat] = math.nan  # whatever lies outside
    is_single = dtype == torch.float32
    tolerance = {"rtol": 3e-6 if is_single else 1e-12, "atol": 1e-6 if is_single else 1e-13}
    arguments = (sums, inside, shared, *group, name, parameter, None, factor)
    loss, state = OPERATORS.mined_loss_inside(*arguments)
    expected, expected_state = reference.mined_loss_inside(wide, *arguments[1:])
    torch.testing.assert_close(loss.double(), expected, equal_nan=True, **tolerance)
    torch.testing.assert_close(state.double(), expected_state, equal_nan=True, **tolerance)
    grad = torch.tensor(-1.7, dtype=dtype, device=device)
    rest = (*group, name, parameter, factor)
    gradient = OPERATORS.mined_loss_inside_backward(grad, sums, inside, shared, state, *rest)
    wanted = reference.mined_loss_inside_backward(grad.double(), wide, inside, shared, expected_state, *rest)
    far = find_far_points(wide, expected_state, *group, 1e-6 if is_single else 1e-13)
    if name == "power":
        far[:] = True
    torch.testing.assert_close(gradient.double()[far & flat], wanted[far & flat], **tolerance)
    assert not gradient[~flat].any()


def select_points(sums, inside, shared, images, points):
    """Keep the sums of the points inside of each pair, as one image of one pair, to which the plain loss applies."""
    parts = reference.split_pairs(sums, images, points)
    masks = reference.split_inside(inside, shared, images, points)
    return [part[:, mask] for part, mask in zip(parts, masks, strict=True)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_threshold_is_that_of_the_points_inside_alone(rule, device):
    name, parameter, factor = rule
    group = [3, 2], [91, 40]
    sums, _ = make_sums(*group, torch.float64, device)
    inside = make_inside(*group, False, device)
    _, state = OPERATORS.mined_loss_inside(sums, inside, False, *group, name, parameter, None, factor)
    thresholds = state[0], state[1 + 3 * 3]
    for threshold, part in zip(thresholds, select_points(sums, inside, False, *group), strict=True):
        alone = OPERATORS.mined_loss(part.flatten(), [1], [part.shape[1]], name, parameter, None, factor)[1][0]
        torch.testing.assert_close(threshold, alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", RULES[1::2], ids=str)
def test_full_mask_changes_nothing(rule, device):
    name, parameter, factor = rule
    group = [4, 2, 1], [256, 70, 1300]
    sums, _ = make_sums(*group, torch.float32, device)
    plain = OPERATORS.mined_loss(sums, *group, name, parameter, None, factor)
    full = torch.ones(sum(group[1]), dtype=torch.bool, device=device)
    masked = OPERATORS.mined_loss_inside(sums, full, True, *group, name, parameter, None, factor)
    assert all(torch.equal(a, b) for a, b in zip(plain, masked, strict=True))
    one = torch.ones((), device=device)
    rest = (*group, name, parameter, factor)
    ours = OPERATORS.mined_loss_inside_backward(one, sums, full, True, masked[1], *rest)
    assert torch.equal(ours, OPERATORS.mined_loss_backward(one, sums, plain[1], *rest))


def test_alpha_on_the_device(device):
    group = ([2, 3], [50, 20])
    sums, _ = make_sums(*group, torch.float32, device)
    inside, alpha = make_inside(*group, True, device), torch.tensor(0.75, dtype=torch.float64, device=device)
    with_tensor = OPERATORS.mined_loss_inside(sums, inside, True, *group, "deviation", 0.0, alpha, 0.0)
    with_number = OPERATORS.mined_loss_inside(sums, inside, True, *group, "deviation", 0.75, None, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(with_tensor, with_number, strict=True))


def test_nothing_inside_gives_no_loss_and_no_gradient(device):
    sums, _ = make_sums([2], [30], torch.float32, device)
    none = torch.zeros(30, dtype=torch.bool, device=device)
    for name, parameter, factor in RULES:
        loss, state = OPERATORS.mined_loss_inside(sums, none, True, [2], [30], name, parameter, None, factor)
        assert loss == 0
        gradient = OPERATORS.mined_loss_inside_backward(
            torch.ones((), device=device), sums, none, True, state, [2], [30], name, parameter, factor
        )
        assert not gradient.any()


class Unfused:
    """Wrap a rule in a class that the kernels do not know."""

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, distances, all_distances):
        return self.rule(distances, all_distances)


def restate_loss(x, y, masks, rule, mined=True):
    """Restate the loss of the points inside: one vector for each image, a rule that sees these points alone."""
    total = 0
    for a, b, mask in zip(x, y, masks, strict=True):
        mask = mask.expand(len(a), -1, -1)
        vectors = [(t[:, m].flatten(), u[:, m].flatten()) for t, u, m in zip(a, b, mask, strict=True)]
        points = 1 - torch.nn.functional.cosine_similarity(a, b, dim=1).detach()
        weights = rule(points, points[mask]) if mined else torch.ones_like(points)
        losses = []
        for (t, u), w, m in zip(vectors, weights, mask, strict=True):
            scaled = u.detach() + w[m].repeat(a.shape[1]) * (u - u.detach())  # the gradient of each point, weighted
            losses.append(1 - torch.nn.functional.cosine_similarity(t, scaled, dim=0))
        total = total + torch.stack(losses).mean()
    return total


LEVELS = [(4, 16, 8, 8), (4, 5, 7, 13), (4, 64, 2, 3)]
RULE_OBJECTS = [deviation(0.3, 0.2), deviation(1.0), hardest(0.25, 0.1), power(3)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULE_OBJECTS, ids=str)
def test_loss_of_features_equals_its_restatement(rule, dtype, layout, device):
    x, y = make_features(LEVELS, dtype, device, layout, requires_grad=True)
    pixels = torch.rand(4, 30, 40, device=device) < 0.02
    pixels[:, 3, 4] = True
    masks = [pool_inside(pixels, t.shape[2:]) for t in y]
    wide = [[t.detach().double() for t in ts] for ts in (x, y)]
    for t in wide[1]:
        t.requires_grad_()
    expected = restate_loss(*wide, masks, rule)
    expected_gradients = torch.autograd.grad(expected, wide[1])
    loss = hard_mined_cosine(x, y, rule, inside=masks)
    gradients = torch.autograd.grad(loss, y)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    for gradient, wanted, mask, a, b in zip(gradients, expected_gradients, masks, *wide, strict=True):
        points = 1 - torch.nn.functional.cosine_similarity(a, b.detach(), dim=1)
        far = torch.ones_like(points, dtype=torch.bool)
        if isinstance(rule, deviation):
            far = (points - points[mask].mean() - rule.alpha * points[mask].std()).abs() > 1e-5
        if isinstance(rule, hardest):
            far = (points - points[mask].topk(max(int(mask.sum() * rule.fraction), 1)).values.min()).abs() > 1e-5
        ours, theirs = (t.movedim(1, -1)[far] for t in (gradient, wanted))
        limit = max(20 * ROUNDING[dtype], 1e-6) * max(theirs.abs().max().item(), 1e-12)
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=limit)
        assert not gradient.movedim(1, -1)[~mask].any()


@pytest.mark.parametrize("rule", RULE_OBJECTS, ids=str)
def test_fused_loss_equals_the_unfused_loss(rule, device):
    x, y = make_features(LEVELS, torch.float64, device, "channels_last", requires_grad=True)
    for shape in ((4, 20, 20), (1, 20, 20)):
        masks = [pool_inside(torch.rand(shape, device=device) < 0.03, t.shape[2:]) for t in y]
        results = []
        for variant in (rule, Unfused(rule)):
            loss = hard_mined_cosine(x, y, variant, stop_gradient=False, inside=masks)
            results.append((loss.detach(), *torch.autograd.grad(loss, [*x, *y])))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_losses_without_mining_see_the_points_inside_alone(device):
    x, y = make_features(LEVELS, torch.float64, device)
    masks = [pool_inside(torch.rand(4, 30, 40, device=device) < 0.05, t.shape[2:]) for t in y]
    expected = restate_loss(x, y, masks, None, mined=False)
    torch.testing.assert_close(global_cosine(x, y, inside=masks), expected)
    points = [1 - torch.nn.functional.cosine_similarity(a, b, dim=1) for a, b in zip(x, y, strict=True)]
    expected = sum(d[m].mean() for d, m in zip(points, masks, strict=True))
    torch.testing.assert_close(point_cosine(x, y, inside=masks), expected)


@pytest.mark.parametrize("images", [4, 1], ids=["each", "shared"])
def test_two_processes_give_the_gradient_of_one(images, tmp_path):
    teacher, student = (torch.randn(4, 6, 9, 7, dtype=torch.float64) for _ in "ts")
    inside = torch.rand(images, 9, 7) < 0.4
    gradients = torch.zeros(len(half_gradient.RULES) + 1, 4, 6, 9, 7, dtype=torch.float64).share_memory_()
    arguments = (tmp_path / "store", teacher, student, inside, gradients)
    torch.multiprocessing.spawn(half_gradient.compute_masked_gradients_of_half, arguments, nprocs=2)
    for number, rule in enumerate((*half_gradient.RULES, None)):
        whole = student.clone().requires_grad_()
        loss = point_cosine if rule is None else hard_mined_cosine
        loss(teacher, whole, **({} if rule is None else {"rule": rule}), inside=inside).backward()
        torch.testing.assert_close(gradients[number], whole.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("rule", RULES[1::2], ids=str)
def test_opcheck(rule, device):
    name, parameter, factor = rule
    group = [2, 1], [20, 9]
    sums, _ = make_sums(*group, torch.float32, device)
    inside = make_inside(*group, False, device)
    arguments = (inside, False, *group, name, parameter, None, factor)
    # opcheck does not compare the mined gradient with the value, of which it is not the gradient.
    torch.library.opcheck(OPERATORS.mined_loss_inside.default, (sums.clone().requires_grad_(), *arguments))
    _, state = OPERATORS.mined_loss_inside(sums, *arguments)
    one = torch.ones((), device=device)
    backward = (one, sums, inside, False, state, *group, name, parameter, factor)
    torch.library.opcheck(OPERATORS.mined_loss_inside_backward.default, backward)


def test_invalid_masks_raise(device):
    x, y = make_features([(2, 3, 4, 5)], device=device)
    good = torch.ones(2, 4, 5, dtype=torch.bool, device=device)
    for mask, got in ((good.float(), r"float32 \(2, 4, 5\)"), (good[:, :3], r"bool \(2, 3, 5\)")):
        with pytest.raises(ValueError, match=rf"inside: wanted bool \(2, 4, 5\) or \(1, 4, 5\) on .*, got {got}"):
            hard_mined_cosine(x, y, deviation(1.0), inside=[mask])
    with pytest.raises(ValueError, match=r"inside: wanted one mask for each of 1 pairs, got 2"):
        ops.mined_cosine(x, y, "deviation", 1.0, inside=[good, good])


def test_kernels_check_the_sizes_of_their_arguments(device):
    if not ops.has_kernel("mined_loss_inside", torch.device(device)) or ops.BACKEND[device] != "native":
        return
    sums, _ = make_sums([2], [30], torch.float32, device)
    with pytest.raises(RuntimeError, match=r"inside: wanted Bool \(30\), got Bool \(29\)"):
        inside = torch.ones(29, dtype=torch.bool, device=device)
        OPERATORS.mined_loss_inside(sums, inside, True, [2], [30], "deviation", 1.0, None, 0.0)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 16), (64, 48), (100, 90)], ids=str)
def test_points_inside_are_those_with_a_pixel_in_their_cell(size):
    inside = torch.rand(3, 64, 48) < 0.004
    inside[0, 63, 47] = True
    expected = torch.zeros(3, *size, dtype=torch.bool)
    for image, y, x in inside.nonzero().tolist():
        rows, cols = (
            [i for i in range(new) if i * old // new <= p < -(-(i + 1) * old // new)]
            for new, old, p in ((size[0], 64, y), (size[1], 48, x))
        )
        for row in rows:
            expected[image, row, cols] = True
    assert torch.equal(pool_inside(inside, size), expected)
