"""Random calls of operators, losses, maps and metrics, against slow restatements in float64.

Sizes are odd, memory layouts and dtypes mixed, values normal, tied, constant, zero, denormal, huge, NaN or infinite,
and batches sometimes empty. Results are compared within the rounding error that their terms allow. Points at which a
result jumps, such as the threshold of mining, are left out within a narrow band.
"""

import numpy as np
import pytest
import restatements
import torch
from fuzz_metrics import change_layout, make_masks, make_scores
from op_cases import LAYOUTS

from recontrast import metrics
from recontrast.anomaly_map import AnomalyMap
from recontrast.loss import global_cosine, hard_mined_cosine, point_cosine
from recontrast.metrics import curves
from recontrast.mining import deviation, hardest, power

pytestmark = pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")  # NumPy computes with infinities here
OPS = torch.ops.recontrast
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
UNIT = {F16: 2.0**-11, BF16: 2.0**-8, F32: 2.0**-24, F64: 2.0**-53}  # relative error of one rounding
TINY = {F16: 2.0**-24, BF16: 2.0**-133, F32: 2.0**-149, F64: 2.0**-1074}  # smallest number above zero
LARGE = {F16: 65504.0, BF16: 3.38e38, F32: 3.4e38, F64: 1.7e308}
SIZES = [0, 1, 1, 2, 3, 5, 7, 8, 13, 16, 17, 33]
RULES = ["deviation", "hardest", "power"]


def repeat(campaign, trial, selection, whole, *args):
    """Run a trial, a function of a random generator that returns its number of calls, with the seeds from 0 on."""
    for seed in range(campaign.tries(selection, whole)):
        torch.manual_seed(seed)
        try:
            campaign.passed(trial(np.random.default_rng(seed), *args))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            campaign.failed(f"{trial.__name__}, seed {seed}: {type(error).__name__}: {lines[0]}")


def make_values(rng, shape, dtype, scale_limit=18):
    """Make numbers of one of the kinds listed above, as a tensor."""
    kind = rng.integers(10)
    if kind == 0:
        values = rng.integers(-2, 3, shape).astype(float)
    elif kind == 1:
        values = np.full(shape, rng.choice([0.0, 1.0, -0.37]))
    elif kind == 2:
        values = rng.integers(-3, 4, shape) * (3 * TINY[dtype])
    elif kind == 3:
        values = rng.normal(size=shape) * 10.0 ** rng.uniform(-scale_limit, scale_limit)
    elif kind == 4:
        values = np.where(rng.random(shape) < 0.5, 0.0, rng.normal(size=shape))
    else:
        values = rng.normal(size=shape)
    values = np.clip(values, -LARGE[dtype], LARGE[dtype])
    if kind == 9 and values.size:
        values.flat[rng.integers(values.size)] = rng.choice([np.nan, np.inf, -np.inf])
    return torch.from_numpy(np.asarray(values)).to(dtype)


def make_features(rng, dtypes, scale_limit=18):
    shape = [int(rng.choice(SIZES)) for _ in range(4)]
    shape[0], shape[2], shape[3] = min(shape[0], 3), min(shape[2], 8), int(rng.choice([1, 3, 8, 21]))
    pair = []
    for dtype in dtypes:
        values = make_values(rng, shape, dtype, scale_limit)
        layouts = list(LAYOUTS) if shape[0] else list(LAYOUTS)[:3]
        pair.append(LAYOUTS[layouts[rng.integers(len(layouts))]](values))
    return pair


def as_points(t):
    """Features (N, C, H, W) as a float64 array (N, C, P)."""
    return t.detach().double().flatten(2).cpu().numpy()


def assert_near(result, expected, tolerance, largest, skip=False):
    """Compare with ``tolerance``, an array. Numbers that may overflow, or that ``skip`` marks, are left out."""
    result, expected = np.broadcast_arrays(np.asarray(result, np.float64), np.asarray(expected, np.float64))
    is_finite = np.isfinite(expected) & (np.abs(expected) < largest / 4) & (np.asarray(tolerance) < largest / 4)
    wrong = is_finite & ~(np.abs(result - expected) <= tolerance)
    wrong |= np.isnan(expected) & ~np.isnan(result)
    wrong |= np.isinf(expected) & (result != expected) & ~np.isnan(result)
    wrong &= ~np.asarray(skip)
    if wrong.any():
        index = tuple(np.argwhere(wrong)[0])
        raise AssertionError(f"{wrong.sum()} of {wrong.size} wrong, first at {index}: wanted {expected[index]!r}, "
                             f"got {result[index]!r}")  # fmt: skip


