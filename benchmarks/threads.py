"""Training on a machine with busy processors: fixed numbers of threads, and the number chosen by measurement.

    python benchmarks/threads.py --busy 1 --out results.json

Starts processes that keep processors busy, and trains for some steps with each fixed number of threads and with
`recontrast.runtime.threads`, in turn. Rates are images per second of whole runs, measurements included. What other
programs do to the machine is part of every row alike. A fixed number that is less than half as fast as the best one in
the first round is not repeated: two threads on one free processor take ten minutes a round.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch

from recontrast.data.system import count_cpus
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.threads import choose_threads
from recontrast.training.train import train

MEASURED = "measured"


def train_with(threads: int | None, recipe: Recipe, pixels: np.ndarray, lines: list[str]) -> float:
    """Train, and return the images per second."""
    with choose_threads(threads, lines.append):
        result = train(recipe, pixels, device="cpu")
    return recipe.steps * recipe.batch / result.seconds


def main() -> None:
    """Measure all numbers of threads in turn, and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=1, help="processors to keep busy")
    parser.add_argument("--fixed", type=int, nargs="+", help="fixed numbers of threads to time; default: all")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    most = min(torch.get_num_threads(), count_cpus())
    os.environ.pop("OMP_NUM_THREADS", None)  # which would fix the number; it was read when torch was imported
    recipe = Recipe(
        backbone=args.backbone, weights="random", steps=args.steps, batch=args.batch, size=args.size,
        precision=args.precision, log_every=args.steps,
    )  # fmt: skip
    pixels = np.random.default_rng(0).integers(0, 256, (4 * args.batch, args.size, args.size, 3), dtype=np.uint8)
    train_with(1, recipe.replace(steps=2, log_every=2), pixels, [])  # compiles and allocates
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.busy)]
    rates: dict[str, list[float]] = {}
    lines: list[str] = []
    try:
        time.sleep(1)
        for _ in range(args.rounds):
            best = max((rate for values in rates.values() for rate in values), default=0.0)
            for name, threads in [*((str(n), n) for n in args.fixed or range(1, most + 1)), (MEASURED, None)]:
                if threads is not None and name in rates and max(rates[name]) < best / 2:
                    continue
                rates.setdefault(name, []).append(train_with(threads, recipe, pixels, lines))
                print(f"{name:>8} threads: {rates[name][-1]:.2f} images/s", flush=True)
    finally:
        for process in spinning:
            process.kill()
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max(value for name, value in medians.items() if name != MEASURED)
    for name, value in medians.items():
        print(f"{name:>8}: {value:.2f} images/s, {value / best:.2f} x the best fixed number")
    print(*lines, sep="\n")
    record = {
        "about": {"date": date.today().isoformat(), "processors": count_cpus(), "machine": platform.processor(),
                  "torch": torch.__version__, "load before": os.getloadavg()[0], **vars(args), "out": None},
        "images per second": rates, "lines": lines,
    }  # fmt: skip
    if args.out is not None:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
