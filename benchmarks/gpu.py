"""Stages of `gpu.sh`: GPU measurements, written to one JSON file.

    python benchmarks/gpu.py loss --out results.json

GPU work is timed with CUDA events, and the figures are medians of many runs. Each row is written as soon as it is
measured, so an interrupted run keeps its results. The compared implementations are those of `bench_ops.py`. Ratios
compare rows of one run on one GPU. `--device cpu --tiny` runs every code path without a GPU.
"""

import argparse
import copy
import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# The restated reference is in tests/.
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
sys.path.insert(2, str(Path(__file__).resolve().parents[1] / "tests"))
import gpu_rivals
import upstream
from bench_ops import FORMATS, SHAPES, features, interpolate_and_scipy, loss_rivals, norm_rivals
from measurements import Function, Run, table
from upstream_model import upstream_from

from recontrast import AnomalyMap, ReContrast, deviation, hard_mined_cosine, ops, reference
from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample
from recontrast.data.images import normalise, read_mask
from recontrast.evaluation.evaluate import evaluate
from recontrast.float32 import convolution_precision
from recontrast.inference.infer import infer
from recontrast.inference.options import InferenceOptions
from recontrast.loss import point_distances
from recontrast.models.norm_act import fuse_norm_act
from recontrast.recipes.paper import RECIPES
from recontrast.runtime.device import move_model
from recontrast.training.cuda_graph import GraphedStep, record_graph
from recontrast.training.device_images import DeviceImages
from recontrast.training.optimisers import build_optimisers
from recontrast.training.teacher_cache import TeacherCache
from recontrast.training.train import build_model, train_step

COPY = 2**31  # bytes of the copy that measures the bandwidth, far more than any cache holds


# ---- loss --------------------------------------------------------------------


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


# ---- map ---------------------------------------------------------------------


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


# ---- norms -------------------------------------------------------------------


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


# ---- training ----------------------------------------------------------------

CACHED = "teacher cache"  # holds the features of all images before timing
TUNED = "cudnn.benchmark"  # cuDNN times its algorithms
BFLOAT16 = {"channels_last": True, "precision": "bfloat16"}
WAYS = {  # the most useful rows first
    "ours + graph": {**BFLOAT16, "graph": True},
    f"ours, bfloat16, graph, {CACHED}": {**BFLOAT16, "graph": True},
    f"ours, bfloat16, graph, {TUNED}": {**BFLOAT16, "graph": True},
    "ours, bfloat16, graph, norms fused": {**BFLOAT16, "graph": True, "fused_norm": True},
    f"ours, bfloat16, graph, norms fused, {CACHED}, {TUNED}": {**BFLOAT16, "graph": True, "fused_norm": True},
    "ours + bfloat16": BFLOAT16,
    "ours + channels_last": {"channels_last": True},
    "ours": {"channels_last": False},
    f"ours, bfloat16, {CACHED}, no graph": BFLOAT16,
    "ours, float32, graph": {"channels_last": True, "graph": True},
    f"ours, float32, graph, {TUNED}": {"channels_last": True, "graph": True},
    "ours, full float32": {"channels_last": True, "tf32": False},
    "ours, bfloat16, graph, compiled": {**BFLOAT16, "graph": True, "compile": True},  # takes a minute to compile
}


def training(run: Run) -> None:
    """Measure whole steps of the recipe mvtec with random weights: the reference, then ours option by option."""
    backbone, size = ("resnet18", 64) if run.tiny else ("wide_resnet50_2", 256)
    base = RECIPES["mvtec"].replace(backbone=backbone, weights="random", encoder_bn="train", size=size)
    pixels = np.random.default_rng(0).integers(0, 256, (2 if run.tiny else 160, size, size, 3), dtype=np.uint8)
    blocking = os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
    initial = build_model(base, "carpet")  # built once, since drawing random weights takes longer than a step
    for batch in (2,) if run.tiny else (64, 16):
        group = f"training step, {backbone}, {size} px, batch {batch}"
        name = "reference, launches blocked, as its scripts run it" if blocking else "reference"
        make = partial(reference_step, run, initial, base, pixels, batch)
        run.measure(group, name, make=make, images=batch, seconds=1.0, most=10)
        for name, changes in {} if blocking else WAYS.items():
            if run.is_out_of_time():
                return
            recipe = base.replace(batch=batch, **changes)
            if recipe.graph and not run.cuda:
                continue
            make = partial(our_step, run, initial, recipe, pixels, batch, cached=CACHED in name, tuned=TUNED in name)
            run.measure(group, name, make=make, images=batch, seconds=1.0, most=10)
            if run.cuda:
                torch.cuda.empty_cache()


