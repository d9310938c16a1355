"""Losses equal the formulas of upstream, in value and gradient."""

import pickle

import numpy as np
import pytest
import torch
import upstream
from half_gradient import compute_gradient_of_half

from recontrast import (
    alpha_at,
    deviation,
    global_cosine,
    hard_mined_cosine,
    hardest,
    pairs_loss,
    point_cosine,
    power,
)

SHAPES = [(4, 16, 8, 8), (4, 32, 4, 4), (4, 64, 2, 3)]
BAND = 1e-5  # points closer to a threshold are not compared, because rounding can move them across it


def make_features(device="cpu", shapes=SHAPES, sparse=False):
    teachers = [torch.randn(shape, device=device) for shape in shapes]
    if sparse:  # as after a ReLU, with points that are zero in all channels
        teachers = [(t - 1).relu() * (torch.rand(t.shape[0], 1, *t.shape[2:], device=device) < 0.9) for t in teachers]
    return teachers, [(t * 0.5 + torch.randn_like(t)).requires_grad_() for t in teachers]


def clone(students):
    return [s.detach().clone().requires_grad_() for s in students]


def assert_same_loss(loss, expected, students, expected_students, far):
    """Compare values, and gradients at the points ``far`` from a threshold, to 1e-5 of the largest gradient."""
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    for student, expected_student, points in zip(students, expected_students, far, strict=True):
        assert points.float().mean() > 0.9
        gradient, expected_gradient = (t.grad.movedim(1, -1)[points] for t in (student, expected_student))
        tolerance = 1e-5 * expected_gradient.abs().max().item()
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=tolerance)


def find_far_points(threshold, teachers, students):
    distances = [upstream.point_distance(t, s)[:, 0] for t, s in zip(teachers, students, strict=True)]
    return [(d - threshold(d)).abs() > BAND for d in distances]


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("factor", [0.0, 0.3])
@pytest.mark.parametrize("alpha", [-3.0, 0.0, 1.0])
def test_deviation_equals_recontrast(alpha, factor, sparse, device):
    teachers, students = make_features(device, sparse=sparse)
    copies = clone(students)
    far = find_far_points(lambda d: d.mean() + alpha * d.std(), teachers, students)
    expected = upstream.global_cosine_hm(teachers, copies, alpha, factor)
    assert_same_loss(hard_mined_cosine(teachers, students, deviation(alpha, factor)), expected, students, copies, far)


def test_hardest_equals_dinomaly(device):
    teachers, students = make_features(device)
    copies = clone(students)
    expected = upstream.global_cosine_hm_percent(teachers, copies, p=0.75, factor=0.1) * len(teachers)
    everywhere = [torch.ones_like(s[:, 0], dtype=torch.bool) for s in students]
    assert_same_loss(hard_mined_cosine(teachers, students, hardest(0.25, 0.1)), expected, students, copies, everywhere)


def test_power_equals_inp_former(device):
    teachers, students = make_features(device)
    copies = clone(students)
    expected = upstream.global_cosine_hm_adaptive(teachers, copies, y=3) * len(teachers)
    everywhere = [torch.ones_like(s[:, 0], dtype=torch.bool) for s in students]
    assert_same_loss(hard_mined_cosine(teachers, students, power(3)), expected, students, copies, everywhere)


def test_repaired_upstream_loss_equals_upstream():
    """The baseline of the benchmarks computes the same loss."""
    teachers, students = make_features()
    copies = clone(students)
    far = find_far_points(lambda d: d.mean() + d.std(), teachers, students)
    repaired, expected = (f(teachers, s) for f, s in zip(
        (upstream.global_cosine_hm_repaired, upstream.global_cosine_hm), (students, copies), strict=True
    ))  # fmt: skip
    assert_same_loss(repaired, expected, students, copies, far)


def test_global_and_point_cosine(device):
    teachers, students = make_features(device)
    torch.testing.assert_close(global_cosine(teachers, students), upstream.global_cosine(teachers, students))
    expected = sum(upstream.point_distance(t, s).mean() for t, s in zip(teachers, students, strict=True))
    torch.testing.assert_close(point_cosine(teachers, students), expected)
    unmined = hard_mined_cosine(teachers, students, power(0))
    torch.testing.assert_close(global_cosine(teachers, students), unmined)


