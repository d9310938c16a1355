"""Stages of `gpu.py` that measure training steps, and what takes their time."""

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import upstream
from measurements import Function, Run
from training_step import prepare_step
from upstream_model import upstream_from

from recontrast import ReContrast
from recontrast.data.images import normalise
from recontrast.float32 import convolution_precision
from recontrast.recipes.paper import RECIPES
from recontrast.training.cuda_graph import GraphedStep
from recontrast.training.device_images import DeviceImages
from recontrast.training.train import build_model, train_step

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
    prepared = prepare_step(model, recipe, run.device, cached=len(pixels) if cached else 0)
    channels_last, teacher = prepared.layout == torch.channels_last, prepared.teacher
    device_images = DeviceImages(pixels, run.device)
    index = np.random.default_rng(1).permutation(len(pixels))[:batch]

    def step(optimisers, images, alpha, features):
        return train_step(prepared.network, optimisers, images, alpha, recipe, frozen_features=features)

    call = GraphedStep(step, batch, run.device) if recipe.graph else step

    def work():
        with convolution_precision(recipe.tf32), tuned_convolutions(tuned):
            images = normalise(device_images[index], model.mean, model.std, channels_last=channels_last)
            return call(prepared.optimisers, images, 1.0, None if teacher is None else teacher(index, images))

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