# ---- operators ---------------------------------------------------------------


def try_cosine_sums(rng, device):
    dtypes = [[F32, F32], [F64, F64], [F16, F16], [BF16, BF16], [BF16, F32], [F32, F16], [F64, BF16]][rng.integers(7)]
    pairs = [make_features(rng, dtypes) for _ in range(rng.integers(1, 4))]
    x, y = ([pair[i].to(device) for pair in pairs] for i in (0, 1))
    acc = F64 if F64 in dtypes else F32
    sums = OPS.cosine_sums_group(x, y)
    assert sums.dtype == acc
    grad = make_values(rng, sums.shape, acc, 6).to(device)
    gradients = OPS.cosine_sums_group_backward(grad, x, y)
    start = 0
    for a, b, dy in zip(x, y, gradients, strict=True):
        shape = (3, a.shape[0], a.shape[2] * a.shape[3])
        stop = start + int(np.prod(shape))
        part, g = (t[start:stop].cpu().double().numpy().reshape(shape) for t in (sums, grad))
        start = stop
        wide_x, wide_y = as_points(a), as_points(b)
        expected, terms = restatements.cosine_sums(wide_x, wide_y)
        count = a.shape[1] + 4
        assert_near(part, expected, 4 * count * (UNIT[acc] * terms + TINY[acc]), LARGE[acc], terms > LARGE[acc] / 8)
        assert dy.dtype == b.dtype and dy.stride() == torch.empty_like(b).stride()
        first, second = g[0][:, None] * wide_x, 2 * g[2][:, None] * wide_y
        is_easy = ((g[0] == 0) & (g[2] == 0))[:, None]
        magnitude = np.abs(first) + np.abs(second)
        tolerance = 2 * (UNIT[b.dtype] + 4 * UNIT[acc]) * magnitude + 2 * TINY[b.dtype] + 4 * TINY[acc]
        skip = magnitude > min(LARGE[b.dtype], LARGE[acc]) / 8
        assert_near(as_points(dy), np.where(is_easy, 0, first + second), tolerance, LARGE[b.dtype], skip & ~is_easy)
    return 2


def make_sums(rng, n, p, dtype):
    """Make the sums (3, N, P) of features with 4 channels."""
    x, y = (make_values(rng, (n, 4, p), F64, 3).numpy() for _ in "xy")
    if rng.random() < 0.7:
        y = x + y * rng.random((n, 1, p)) * 2
    sums, _ = restatements.cosine_sums(x, y)
    return torch.from_numpy(sums).to(dtype)


