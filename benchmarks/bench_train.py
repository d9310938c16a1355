"""A step of training: the reference form beside ours, switch by switch and together; images/s and peak memory.

    python benchmarks/bench_train.py --backbone resnet18 --batch 8
    python benchmarks/bench_train.py --backbone wide_resnet50_2 --batch 4

Every way runs in a process of its own, so that the largest resident size is its own; the ways take turns, `--rounds`
times, so that what else the machine does falls on all of them. The reference (`tests/upstream.py`,
`tests/upstream_model.py`) has float32, NCHW, both heads on the whole batch, the hook with its boolean index, and AdamW
without fusion; its images come decoded, as ours do. Weights are random: a step costs the same whatever they are.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the restated reference lives there
import upstream
from upstream_model import upstream_from

from recontrast.recipes.paper import RECIPES
from recontrast.runtime.device import move_model, resolve_device
from recontrast.training.optimisers import build_optimisers
from recontrast.training.teacher_cache import TeacherCache
from recontrast.training.train import build_model, train_step

WAYS = {  # recipe fields and, as "cache", the teacher cache
    "reference": None,
    "ours": {"channels_last": False},
    "channels_last": {"channels_last": True},
    "bfloat16": {"channels_last": False, "precision": "bfloat16"},
    "compile": {"channels_last": False, "compile": True},
    "cache": {"channels_last": False, "cache": True},
    "bfloat16, channels_last": {"channels_last": True, "precision": "bfloat16"},
    "bfloat16, channels_last, cache": {"channels_last": True, "precision": "bfloat16", "cache": True},
    "bfloat16, channels_last, compile": {"channels_last": True, "precision": "bfloat16", "compile": True},
    "all": {"channels_last": True, "precision": "bfloat16", "compile": True, "cache": True},
}
ALPHA = 1.0  # after the ramp, where most of the steps are


def reference_step(recipe, device):
    """The reference's step on batches (N, 3, H, W)."""
    model = upstream_from(build_model(recipe, "any"), recipe.backbone.partition(".")[0]).to(device)
    model.train(encoder_bn_train=False)
    settings = {"betas": recipe.betas, "eps": recipe.eps, "weight_decay": recipe.weight_decay}
    both = [
        torch.optim.AdamW(list(chain(model.bottleneck.parameters(), model.decoder.parameters())), lr=2e-3, **settings),
        torch.optim.AdamW(list(model.encoder.parameters()), lr=1e-5, **settings),
    ]

    def once(images, index):
        value = upstream.pairs_loss(list(zip(*model(images), strict=True)), ALPHA)
        for optimiser in both:
            optimiser.zero_grad()
        value.backward()
        for optimiser in both:
            optimiser.step()
        return value.item()

    return once, torch.contiguous_format


def our_step(recipe, device, cached):
    """Ours, as `recontrast.training.train.train` makes it."""
    model = build_model(recipe, "any")
    layout = move_model(model, device, recipe.channels_last)
    both = build_optimisers(model.train(), recipe, device)
    network = torch.compile(model, dynamic=False) if recipe.compile else model
    bfloat16 = recipe.precision == "bfloat16"
    teacher = TeacherCache(model.frozen, recipe.batch, 2**34, autocast=bfloat16) if cached else None

    def once(images, index):
        known = teacher(index, images) if teacher else None
        return train_step(network, both, images, ALPHA, recipe, [len(images)], known)

    return once, layout


def measure(asked):
    """Seconds of each step of one way, and its largest memory, as one line of JSON."""
    device = resolve_device(asked.device)
    torch.manual_seed(0)
    switches = dict(WAYS[asked.way] or {})
    cached = switches.pop("cache", False)
    recipe = RECIPES["mvtec"].replace(
        backbone=asked.backbone, weights="random", batch=asked.batch, size=asked.size, encoder_bn="eval", **switches
    )
    once, layout = reference_step(recipe, device) if WAYS[asked.way] is None else our_step(recipe, device, cached)
    images = torch.randn(asked.batch, 3, asked.size, asked.size, device=device).contiguous(memory_format=layout)
    index, seconds = np.arange(asked.batch), []
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(asked.warm + asked.steps):
        wait()
        begun = time.perf_counter()
        once(images, index)
        wait()
        seconds.append(time.perf_counter() - begun)
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    print(json.dumps({"first": seconds[0], "seconds": seconds[asked.warm :], "peak": peak}))


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18", help="resnet18, resnet50 or wide_resnet50_2")
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--steps", type=int, default=4, help="that are timed, in each round")
    parser.add_argument("--warm", type=int, default=2, help="steps before them")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # of the one process that measures it
    return parser.parse_args()


def main():
    """Measure every way in turn, round after round, and print the table."""
    asked = arguments()
    if asked.way:
        return measure(asked)
    found = {way: [] for way in asked.ways}
    for _ in range(asked.rounds):
        for way in asked.ways:
            done = subprocess.run([sys.executable, *sys.argv, "--way", way], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{way}: {done.stderr}")
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(way, [round(s, 3) for s in found[way][-1]["seconds"]], file=sys.stderr)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}: {asked.backbone}, batch "
          f"{asked.batch}, {asked.size} px, medians of {asked.rounds} x {asked.steps} steps\n")  # fmt: skip
    print("| | ms a step (least to most) | images/s | x reference | peak memory, MB | first step, s |")
    print("|---|---:|---:|---:|---:|---:|")
    medians = {way: statistics.median(chain(*(run["seconds"] for run in runs))) for way, runs in found.items()}
    for way, runs in found.items():
        steps = sorted(chain(*(run["seconds"] for run in runs)))
        ratio = f"{medians['reference'] / medians[way]:.2f}" if "reference" in medians else "-"
        span = f"{1e3 * medians[way]:.0f} ({1e3 * steps[0]:.0f} to {1e3 * steps[-1]:.0f})"
        peak = max(run["peak"] for run in runs) / 1e6
        first = statistics.median(run["first"] for run in runs)
        print(f"| {way} | {span} | {asked.batch / medians[way]:.1f} | {ratio} | {peak:.0f} | {first:.1f} |")


if __name__ == "__main__":
    main()