def reference_step(run: Run, initial: ReContrast, recipe, pixels: np.ndarray, batch: int) -> Function:
    """Return the reference's step: float images copied each time, two plain AdamW, the loss read each time.

    As in its scripts, cuDNN uses deterministic algorithms.
    """
    model = upstream_from(initial, recipe.backbone).to(run.device)
    model.train()
    images = normalise(pixels, initial.mean, initial.std)
    decoder = [*model.bottleneck.parameters(), *model.decoder.parameters()]
    both = [torch.optim.AdamW(decoder, lr=2e-3), torch.optim.AdamW(model.encoder.parameters(), lr=1e-5)]

    def work():
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
            pairs = list(zip(*model(images[:batch].to(run.device)), strict=True))
            value = upstream.pairs_loss(pairs, 1.0)
            for optimiser in both:
                optimiser.zero_grad()
            value.backward()
            for optimiser in both:
                optimiser.step()
            return value.item()

    return work


def our_step(
    run: Run,
    initial: ReContrast,
    recipe,
    pixels: np.ndarray,
    batch: int,
    cached: bool = False,
    tuned: bool = False,
) -> Function:
    """Return our step as in `recontrast.training.train`, including batch selection and normalisation."""
    model = copy.deepcopy(initial)
    channels_last = move_model(model, run.device, recipe.channels_last) == torch.channels_last
    model.train()
    both = build_optimisers(model, recipe, run.device)
    if recipe.fused_norm:
        fuse_norm_act(model)
    network = torch.compile(model, dynamic=False) if recipe.compile else model
    device_images = DeviceImages(pixels, run.device)

    index = np.random.default_rng(1).permutation(len(pixels))[:batch]
    teacher = None
    if cached:
        teacher = TeacherCache(model.frozen, len(pixels), 2**34, autocast=recipe.precision == "bfloat16")

    def step(optimisers, images, alpha, features):
        return train_step(network, optimisers, images, alpha, recipe, frozen_features=features)

    call = GraphedStep(step, batch, run.device) if recipe.graph else step

    def work():
        with convolution_precision(recipe.tf32), tuned_convolutions(tuned):
            images = normalise(device_images[index], model.mean, model.std, channels_last=channels_last)
            return call(both, images, 1.0, None if teacher is None else teacher(index, images))

    if recipe.graph:
        for _ in range(4):
            work()
    return work