def try_mined_loss(rng, device):
    dtype, rule = [F32, F64][rng.integers(2)], RULES[rng.integers(3)]
    parameter = float(rng.choice({"deviation": [-3.0, 0.0, 0.5, 2.0], "hardest": [1e-9, 0.1, 0.5, 1.0],
                                  "power": [0.0, 0.5, 1.0, 3.0]}[rule]))  # fmt: skip
    factor, grad = float(rng.choice([0.0, 0.1, 1.0])), float(rng.choice([1.0, -1.7]))
    images = [int(rng.integers(0, 4)) for _ in range(rng.integers(1, 4))]
    points = [int(rng.choice([0, 1, 2, 7, 16, 45, 130])) for _ in images]
    parts = [make_sums(rng, n, p, dtype) for n, p in zip(images, points, strict=True)]
    flat = torch.cat([part.flatten() for part in parts]).to(device)
    alpha = torch.tensor(parameter, dtype=dtype, device=device) if rule == "deviation" and rng.random() < 0.5 else None
    loss, state = OPS.mined_loss(flat, images, points, rule, parameter, alpha, factor)
    one = torch.tensor(grad, dtype=dtype, device=device)
    out = OPS.mined_loss_backward(one, flat, state, images, points, rule, parameter, factor).cpu().double().numpy()
    unit = 3e-6 if dtype == F32 else 1e-13
    total, start, offset = 0.0, 0, 0
    for part, n, p in zip(parts, images, points, strict=True):
        wide = part.double().numpy()
        pair_loss, limit, gradient, d = restatements.mined_loss(wide, rule, parameter, factor, grad)
        total += pair_loss
        ours, stop = float(state[offset]), start + 3 * n * p
        spread = np.nan_to_num(np.abs(d)).max(initial=0) + 1
        assert_near(ours, limit, unit * spread * (1 + abs(parameter)) * 2, LARGE[dtype])
        near = np.abs(d - limit) < 10 * unit * spread * (1 + abs(parameter))
        whole = wide.sum(2)
        skip = ((np.abs(whole[1:] / restatements.EPS**2 - 1) < 1e-3).any(0))[:, None]
        skip = skip | (near if rule != "power" else np.isfinite(limit) & ((limit < 1e-2) | (d < 1e-2)))
        magnitude = np.abs(gradient).max(axis=2, keepdims=True, initial=0)
        # The slopes by the squares are quotients of sums that may cancel; their scale is that of the other slope.
        scale = np.nan_to_num(magnitude, nan=0, posinf=0) + np.nan_to_num(
            np.abs(gradient[0])[None]
            * (np.sqrt(whole[1] * whole[2]) / np.maximum(whole[1:].min(0), 1e-16))[None, :, None]
        )
        assert_near(out[start:stop].reshape(3, n, p), gradient, 20 * unit * scale + 1e-30, LARGE[dtype], skip[None])
        start, offset = stop, offset + 1 + 3 * n
    assert_near(float(loss), total, 10 * unit * len(images), LARGE[dtype])
    return 2


def make_banded(rng, out, size):
    """Make a matrix (out, size) whose rows have nonzeros in a band; sometimes none, sometimes everywhere."""
    at = np.linspace(0, size - 1, out)[:, None]
    matrix = rng.random((out, size)) * (np.abs(np.arange(size) - at) < rng.choice([0.6, 2.5, 100]))
    return torch.from_numpy(np.where(rng.random((out, 1)) < 0.05, 0, matrix)).float()


def try_anomaly_map(rng, device):
    height, width = (int(rng.choice([1, 2, 5, 16, 31, 33, 64, 65, 70])) for _ in "hw")
    n, levels = int(rng.choice([0, 1, 1, 2, 3])), []
    for _ in range(rng.integers(1, 4)):
        h, w = (int(rng.choice([1, 2, 3, 8, 17, 24])) for _ in "hw")
        levels.append((h, w, make_banded(rng, height, h), make_banded(rng, width, w)))
    levels = [levels[rng.integers(len(levels))] for _ in range(rng.integers(1, 6))]
    scale = float(rng.choice([1.0, 0.25, 1 / 3]))
    distances = [torch.from_numpy(rng.random((n, h, w)) * rng.choice([1, 2, 1e-40])).float() for h, w, _, _ in levels]
    distances = [d.mT.contiguous().mT if rng.random() < 0.2 else d for d in distances]
    rows, cols = [r for *_, r, _ in levels], [c for *_, c in levels]
    is_spoiled = np.zeros(n, bool)
    if n and rng.random() < 0.3:
        level, image = rng.integers(len(levels)), rng.integers(n)
        y, x = rng.integers(distances[level].shape[1]), rng.integers(distances[level].shape[2])
        distances[level][image, y, x] = float(rng.choice([np.nan, np.inf, -np.inf]))
        is_spoiled[image] = True
        is_reached = bool((rows[level][:, y] != 0).any() and (cols[level][:, x] != 0).any())
    arguments = [[t.to(device) for t in ts] for ts in (distances, rows, cols)]
    maps, maximum = (t.cpu().double().numpy() for t in OPS.anomaly_map(*arguments, scale))
    assert maps.shape == (n, height, width)
    wide = [[t.double().numpy() for t in ts] for ts in (distances, rows, cols)]
    for image in range(n):
        if is_spoiled[image]:
            assert np.isnan(maximum[image]) or not is_reached
            assert np.isnan(maximum[image]) == (not np.isfinite(maps[image]).all())
            continue
        one = [[d[image : image + 1] for d in wide[0]], *wide[1:]]
        expected, terms = restatements.anomaly_map(*one, scale)
        assert_near(maps[image], expected[0], 200 * UNIT[F32] * terms[0] + 1e-43, LARGE[F32])
        assert maximum[image] == maps[image].max()
    amap = AnomalyMap([4], (height, width))
    how = [["max", "mean"], [0.01, 0.3, 1.0]][rng.integers(2)]
    how = how[rng.integers(len(how))]
    scores = amap.score(torch.from_numpy(maps), how).numpy() if n else np.zeros(0)
    assert_near(scores, [restatements.score(anomaly, how) for anomaly in maps], 1e-11, LARGE[F64])
    return 1 + (n > 0)


