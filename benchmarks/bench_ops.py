"""Operators compared with the reference, the repaired reference, its `torch.compile` form, and a copy."""

import pytest
import torch
import torch.nn.functional as F
import upstream
from scipy.ndimage import gaussian_filter

from recontrast import AnomalyMap, deviation, hard_mined_cosine, ops, reference
from recontrast.inside import pool_inside
from recontrast.loss import point_distance

# The three feature maps of WideResNet-50-2 at 256 x 256, batch 16 (Guo et al. 2023, section 4).
SHAPES = [(16, 256, 64, 64), (16, 512, 32, 32), (16, 1024, 16, 16)]
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
SMOOTHING = 9  # positions; real features have similar distances at neighbours, so easy points form regions
LEVELS = [shape[2:] for shape in SHAPES]
OUT = (256, 256)


def features(shape, device, dtype=torch.float32, layout="NCHW"):
    """Return a ReLU-sparse teacher and a student whose error varies smoothly in space, as during training."""
    teacher = torch.randn(shape, device=device).relu()
    noise = F.avg_pool2d(torch.rand(shape[0], 1, *shape[2:], device=device), SMOOTHING, 1, SMOOTHING // 2)
    student = teacher + torch.randn(shape, device=device) * (4 * noise).exp() * 0.1
    return tuple(t.to(dtype).contiguous(memory_format=FORMATS[layout]) for t in (teacher, student))


def loss_rivals():
    """Return the implementations of the loss by name."""

    def ours(teachers, students):
        return hard_mined_cosine(teachers, students, deviation(1.0))

    compiled = torch.compile(upstream.global_cosine_hm_repaired, fullgraph=True)
    return {
        "reference": upstream.global_cosine_hm,
        "repaired": upstream.global_cosine_hm_repaired,
        "repaired, compiled": compiled,
        "ours": ours,
    }


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rival", ["reference", "repaired", "repaired, compiled", "ours", "copy of the same bytes"])
def test_loss(timed, benchmark, rival, dtype, layout, device):
    """Time forward and backward of the loss over three levels with alpha 1.

    The bytes to move are two reads of both features and one write of the gradient.
    """
    benchmark.group = f"loss, forward and backward, batch 16, {str(dtype)[6:]}, {layout}, {device}"
    pairs = [features(shape, device, dtype, layout) for shape in SHAPES]
    teachers, students = [t for t, _ in pairs], [s.requires_grad_() for _, s in pairs]
    moved = 5 * sum(t.nbytes for t in teachers)
    if rival == "copy of the same bytes":
        source = torch.randn(moved // 2 // dtype.itemsize, device=device).to(dtype)
        target = torch.empty_like(source).copy_(source)
        return timed(lambda: target.copy_(source), moved)
    function = loss_rivals()[rival]

    def step():
        for s in students:
            s.grad = None
        function(teachers, students).backward()

    return timed(step, moved, rounds=5 if rival == "reference" else 15)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("region", ["none", "all points", "half of the points"])
def test_loss_inside(timed, benchmark, region, layout, device):
    """Time forward and backward of the loss over three levels, alpha 1, of the points inside a region of interest."""
    benchmark.group = f"loss with a region of interest, forward and backward, batch 16, {layout}, {device}"
    pairs = [features(shape, device, layout=layout) for shape in SHAPES]
    teachers, students = [t for t, _ in pairs], [s.requires_grad_() for _, s in pairs]
    inside = torch.ones(1, 256, 256, dtype=torch.bool, device=device)
    if region == "half of the points":
        inside[:, :, 128:] = False
    masks = None if region == "none" else [pool_inside(inside, size) for size in LEVELS]

    def step():
        for s in students:
            s.grad = None
        hard_mined_cosine(teachers, students, deviation(1.0), inside=masks).backward()

    return timed(step, 5 * sum(t.nbytes for t in teachers), rounds=15)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kernel", ["ours", "oracle"])
@pytest.mark.parametrize("op", ["cosine_sums", "cosine_sums_backward"])
def test_op(timed, benchmark, op, kernel, dtype, layout, shape, device):
    """Time one operator on one level."""
    benchmark.group = f"{op} {shape}, {str(dtype)[6:]}, {layout}, {device}"
    teacher, student = features(shape, device, dtype, layout)
    function = getattr(torch.ops.recontrast if kernel == "ours" else reference, op)
    if op == "cosine_sums":
        return timed(lambda: function(teacher, student), teacher.nbytes * 2, rounds=9)
    points = point_distance(teacher, student)
    grad = torch.randn(3, *points.shape, device=device) * deviation(1.0)(points, points)
    return timed(lambda: function(grad, teacher, student), teacher.nbytes * 3, rounds=9)


NORM_SHAPE = SHAPES[0]


def norm_rivals(mode, has_residual, weight, bias):
    """Return the implementations of BatchNorm, residual add and ReLU by name."""
    mean, var = torch.zeros_like(weight), torch.ones_like(weight)
    training = mode == "train"

    def stock(x, residual):
        y = F.batch_norm(x, mean, var, weight, bias, training, 0.1)
        return F.relu(y.add_(residual) if has_residual else y, inplace=True)

    def ours(x, residual):
        statistics = {} if training else {"mean": mean, "var": var}
        return ops.norm_act(x, residual if has_residual else None, weight, bias, act="relu", **statistics)[0]

    return {"stock": stock, "stock, compiled": torch.compile(stock, fullgraph=True), "ours": ours}


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("rival", ["stock", "stock, compiled", "ours", "copy of the same bytes"])
def test_norm_act(timed, benchmark, rival, has_residual, mode, dtype, layout, device):
    """Time forward and backward of BatchNorm, residual add and ReLU on the finest level, batch 16.

    The tensors to move, in training mode: forward reads x twice and writes y; backward reads grad and x twice and
    writes the gradient of x. Eval mode reads each once. A residual is one read more in forward, and in backward one
    read of y and one write of its gradient, which the second pass reads in place of grad.
    """
    name = f"BatchNorm, {'add, ' if has_residual else ''}ReLU, {mode}"
    benchmark.group = f"{name}, {NORM_SHAPE}, {str(dtype)[6:]}, {layout}, {device}"
    x, residual, grad = (
        torch.randn(NORM_SHAPE, device=device).to(dtype).contiguous(memory_format=FORMATS[layout]) for _ in range(3)
    )
    moved = ((8 if mode == "train" else 5) + 3 * has_residual) * x.nbytes
    if rival == "copy of the same bytes":
        source = torch.randn(moved // 2 // dtype.itemsize, device=device).to(dtype)
        target = torch.empty_like(source).copy_(source)
        return timed(lambda: target.copy_(source), moved)
    weight, bias = (torch.rand(NORM_SHAPE[1], device=device, requires_grad=True) for _ in range(2))
    function = norm_rivals(mode, has_residual, weight, bias)[rival]
    leaves = [t.requires_grad_() for t in (x, residual)]

    def step():
        for t in (*leaves, weight, bias):
            t.grad = None
        function(*leaves).backward(grad)

    return timed(step, moved)


def blurred(maps):
    """Upstream's blur: SciPy on the CPU, one image after the other."""
    return torch.stack([torch.from_numpy(gaussian_filter(m, sigma=4)) for m in maps.cpu().numpy()])


def interpolate_and_scipy(distances, out=OUT):
    maps = sum(F.interpolate(d.unsqueeze(1), size=out, mode="bilinear", align_corners=True) for d in distances)[:, 0]
    maps = blurred(maps)
    return maps, maps.amax(dim=(1, 2))


@pytest.mark.parametrize("rival", ["interpolate and SciPy", "ours, fused", "ours, matmul"])
def test_map(timed, benchmark, rival, device):
    """Time maps and scores of 16 images at 256 px from the point distances of six pairs."""
    benchmark.group = f"maps and scores from distances, 16 images, 256 px, six pairs, {device}"
    distances = [torch.rand(16, *size, device=device) for size in LEVELS * 2]
    if rival == "interpolate and SciPy":
        return timed(lambda: interpolate_and_scipy(distances))
    amap = AnomalyMap(LEVELS, OUT, method=rival.split()[-1])
    return timed(lambda: amap.from_distances(distances))


@pytest.mark.parametrize("region", ["none", "all pixels", "half of the pixels"])
def test_map_inside(timed, benchmark, region, device):
    """Time maps and scores of 16 images at 256 px from the distances of six pairs, in a region of interest."""
    benchmark.group = f"maps and scores in a region of interest, 16 images, 256 px, six pairs, {device}"
    distances = [torch.rand(16, *size, device=device) for size in LEVELS * 2]
    inside = torch.ones(1, *OUT, dtype=torch.bool, device=device)
    if region == "half of the pixels":
        inside[:, :, 128:] = False
    amap = AnomalyMap(LEVELS, OUT)
    return timed(lambda: amap.from_distances(distances, None if region == "none" else inside))


@pytest.mark.parametrize("rival", ["interpolate and SciPy", "ours, fused", "ours, matmul"])
def test_map_from_features(timed, benchmark, rival, device):
    """Time maps and scores from the features, as evaluation computes them for a batch."""
    benchmark.group = f"maps and scores from features, 16 images, 256 px, six pairs, {device}"
    pairs = [features(shape, device) for shape in SHAPES * 2]
    if rival == "interpolate and SciPy":
        return timed(lambda: interpolate_and_scipy([1 - F.cosine_similarity(t, s) for t, s in pairs]), rounds=5)
    amap = AnomalyMap(LEVELS, OUT, method=rival.split()[-1])
    return timed(lambda: amap.maps_and_scores(pairs))
