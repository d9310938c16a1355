"""Stages of `gpu.py` that measure operators: the loss, maps and scores, and fused norms."""

import itertools
from functools import partial

import torch
import upstream
from bench_ops import FORMATS, SHAPES, features, interpolate_and_scipy, loss_rivals, norm_rivals
from measurements import Function, Run

from recontrast import AnomalyMap, deviation, hard_mined_cosine, ops, reference
from recontrast.loss import point_distances
from recontrast.training.cuda_graph import record_graph

COPY = 2**31  # bytes of the copy that measures the bandwidth, far more than any cache holds


def unknown_rule(distances, all_distances):
    """Compute `deviation` as a rule unknown to the kernels, so that pairs run one by one with eager arithmetic."""
    return deviation(1.0)(distances, all_distances)


def eager_mathematics(teachers, students):
    """Compute the loss with one launch for the features of all pairs and eager operators for the rest."""
    sums = ops.cosine_sums_group([t.detach() for t in teachers], students)
    images, points = [t.shape[0] for t in students], [t.shape[2] * t.shape[3] for t in students]
    losses = []
    for part in reference.split_pairs(sums, images, points):
        d = 1 - reference.cosine(part.detach())
        part = part.detach() + deviation(1.0)(d, d) * (part - part.detach())
        losses.append((1 - reference.cosine(part.sum(2))).mean())
    return torch.stack(losses).sum()


