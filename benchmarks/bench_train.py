"""Training step: the reference and ours with each option; images/s and peak memory.

    python benchmarks/bench_train.py --backbone resnet18 --batch 8
    python benchmarks/bench_train.py --backbone wide_resnet50_2 --batch 4

Each configuration runs in its own process, so that its peak memory is its own. The configurations take turns for
`--rounds` rounds, so that other load on the machine affects all of them. The reference (`tests/upstream.py`,
`tests/upstream_model.py`) uses float32, NCHW, both heads on the whole batch, the hook with boolean indexing, and AdamW
without fusion. Both sides receive decoded images. Weights are random, since a step costs the same with any weights.
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
from training_step import prepare_step
from upstream_model import upstream_from

from recontrast.recipes.paper import RECIPES
from recontrast.runtime.device import resolve_device
from recontrast.training.train import build_model, train_step

WAYS = {  # name -> recipe fields; "cache" enables the teacher cache
    "reference": None,
    "ours": {"channels_last": False},
    "channels_last": {"channels_last": True},
    "bfloat16": {"channels_last": False, "precision": "bfloat16"},
    "compile": {"channels_last": False, "compile": True},
    "cache": {"channels_last": False, "cache": True},
    "bfloat16, channels_last": {"channels_last": True, "precision": "bfloat16"},
    "channels_last, norms fused": {"channels_last": True, "fused_norm": True},
    "bfloat16, channels_last, norms fused": {
        "channels_last": True,
        "precision": "bfloat16",
        "fused_norm": True,
    },
    "channels_last, cache": {"channels_last": True, "cache": True},
    "bfloat16, channels_last, cache": {"channels_last": True, "precision": "bfloat16", "cache": True},
    "bfloat16, channels_last, norms fused, cache": {
        "channels_last": True,
        "precision": "bfloat16",
        "fused_norm": True,
        "cache": True,
    },
    "bfloat16, channels_last, compile": {"channels_last": True, "precision": "bfloat16", "compile": True},
    "all": {"channels_last": True, "precision": "bfloat16", "compile": True, "cache": True},
}
ALPHA = 1.0  # after the ramp, where most of the steps are


def reference_step(recipe, device):
    """Return the reference's training step on batches (N, 3, H, W), and its memory format."""
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
    """Return our training step, as in `recontrast.training.train.train`, and its memory format."""
    network, optimisers, layout, teacher = prepare_step(
        build_model(recipe, "any"), recipe, device, cached=recipe.batch if cached else 0
    )

    def once(images, index):
        features = teacher(index, images) if teacher else None
        return train_step(network, optimisers, images, ALPHA, recipe, [len(images)], features)

    return once, layout


def measure(args):
    """Print the seconds of each step of one configuration and its peak memory as one line of JSON."""
    device = resolve_device(args.device)
    torch.manual_seed(0)
    switches = dict(WAYS[args.way] or {})
    cached = switches.pop("cache", False)
    recipe = RECIPES["mvtec"].replace(
        backbone=args.backbone, weights="random", batch=args.batch, size=args.size, encoder_bn="eval", **switches
    )
    once, layout = reference_step(recipe, device) if WAYS[args.way] is None else our_step(recipe, device, cached)
    images = torch.randn(args.batch, 3, args.size, args.size, device=device).contiguous(memory_format=layout)
    index, seconds = np.arange(args.batch), []
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(args.warm + args.steps):
        wait()
        start = time.perf_counter()
        once(images, index)
        wait()
        seconds.append(time.perf_counter() - start)
    peak = (
        torch.cuda.max_memory_allocated()
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    print(json.dumps({"first": seconds[0], "seconds": seconds[args.warm :], "peak": peak}))


def arguments():
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18", help="resnet18, resnet50 or wide_resnet50_2")
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--size", type=int, default=256, help="pixels")
    parser.add_argument("--steps", type=int, default=4, help="timed steps per round")
    parser.add_argument("--warm", type=int, default=2, help="untimed steps before them")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--way", help=argparse.SUPPRESS)  # set in the child process that measures one configuration
    return parser.parse_args()


def main():
    """Measure all configurations in turn, round by round, and print the table."""
    args = arguments()
    if args.way:
        return measure(args)
    results = {way: [] for way in args.ways}
    for _ in range(args.rounds):
        for way in args.ways:
            process = subprocess.run([sys.executable, *sys.argv, "--way", way], capture_output=True, text=True)
            if process.returncode:
                sys.exit(f"{way}: {process.stderr}")
            results[way].append(json.loads(process.stdout.splitlines()[-1]))
            print(way, [round(s, 3) for s in results[way][-1]["seconds"]], file=sys.stderr)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}: {args.backbone}, batch "
          f"{args.batch}, {args.size} px, medians of {args.rounds} x {args.steps} steps\n")  # fmt: skip
    print("| configuration | ms per step (min to max) | images/s | x reference | peak memory, MB | first step, s |")
    print("|---|---:|---:|---:|---:|---:|")
    medians = {way: statistics.median(chain(*(run["seconds"] for run in runs))) for way, runs in results.items()}
    for way, runs in results.items():
        steps = sorted(chain(*(run["seconds"] for run in runs)))
        ratio = f"{medians['reference'] / medians[way]:.2f}" if "reference" in medians else "-"
        span = f"{1e3 * medians[way]:.0f} ({1e3 * steps[0]:.0f} to {1e3 * steps[-1]:.0f})"
        peak = max(run["peak"] for run in runs) / 1e6
        first = statistics.median(run["first"] for run in runs)
        print(f"| {way} | {span} | {args.batch / medians[way]:.1f} | {ratio} | {peak:.0f} | {first:.1f} |")


if __name__ == "__main__":
    main()
