"""Images a second and AUROC of every way to run a trained detector: views, precision, folding, layout, compiling.

    python benchmarks/inference.py --data FOLDER --checkpoint runs/all/checkpoint.pt --out inference.json

Speed: decoded images in, scores out (network and maps), one batch for each way in each round, so that what else the
machine does meets all of them alike; medians over the rounds, and the time of the first batch, which compiles.
Accuracy: all test images of FOLDER (MVTec AD layout, one detector for all), mean over the categories; compiling changes
rounding alone and is not evaluated again. bfloat16 is left out where the device has no kernels for it (`--bfloat16`
asks for it all the same), and so is compiling with `--no-compile`.
"""

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recontrast import checkpoint
from recontrast.data import datasets
from recontrast.data.atomic import replace_file
from recontrast.data.cache import ImageCache
from recontrast.evaluation.evaluate import evaluate
from recontrast.inference.infer import infer
from recontrast.inference.options import InferenceOptions
from recontrast.runtime.device import is_bfloat16_fast, resolve_device

SHOWN = ("i_auroc", "p_auroc", "aupro")


def passed(network: Any, images: Any, recipe: Any, batch: int) -> float:
    """Seconds from decoded images to scores on the host."""
    begun = time.perf_counter()
    for _, scores in infer(network, images, recipe, batch=batch):
        scores.cpu()
    return time.perf_counter() - begun


def ways(precisions: list[str], compiled: bool) -> list[InferenceOptions]:
    """All that is measured; compiling and the other layout only of what is folded."""
    made = [
        InferenceOptions(views=views, precision=precision, folded=folded)
        for precision, folded, views in itertools.product(precisions, (False, True), ("both", "trained", "frozen"))
    ]
    made += [InferenceOptions("both", precision, channels_last=False, folded=True) for precision in precisions]
    return made + [
        InferenceOptions(views=views, precision=precision, compiled=True)
        for precision, views in itertools.product(precisions if compiled else [], ("both", "trained"))
    ]


def name_of(way: InferenceOptions) -> str:
    """Such as "trained, float32, folded"."""
    layout = ", NCHW" * (way.channels_last is False)
    return f"{way.views}, {way.precision}" + ", folded" * bool(way.folded) + layout + ", compiled" * way.compiled


def main() -> None:
    """Measure, print a table and leave a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of categories in MVTec AD layout")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--device", default=None)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, help="at most so many of a category for the AUROC; default: all")
    parser.add_argument("--no-accuracy", action="store_true", help="speed alone")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--bfloat16", action="store_true", help="also where it does not pay")
    parser.add_argument("--out", type=Path, default=Path("inference.json"))
    asked = parser.parse_args()
    device = resolve_device(asked.device)
    groups = {name: [s for s in group if s.split == "test"] for name, group in datasets.load(asked.data).items()}
    if asked.images is not None:
        groups = {name: group[:: max(1, -(-len(group) // asked.images))] for name, group in groups.items()}
    tests = list(itertools.chain(*groups.values()))
    precisions = ["float32"] + ["bfloat16"] * (asked.bfloat16 or is_bfloat16_fast(device))
    rows: dict[str, dict[str, Any]] = {}
    networks = {}
    trained = checkpoint.load(asked.checkpoint).recipe
    images = ImageCache(tests[: asked.batch], trained.size, trained.crop)[:]
    images = np.resize(images, (asked.batch, *images.shape[1:]))
    for way in ways(precisions, not asked.no_compile):
        model, trained, _ = checkpoint.load_model(asked.checkpoint, device)
        recipe = way.apply_to(trained)
        networks[name_of(way)] = way, way.build_network(model, recipe, trained), recipe
        first = passed(networks[name_of(way)][1], images, recipe, asked.batch)
        rows[name_of(way)] = {**asdict(way), "first_batch": first, "seconds": []}
        print(f"{name_of(way)}: ready, first batch {first:.1f} s", file=sys.stderr, flush=True)
    for number in range(asked.rounds):
        for name, (_, network, recipe) in networks.items():
            rows[name]["seconds"].append(passed(network, images, recipe, asked.batch))
        print(f"round {number + 1} of {asked.rounds}", file=sys.stderr, flush=True)
    for name, (way, network, recipe) in networks.items():
        if not (asked.no_accuracy or way.compiled):
            mean = evaluate(network, groups, recipe, batch=asked.batch).mean
            rows[name] |= {key: getattr(mean, key) for key in SHOWN}
            print(f"{name}: {rows[name]['i_auroc']}", file=sys.stderr, flush=True)
    card = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    record = {"device": card, "threads": torch.get_num_threads(), "torch": torch.__version__, "batch": asked.batch}
    record |= {"date": date.today().isoformat(), "images": len(tests), "ways": rows}
    with replace_file(asked.out) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
    print("| views, precision | images/s | x the first | I-AUROC | P-AUROC | AUPRO |\n|---|" + "---:|" * 5)
    base = statistics.median(next(iter(rows.values()))["seconds"])
    for name, row in rows.items():
        median = statistics.median(row["seconds"])
        row_of = ["-" if (v := row.get(key)) is None else f"{100 * v:.2f}" for key in SHOWN]
        print(f"| {name} | {asked.batch / median:.2f} | {base / median:.2f} | " + " | ".join(row_of) + " |")


if __name__ == "__main__":
    main()