def test_pairs_loss_sums_levels_and_halves_groups(device):
    teachers, students = make_features(device, SHAPES * 2)
    expected = upstream.pairs_loss(list(zip(teachers, students, strict=True)), 1.0)
    torch.testing.assert_close(pairs_loss(list(zip(teachers, students, strict=True)), deviation(1.0)), expected)


def test_tensor_equals_list_with_one_tensor():
    (teacher, *_), (student, *_) = make_features()
    loss = hard_mined_cosine(teacher, student, deviation(0.0))
    torch.testing.assert_close(loss, hard_mined_cosine([teacher], [student], deviation(0.0)), rtol=0, atol=0)
    assert loss.shape == ()


@pytest.mark.parametrize(
    "loss", [global_cosine, point_cosine, lambda t, s, **k: hard_mined_cosine(t, s, power(1), **k)]
)
def test_stop_gradient(loss):
    (teacher, *_), (student, *_) = make_features()
    teacher.requires_grad_()
    loss(teacher, student).backward()
    assert teacher.grad is None
    loss(teacher, student, stop_gradient=False).backward()
    assert teacher.grad.abs().sum() > 0


def test_alpha_as_a_tensor(device):
    (teacher, *_), (student, *_) = make_features(device)
    alpha = torch.tensor(-3.0, device=device)
    rule = deviation(alpha)
    hard_mined_cosine(teacher, student, rule).backward()
    unmined = student.grad.clone()
    student.grad = None
    alpha.fill_(1.0)
    hard_mined_cosine(teacher, student, rule).backward()
    easy = (student.grad == 0).all(1)
    assert 0.5 < easy.float().mean() < 1
    torch.testing.assert_close(student.grad.movedim(1, -1)[~easy], unmined.movedim(1, -1)[~easy])


def test_rules_are_hashable_and_picklable():
    for rule in (deviation(1.0, 0.3), hardest(0.1), power(3)):
        assert pickle.loads(pickle.dumps(rule)) == rule
        assert hash(rule) == hash(pickle.loads(pickle.dumps(rule)))
    with pytest.raises(ValueError, match=r"fraction: wanted a number in \(0, 1\], got 0"):
        hardest(0)