# ---- losses ------------------------------------------------------------------


def try_loss(rng, device):
    dtype = [F32, F64, F16, BF16][rng.integers(4)]
    rule = RULES[rng.integers(3)]
    parameter = float(rng.choice({"deviation": [-3.0, 0.5, 1.0], "hardest": [0.1, 0.5], "power": [1.0, 3.0]}[rule]))
    factor = float(rng.choice([0.0, 0.25]))
    mining = (
        {"deviation": deviation, "hardest": hardest}[rule](parameter, factor) if rule != "power" else power(parameter)
    )
    kind = rng.integers(4)
    teachers, students = [], []
    for _ in range(rng.integers(1, 4)):
        shape = [
            int(rng.integers(1, 4)),
            int(rng.choice([2, 3, 17, 64])),
            *(int(rng.choice([1, 2, 5, 8])) for _ in "hw"),
        ]
        x = torch.from_numpy(rng.normal(size=shape))
        y = x + torch.from_numpy(rng.normal(size=shape) * 3 * rng.random((shape[0], 1, *shape[2:])))
        layouts = list(LAYOUTS.values())
        x, y = (layouts[rng.integers(len(layouts))](t.to(dtype)) for t in (x, y))
        teachers.append(x.to(device))
        students.append(y.to(device).detach().requires_grad_())
    loss_of = [lambda: hard_mined_cosine(teachers, students, mining)] * 2
    loss_of += [lambda: global_cosine(teachers, students), lambda: point_cosine(teachers, students)]
    loss = loss_of[kind]()
    gradients = torch.autograd.grad(loss, students)
    wide = [[t.detach().double().cpu() for t in ts] for ts in (teachers, students)]
    unit = 1e-12 if dtype == F64 else 5e-6
    near = []

    def weight_of(d):
        values = d.numpy()
        if kind >= 2:
            near.append(np.zeros(d.shape, bool))
            return torch.ones_like(d)
        limit = restatements.threshold(values, rule, parameter)
        is_near = np.abs(values - limit) < 20 * unit * (1 + abs(parameter))
        near.append(is_near if rule != "power" else np.full(d.shape, bool(limit < 1e-3)))
        return torch.from_numpy(restatements.weights(values, limit, rule, parameter, factor))

    if kind == 3:
        leaves = [s.clone().requires_grad_() for s in wide[1]]
        expected = sum((1 - torch.cosine_similarity(t, s)).mean() for t, s in zip(wide[0], leaves, strict=True))
        theirs, expected = torch.autograd.grad(expected, leaves), expected.detach()
        near = [np.zeros((s.shape[0], *s.shape[2:]), bool) for s in leaves]
    else:
        expected, theirs = restatements.global_loss(*wide, weight_of)
    assert_near(loss.detach().cpu(), expected, 10 * unit * len(teachers), LARGE[F32])
    for ours, gradient, is_near in zip(gradients, theirs, near, strict=True):
        assert ours.dtype == dtype
        largest = float(gradient.abs().max()) + 1e-30
        tolerance = 50 * unit * largest + 2 * UNIT[dtype] * gradient.abs().numpy() + TINY[dtype]
        assert_near(ours.double().cpu().numpy(), gradient.numpy(), tolerance, LARGE[dtype], is_near[:, None])
    return 2


# ---- metrics -----------------------------------------------------------------


def is_undefined(scores, positive):
    return not np.isfinite(scores).all() or positive.all() or not positive.any()