def loss(run: Run) -> None:
    """Measure forward and backward of six WideResNet-50-2 pairs, with alpha 1 where no other is named.

    Compiled implementations come last. With alpha -3 no point is easy, as at the beginning of a training run.
    """
    sizes = [(n, c // 8, h // 4, w // 4) for n, c, h, w in SHAPES] if run.tiny else SHAPES
    batches, dtypes = (2,) if run.tiny else (64, 16, 256), (torch.float32, torch.bfloat16)
    for compiled, batch, dtype, layout in itertools.product((False, True), batches, dtypes, ("channels_last", "NCHW")):
        if run.is_out_of_time() or (compiled and ops.BACKEND[run.device.type] == "triton"):
            return
        group = f"loss, six pairs, batch {batch}, {str(dtype)[6:]}, {layout}"
        pairs = [features((batch, *size[1:]), run.device, dtype, layout) for size in sizes * 2]
        teachers, students = [t for t, _ in pairs], [s.requires_grad_() for _, s in pairs]
        del pairs
        measure_group(run, group, teachers, students, compiled)
        del teachers, students
        if run.cuda:
            torch.cuda.empty_cache()


def record_replay(work: Function) -> Function:
    """Record ``work`` as a CUDA graph and return a function that replays it."""
    for _ in range(3):
        work()
    replay, outputs = record_graph(work)
    return lambda: (replay(), outputs)


@torch.no_grad()
def hard_share(teachers: list, students: list) -> float:
    """Return the share of feature values that belong to hard points."""
    hard = total = 0
    for d, t in zip(point_distances(list(zip(teachers, students, strict=True))), teachers, strict=True):
        hard, total = hard + int((d >= d.mean() + d.std()).sum()) * t.shape[1], total + d.numel() * t.shape[1]
    return hard / total


def measure_group(run: Run, group: str, teachers: list, students: list, compiled: bool) -> None:
    """Measure all implementations of the loss on one set of pairs, or only the compiled one if ``compiled``."""
    volume, backend = sum(t.nbytes for t in teachers), ops.BACKEND[run.device.type]

    def backward_of(function):
        def work():
            for s in students:
                s.grad = None
            value = function(teachers, students)
            value.backward()
            return value

        return work

    moved, least = 5 * volume, None
    rivals = loss_rivals()
    if compiled:
        torch.compiler.reset()  # compile with constant shapes, as in training
        run.measure(group, "repaired, compiled", backward_of(rivals["repaired, compiled"]), moved=moved)
        return

    def ours(t, s, alpha=1.0):
        return hard_mined_cosine(t, s, deviation(alpha))

    if "channels_last" in group:  # easy points are not read in the backward pass
        least = volume * (3 + 2 * hard_share(teachers, students))
    run.measure(group, f"ours ({backend})", backward_of(ours), moved=moved, least=least)
    if run.cuda:
        make = partial(record_replay, backward_of(ours))
        run.measure(group, f"ours ({backend}), graph", make=make, moved=moved, least=least)
        make = partial(record_replay, backward_of(partial(ours, alpha=-3.0)))
        run.measure(group, f"ours ({backend}), graph, alpha -3", make=make, moved=moved)
        for s in students:
            s.grad = None  # the gradient is in memory of the graph
    if backend == "triton":
        return
    size = (COPY >> 10 if run.tiny else COPY) // 2 // teachers[0].itemsize
    source = torch.randn(size, device=run.device).to(teachers[0].dtype)
    target = torch.empty_like(source)
    run.measure(group, "copy", partial(target.copy_, source), moved=2 * source.nbytes)
    del source, target
    unfused = backward_of(lambda t, s: hard_mined_cosine(t, s, unknown_rule))
    run.measure(group, "ours, pair by pair", unfused, moved=moved)
    run.measure(group, "ours, one launch, eager mathematics", backward_of(eager_mathematics), moved=moved)
    run.measure(group, "repaired", backward_of(rivals["repaired"]), moved=moved)
    run.measure(group, "reference", backward_of(rivals["reference"]), moved=moved, seconds=0.4, most=10)


def maps(run: Run) -> None:
    """Measure maps and scores of 64 images at 256 px from the distances of six pairs."""
    batch, out = (2, 64) if run.tiny else (64, 256)
    sizes = [(c // 8, h // 4, w // 4) for _, c, h, w in SHAPES] if run.tiny else [s[1:] for s in SHAPES]
    levels = [size[1:] for size in sizes]
    distances = [torch.rand(batch, *size, device=run.device) for size in levels * 2]
    backend = ops.BACKEND[run.device.type]
    group = f"maps and scores from distances, {batch} images, {out} px"
    blur = upstream.gaussian_kernel(33, 4).to(run.device)

    def batched():
        up = torch.nn.functional.interpolate
        total = sum(up(d[:, None], size=(out, out), mode="bilinear", align_corners=True) for d in distances)
        total = torch.nn.functional.conv2d(torch.nn.functional.pad(total, (16,) * 4, mode="reflect"), blur)[:, 0]
        return total, total.amax((1, 2))

    def per_image():
        return [interpolate_and_scipy([d[n : n + 1] for d in distances], (out, out)) for n in range(batch)]

    fused, matmul = (AnomalyMap(levels, out, method=method) for method in ("fused", "matmul"))
    run.measure(group, f"ours, fused ({backend})", lambda: fused.from_distances(distances))
    if run.cuda:
        make = partial(record_replay, lambda: fused.from_distances(distances))
        run.measure(group, f"ours, fused ({backend}), graph", make=make)
    if backend == "triton":
        return
    run.measure(group, "ours, matmul", lambda: matmul.from_distances(distances))
    if run.cuda:
        run.measure(group, "ours, matmul, graph", make=partial(record_replay, lambda: matmul.from_distances(distances)))
    run.measure(group, "batched eager", batched)
    run.measure(group, "reference, image by image", per_image, seconds=0.4, most=5)


def norms(run: Run) -> None:
    """Measure forward and backward of BatchNorm, residual add and ReLU on the finest level of WideResNet-50-2."""
    backend = ops.BACKEND[run.device.type]
    kinds = itertools.product((torch.bfloat16, torch.float32), ("channels_last", "NCHW"), (False, True))
    for batch, (dtype, layout, has_residual) in itertools.product((2,) if run.tiny else (64, 16), kinds):
        if run.is_out_of_time():
            return
        shape = (batch, 32, 16, 16) if run.tiny else (batch, *SHAPES[0][1:])
        group = f"BatchNorm, {'add, ' if has_residual else ''}ReLU, batch {batch}, {str(dtype)[6:]}, {layout}"
        x, residual, grad = (
            torch.randn(shape, device=run.device, dtype=dtype).contiguous(memory_format=FORMATS[layout])
            for _ in range(3)
        )
        weight, bias = (torch.rand(shape[1], device=run.device, requires_grad=True) for _ in range(2))
        leaves = [x.requires_grad_(), residual.requires_grad_(), weight, bias]
        moved = (8 + 3 * has_residual) * x.nbytes
        rivals = norm_rivals("train", has_residual, weight, bias)
        names = (
            {"ours": f"ours ({backend})"} if backend == "triton" else {"ours": f"ours ({backend})", "stock": "stock"}
        )
        for rival, name in names.items():

            def work(function=rivals[rival], leaves=leaves, grad=grad):
                for t in leaves:
                    t.grad = None
                function(*leaves[:2]).backward(grad)
                return [t.grad for t in leaves]

            run.measure(group, name, work, moved=moved)
            if run.cuda:
                run.measure(group, f"{name}, graph", make=partial(record_replay, work), moved=moved)


def kernels(run: Run) -> None:
    """Run the loss once for each layout and dtype, for a profiler of kernels; nothing is timed."""
    sizes = [(n, c // 8, h // 4, w // 4) for n, c, h, w in SHAPES] if run.tiny else SHAPES
    batch = 2 if run.tiny else 64
    for dtype, layout in itertools.product((torch.bfloat16, torch.float32), ("channels_last", "NCHW")):
        pairs = [features((batch, *size[1:]), run.device, dtype, layout) for size in sizes * 2]
        teachers, students = [t for t, _ in pairs], [s.requires_grad_() for _, s in pairs]
        hard_mined_cosine(teachers, students, deviation(-3.0)).backward()
    if run.cuda:
        torch.cuda.synchronize()
