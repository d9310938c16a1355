"""Speed and metrics of a trained detector by inference options: views, precision, folding, layout, compilation.

    python benchmarks/inference.py --data FOLDER --checkpoint runs/all/checkpoint.pt --out inference.json

Speed is measured from decoded images to scores (network and maps). Each round runs one batch per configuration, so that
other load on the machine affects all of them. The figures are medians over the rounds, and the time of the first batch,
which includes compilation. Metrics use all test images of FOLDER (MVTec AD layout, one detector for all) and are means
over the categories. Compiled configurations are not evaluated, since compilation changes only rounding. bfloat16 is
skipped on devices without kernels for it, unless `--bfloat16` is given. `--no-compile` skips compilation.
"""

import argparse
import itertools
import statistics
import sys
import time
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurements import name_machine, write_record

from recontrast import checkpoint
from recontrast.data import datasets
from recontrast.data.cache import ImageCache
from recontrast.evaluation.evaluate import evaluate
from recontrast.inference.infer import infer
from recontrast.inference.options import InferenceOptions
from recontrast.runtime.device import is_bfloat16_fast, resolve_device

SHOWN = ("i_auroc", "p_auroc", "aupro")


def time_batch(network: Any, images: Any, recipe: Any, batch: int) -> float:
    """Return the seconds from decoded images to scores on the host."""
    start = time.perf_counter()
    for _, scores in infer(network, images, recipe, batch=batch):
        scores.cpu()
    return time.perf_counter() - start


def ways(precisions: list[str], compiled: bool) -> list[InferenceOptions]:
    """Return all configurations; compilation and NCHW are measured only with folding."""
    options = [
        InferenceOptions(views=views, precision=precision, folded=folded)
        for precision, folded, views in itertools.product(precisions, (False, True), ("both", "trained", "frozen"))
    ]
    options += [InferenceOptions("both", precision, channels_last=False, folded=True) for precision in precisions]
    return options + [
        InferenceOptions(views=views, precision=precision, compiled=True)
        for precision, views in itertools.product(precisions if compiled else [], ("both", "trained"))
    ]


def format_name(way: InferenceOptions) -> str:
    """Return a name such as "trained, float32, folded"."""
    layout = ", NCHW" * (way.channels_last is False)
    return f"{way.views}, {way.precision}" + ", folded" * bool(way.folded) + layout + ", compiled" * way.compiled


def main() -> None:
    """Measure all configurations, print a table and write a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of categories in MVTec AD layout")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--device", default=None)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, help="most images per category for the metrics; default: all")
    parser.add_argument("--no-accuracy", action="store_true", help="measure speed only")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--bfloat16", action="store_true", help="measure bfloat16 on every device")
    parser.add_argument("--out", type=Path, default=Path("inference.json"))
    args = parser.parse_args()
    device = resolve_device(args.device)
    groups = {name: [s for s in group if s.split == "test"] for name, group in datasets.load(args.data).items()}
    if args.images is not None:
        groups = {name: group[:: max(1, -(-len(group) // args.images))] for name, group in groups.items()}
    tests = list(itertools.chain(*groups.values()))
    precisions = ["float32"] + ["bfloat16"] * (args.bfloat16 or is_bfloat16_fast(device))
    rows: dict[str, dict[str, Any]] = {}
    networks = {}
    trained = checkpoint.load(args.checkpoint).recipe
    images = ImageCache(tests[: args.batch], trained.size, trained.crop)[:]
    images = np.resize(images, (args.batch, *images.shape[1:]))
    for way in ways(precisions, not args.no_compile):
        model, trained, _ = checkpoint.load_model(args.checkpoint, device)
        recipe = way.apply_to(trained)
        networks[format_name(way)] = way, way.build_network(model, recipe, trained), recipe
        first = time_batch(networks[format_name(way)][1], images, recipe, args.batch)
        rows[format_name(way)] = {**asdict(way), "first_batch": first, "seconds": []}
        print(f"{format_name(way)}: ready, first batch {first:.1f} s", file=sys.stderr, flush=True)
    for number in range(args.rounds):
        for name, (_, network, recipe) in networks.items():
            rows[name]["seconds"].append(time_batch(network, images, recipe, args.batch))
        print(f"round {number + 1} of {args.rounds}", file=sys.stderr, flush=True)
    for name, (way, network, recipe) in networks.items():
        if not (args.no_accuracy or way.compiled):
            mean = evaluate(network, groups, recipe, batch=args.batch).mean
            rows[name] |= {key: getattr(mean, key) for key in SHOWN}
            print(f"{name}: {rows[name]['i_auroc']}", file=sys.stderr, flush=True)
    record = {"device": name_machine(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    record |= {"batch": args.batch, "date": date.today().isoformat(), "images": len(tests), "ways": rows}
    write_record(args.out, record)
    print("| views, precision | images/s | x first row | I-AUROC | P-AUROC | AUPRO |\n|---|" + "---:|" * 5)
    base = statistics.median(next(iter(rows.values()))["seconds"])
    for name, row in rows.items():
        median = statistics.median(row["seconds"])
        cells = ["-" if (v := row.get(key)) is None else f"{100 * v:.2f}" for key in SHOWN]
        print(f"| {name} | {args.batch / median:.2f} | {base / median:.2f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