def try_image_metrics(rng, device):
    shape = tuple(int(n) for n in rng.choice([0, 1, 2, 3, 7, 16], rng.integers(1, 3)))
    scores = make_scores(rng, shape, rng.choice(["f2", "f4", "f8", ">f4", "i8", "u1"]))
    labels = make_masks(rng, shape)
    labels = labels if labels.dtype == bool else ((labels != 0) * rng.choice([1, 255])).astype(np.uint8)
    positive = (labels != 0).ravel()
    given = change_layout(rng, scores), change_layout(rng, labels)
    scores, positive = np.asarray(given[0]).ravel().astype(np.float64), (np.asarray(given[1]) != 0).ravel()
    if is_undefined(scores, positive):
        for function in (metrics.image_metrics, curves.roc):
            with pytest.raises(ValueError, match="wanted"):
                function(*given)
        return 2
    result = metrics.image_metrics(*given)
    x, y = curves.roc(*given)
    best = restatements.f1_max(scores, positive)
    called = scores >= result.f1_threshold
    expected = restatements.auroc(scores, positive), restatements.ap(scores, positive), best, best, best
    f1 = restatements.f1(scores, positive, result.f1_threshold)
    assert_near([result.auroc, result.ap, result.f1_max, f1, best], expected, 1e-12, LARGE[F64])
    assert_near(result.accuracy, np.mean(called == positive), 1e-12, LARGE[F64])
    assert_near(np.trapezoid(y, x), result.auroc, 1e-12, LARGE[F64])
    return 2


def try_pixel_metrics(rng, device):
    shape = tuple(int(n) for n in (rng.integers(0, 4), *rng.choice([1, 2, 3, 7, 9], 2)))
    maps, masks = make_scores(rng, shape, rng.choice(["f2", "f4", "f8", ">f4"])), make_masks(rng, shape)
    masks = masks if masks.dtype == bool else ((masks != 0) * rng.choice([1, 255])).astype(np.uint8)
    given = change_layout(rng, maps), change_layout(rng, masks)
    maps, positive = np.asarray(given[0]), np.asarray(given[1]) != 0
    labels, count = restatements.regions(positive)
    ours, regions = metrics.regions(given[1])
    assert regions == count and np.array_equal(ours, labels)
    limit = float(rng.choice([0.05, 0.3, 1.0, rng.integers(1, 5) / max(np.count_nonzero(~positive), 5)]))
    if maps.size == 0 or is_undefined(maps, positive):
        for function in (metrics.pixel_metrics, curves.pro):
            with pytest.raises(ValueError, match="wanted"):
                function(*given, limit)
        return 3
    wide, flat = maps.astype(np.float64), positive.ravel()
    result, (x, y) = metrics.pixel_metrics(*given, limit), curves.pro(*given, limit)
    best = restatements.f1_max(wide.ravel(), flat)
    at_best = restatements.f1(wide.ravel(), flat, result.f1_threshold)
    area = restatements.aupro(wide, positive, limit)
    values = [result.auroc, result.ap, result.f1_max, at_best, result.aupro, np.trapezoid(y, x) / limit]
    expected = [restatements.auroc(wide.ravel(), flat), restatements.ap(wide.ravel(), flat), best, best, area, area]
    assert_near(values, expected, 1e-9, LARGE[F64])
    high = max(float(np.abs(maps).max()), 1e-20)
    if high > 1e19 or maps.min() < 0:
        return 4
    streaming = metrics.Streaming(high, limit, device)
    streaming.update(*given)
    estimates = streaming.compute()
    streamed = np.array([estimates.auroc, estimates.ap, estimates.f1_max, estimates.aupro])  # values and bounds
    assert_near(streamed[:, 0], [expected[i] for i in (0, 1, 2, 4)], streamed[:, 1] + 1e-9, LARGE[F64])
    f1 = restatements.f1(wide.ravel(), flat, estimates.f1_threshold)
    assert_near(f1, estimates.f1_max.value - estimates.f1_max.bound, 1e-9, LARGE[F64])
    x, y = streaming.overlap_curve()
    assert_near(np.trapezoid(y, x) / limit, estimates.aupro.value, 1e-9, LARGE[F64])
    return 6


TRIALS = {  # trial -> number of seeds in a selection, and in all
    try_cosine_sums: (60, 2500),
    try_mined_loss: (60, 2000),
    try_anomaly_map: (60, 2000),
    try_loss: (40, 1500),
    try_image_metrics: (60, 1500),
    try_pixel_metrics: (60, 1500),
}


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.__name__.removeprefix("try_"))
def test_random_calls(trial, campaign, device):
    repeat(campaign, trial, *TRIALS[trial], device)