@contextmanager
def tuned_convolutions(tuned: bool) -> Iterator[None]:
    """Let cuDNN time its algorithms for each shape, if ``tuned``."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = tuned
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def profile(run: Run) -> None:
    """Write what takes the time of three training steps: the kernels, by their time on the device."""
    backbone, size, batch = ("resnet18", 64, 2) if run.tiny else ("wide_resnet50_2", 256, 64)
    recipe = RECIPES["mvtec"].replace(
        backbone=backbone, weights="random", encoder_bn="train", size=size, batch=batch, **BFLOAT16
    )
    pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    work = our_step(run, build_model(recipe, "carpet"), recipe, pixels, batch)
    for _ in range(3):
        work()
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU, kind.CUDA] if run.cuda else [kind.CPU]) as profiler:
        for _ in range(3):
            work()
        if run.cuda:
            torch.cuda.synchronize()
    name = "self_device_time_total" if run.cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events) or 1
    rows = [
        {
            "name": event.key[:120],
            "ms": round(getattr(event, name) / 3e3, 3),
            "share": round(getattr(event, name) / total, 4),
        }
        for event in events[:40]
    ]
    run.record["profile"] = {"what": f"step of {backbone}, {size} px, batch {batch}, bfloat16", "rows": rows}
    run.save()
    for row in rows[:15]:
        print(f"{row['ms']:9.3f} ms {100 * row['share']:5.1f} %  {row['name']}")


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


# ---- evaluation --------------------------------------------------------------


def evaluation(run: Run) -> None:
    """Measure images/s from decoded images to maps and scores: ours with batch 64, the reference with batch 1."""
    backbone, size, count = ("resnet18", 64, 4) if run.tiny else ("wide_resnet50_2", 256, 256)
    batch = 2 if run.tiny else 64
    base = RECIPES["mvtec"].replace(backbone=backbone, weights="random", encoder_bn="eval", size=size)
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    group = f"evaluation before metrics, {backbone}, {size} px"
    initial = build_model(base, "carpet")
    model = upstream_from(initial, backbone).to(run.device)
    model.eval()
    few = normalise(images[: max(count // 16, 2)], initial.mean, initial.std)

    def one_by_one():
        with torch.no_grad():
            for image in few:
                pairs = list(zip(*model(image[None].to(run.device)), strict=True))
                upstream.anomaly_map_sum(pairs, (size, size)).max()

    run.measure(group, "reference, batch 1", one_by_one, images=len(few), seconds=1.0, most=5)
    for name, way in {  # the compiled one comes last, since it may take all remaining time
        "ours + bfloat16 + folded": InferenceOptions(precision="bfloat16"),
        "ours, NCHW": InferenceOptions(channels_last=False, folded=False),
        "ours": InferenceOptions(folded=False),
        "ours + folded": InferenceOptions(),
        "ours + bfloat16": InferenceOptions(precision="bfloat16", folded=False),
        "ours, trained view + bfloat16 + folded": InferenceOptions(views="trained", precision="bfloat16"),
        "ours + bfloat16 + folded + compiled": InferenceOptions(precision="bfloat16", compiled=True),
    }.items():
        if run.is_out_of_time() or (way.compiled and run.tiny):
            continue
        recipe = way.apply_to(base)
        network = way.build_network(copy.deepcopy(initial).to(run.device), recipe, base)

        def work(network=network, recipe=recipe):
            return [scores for _, scores in infer(network, images, recipe, batch=batch)]

        run.measure(group, f"{name}, batch {batch}", work, images=count, seconds=1.0, most=5)


def whole(run: Run) -> None:
    """Measure a whole evaluation from files to pixel metrics: exact, streaming on the device, and the reference."""
    backbone, size, count = ("resnet18", 64, 8) if run.tiny else ("wide_resnet50_2", 256, 256)
    base = RECIPES["mvtec"].replace(backbone=backbone, weights="random", encoder_bn="eval", size=size)
    group = f"whole evaluation, {backbone}, {size} px, {count} images in files"
    with tempfile.TemporaryDirectory() as folder:
        samples = draw_samples(Path(folder), count, size)
        few = samples[:: max(count // 8, 1) | 1]  # an odd step selects good and defective images
        initial = build_model(base, "carpet")
        model = upstream_from(initial, backbone).to(run.device)
        model.eval()
        images = normalise(ImageCache(few, size)[:], initial.mean, initial.std)  # decoding is not timed
        empty = np.zeros((size, size), bool)
        masks = [empty if s.mask is None else read_mask(s.mask, size=size) for s in few]
        truth, labels = torch.from_numpy(np.stack(masks))[:, None], np.array([s.label for s in few])

        def pairs(batch):
            return list(zip(*model(batch.to(run.device)), strict=True))

        def loop():
            return upstream.evaluate(pairs, images, truth, labels)

        run.measure(group, f"reference, {len(few)} of them", loop, images=len(few), seconds=1.0, most=1)
        for name, way, streaming in (
            ("ours, exact", InferenceOptions(), False),
            ("ours, streaming, bfloat16", InferenceOptions(precision="bfloat16"), True),
            ("ours, exact, bfloat16", InferenceOptions(precision="bfloat16"), False),
            ("ours, streaming", InferenceOptions(), True),
        ):
            if run.is_out_of_time():
                return
            recipe = way.apply_to(base)
            network = way.build_network(copy.deepcopy(initial).to(run.device), recipe, base)
            work = partial(evaluate, network, samples, recipe, batch=2 if run.tiny else 64, streaming=streaming)
            run.measure(group, name, work, images=count, seconds=1.0, most=3)


def draw_samples(folder: Path, count: int, size: int) -> list[Sample]:
    """Draw test images of noise; every second one has a square and a mask of it."""
    random, samples = np.random.default_rng(0), []
    for number in range(count):
        pixels, mask = random.integers(0, 256, (size, size, 3), dtype=np.uint8), np.zeros((size, size), np.uint8)
        path, mask_path = folder / f"{number:04}.png", None
        if number % 2:
            top, left = random.integers(0, size - size // 8, 2)
            mask[top : top + size // 8, left : left + size // 8] = 255
            pixels[mask > 0] = 0
            mask_path = folder / f"{number:04}_mask.png"
            Image.fromarray(mask).save(mask_path, compress_level=1)
        Image.fromarray(pixels).save(path, compress_level=1)
        kind = "square" if number % 2 else "good"
        samples.append(Sample(path, mask_path, number % 2, "drawn", "test", kind))
    return samples


STAGES = {
    "loss": loss,
    "map": maps,
    "norms": norms,
    "train": training,
    "profile": profile,
    "kernels": kernels,
    "evaluate": evaluation,
    "rivals": gpu_rivals.rivals,
    "whole": whole,
}


def main() -> None:
    """Run one stage or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=[*STAGES, "table"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes that run on a CPU in seconds, to test every code path"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], help="measure only rows whose name contains one of these texts"
    )
    parser.add_argument("--seconds", type=float, default=600, help="time limit after which no row starts")
    args = parser.parse_args()
    run = Run(args)
    if args.stage == "table":
        print(table(run.record))
        return
    torch.manual_seed(0)
    STAGES[args.stage](run)


if __name__ == "__main__":
    main()