@pytest.mark.parametrize(
    "rule, arguments, message",
    [
        (deviation, ("x",), "deviation: alpha: wanted a number or a 0-dim tensor, got 'x'"),
        (deviation, (None,), "deviation: alpha: wanted a number or a 0-dim tensor, got None"),
        (deviation, (torch.ones(3),), r"deviation: alpha: wanted .* 0-dim tensor, got a tensor of shape \(3,\)"),
        (deviation, (float("nan"),), "deviation: alpha: wanted a number or a 0-dim tensor, got nan"),
        (deviation, (1.0, "x"), "deviation: factor: wanted a number, got 'x'"),
        (hardest, ("x",), "hardest: fraction: wanted a number, got 'x'"),
        (hardest, (0.5, None), "hardest: factor: wanted a number, got None"),
        (power, (-1,), "power: exponent: wanted a finite number of at least 0, got -1"),
        (power, (float("inf"),), "power: exponent: wanted a finite number of at least 0, got inf"),
        (power, ("x",), "power: exponent: wanted a finite number of at least 0, got 'x'"),
    ],
)
def test_rules_raise_on_invalid_numbers(rule, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        rule(*arguments)


def test_rules_accept_numpy_numbers():
    assert (deviation(np.float32(1)).alpha, hardest(np.float64(0.5)).fraction, power(np.int64(3)).exponent) == (
        1,
        0.5,
        3,
    )


def test_rules_with_one_point_no_points_and_zero_distances():
    zero, one = torch.zeros(2, 3, 3), torch.full((1, 1, 1), 0.5)
    for rule in (deviation(1.0), hardest(0.001), power(3)):
        assert rule(one, one).item() == 1.0  # a single point is the hardest
        assert rule(zero[:0], zero[:0]).shape == (0, 3, 3)
    assert torch.equal(power(3)(zero, zero), torch.ones_like(zero))
    rounded = torch.tensor([[[-1e-7, 0.5]]])  # rounding can make a distance negative, which has no fractional power
    assert torch.equal(power(0.5)(rounded, rounded), torch.tensor([[[0.0, 2**0.5]]]))


def test_bfloat16_features_are_summed_in_float32():
    (teacher, *_), (student, *_) = make_features()
    loss = hard_mined_cosine(teacher.bfloat16(), student.detach().bfloat16(), deviation(1.0))
    assert loss.dtype == torch.float32
    expected = hard_mined_cosine(teacher.bfloat16().float(), student.detach().bfloat16().float(), deviation(1.0))
    torch.testing.assert_close(loss, expected)


def test_alpha_ramp():
    assert [alpha_at(step, 100) for step in (0, 5, 10, 50, 99)] == [-3.0, -1.0, 1.0, 1.0, 1.0]
    assert alpha_at(0, 3) == -3.0
    assert alpha_at(1, 4, ramp=0.5, start=0.0, end=2.0) == 1.0
    assert alpha_at(0, 4, ramp=0.0) == 1.0
    for step in range(40):
        assert alpha_at(step, 37) == pytest.approx(upstream.alpha_at(step, 37))
    with pytest.raises(ValueError, match=r"^alpha_at: steps: wanted at least 1, got 0$"):
        alpha_at(5, 0)


def test_compiles_in_one_graph(device):
    teachers, students = make_features(device)
    step = torch.compile(
        lambda t, s: hard_mined_cosine(t, s, deviation(1.0)), fullgraph=True, backend="aot_eager"
    )  # fmt: skip
    torch.testing.assert_close(step(teachers, students), hard_mined_cosine(teachers, students, deviation(1.0)))


@pytest.mark.parametrize("convert", [float, torch.tensor], ids=["number", "tensor"])
def test_compiles_with_alpha_as_an_argument(convert):
    """Dynamo turns a number into a constant, then into a symbol; the checks must not break the graph."""
    teachers, students = make_features()
    step = torch.compile(
        lambda t, s, alpha: hard_mined_cosine(t, s, deviation(alpha)), fullgraph=True, backend="aot_eager"
    )
    for alpha in (-3.0, 0.5, 1.0):
        expected = hard_mined_cosine(teachers, students, deviation(alpha))
        torch.testing.assert_close(step(teachers, students, convert(alpha)), expected)


@pytest.mark.parametrize(
    "teacher, student, message",
    [
        ([torch.ones(1, 1, 1, 1)], torch.ones(1, 1, 1, 1), "both be tensors or both be lists"),
        ([torch.ones(1, 1, 1, 1)], [], "as many teachers as students, got 1 and 0"),
        ([], [], "as many teachers as students, got 0 and 0"),
    ],
)
def test_lists_of_different_lengths_raise(teacher, student, message):
    with pytest.raises(ValueError, match=message):
        global_cosine(teacher, student)


def test_pairs_loss_raises_on_invalid_arguments():
    pair = (torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    with pytest.raises(ValueError, match=r"^pairs_loss: pairs: wanted at least one, got none$"):
        pairs_loss([], deviation(1.0))
    for rule in (None, deviation(1.0)):
        with pytest.raises(ValueError, match=r"^pairs_loss: form: wanted 'global' or 'point', got 'mean'$"):
            pairs_loss([pair], rule, form="mean")


def test_two_processes_give_the_gradient_of_one(tmp_path):
    teacher, student = (torch.randn(4, 16, 8, 8) for _ in "ts")
    gradients = torch.zeros(2, 2, 16, 8, 8).share_memory_()
    torch.multiprocessing.spawn(compute_gradient_of_half, (tmp_path / "store", teacher, student, gradients), nprocs=2)
    whole = student.clone().requires_grad_()
    hard_mined_cosine(teacher, whole, deviation(1.0)).backward()
    torch.testing.assert_close(gradients.flatten(0, 1), whole.grad)
