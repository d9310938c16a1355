"""Accuracy per minute: what each method reaches in a time budget, all included, on folders of real images.

    python benchmarks/budget.py --data FOLDER --backbone resnet18 --weights FILE.pth --budgets 15s 1m --out FILE.json

FOLDER holds categories in MVTec AD layout. Each result is written at once, and a second call continues where the
first ended. "budget" is what `recontrast train --budget` chooses. The other methods get the same time: PatchCore and
PaDiM the image size that fits, the others as many steps as fit at ``--size``. The time is that of the clock; the CPU
seconds of the process are stored beside it. No setting is chosen by the metrics.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import plot_budget
from measurements import measure_missing

from recontrast.app.options import parse_duration
from recontrast.data.atomic import replace_file
from recontrast.data.datasets import categories, mvtec
from recontrast.evaluation.evaluate import evaluate
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import resolve_device
from recontrast.training.budget import plan_budget
from recontrast.training.train import train

METRICS = {"i_auroc": "I-AUROC", "p_auroc": "P-AUROC", "p_ap": "AP", "aupro": "AUPRO"}
METHODS: dict[str, dict[str, Any]] = {
    "budget": {},
    "patchcore": {"architecture": "patchcore"},
    "padim": {"architecture": "padim"},
    "rd4ad": {"architecture": "recontrast", "pairs": "self", "train_encoder": False, "mining": False},
    "recontrast": {"architecture": "recontrast"},
}
STEP_SETTINGS = {"batch": 8, "ramp": 1.0, "encoder_lr": 1e-4, "encoder_bn": "eval"}  # of short runs, as in the demo


def measure(
    category: str, method: str, budget: float, seed: int, arguments: argparse.Namespace
) -> dict[str, Any] | None:
    """Train within a budget in seconds and evaluate; the plan, its metrics in percent and its costs.

    None if the budget is too short for the method.
    """
    samples = mvtec(arguments.data, category)
    device = resolve_device(arguments.device)
    recipe = Recipe(name=method, backbone=arguments.backbone, weights=arguments.weights, seed=seed, log_every=10**6)
    recipe = recipe.replace(**METHODS[method])
    fixed = set(METHODS[method])
    if "architecture" in fixed and recipe.uses_steps:
        recipe = recipe.replace(
            size=arguments.size, precision=arguments.precision, checkpoint_every=10**6, **STEP_SETTINGS
        )
        fixed |= {"size", "precision"}
    good = [sample.path for sample in samples if sample.split == "train" and not sample.label]
    begin, cpu = time.perf_counter(), time.process_time()
    try:
        plan = plan_budget(recipe, fixed, good, 0, budget, device, category)
    except ValueError as error:
        print(f"{category} {method}: {error}", flush=True)
        return None
    trained = train(plan.recipe, samples, category=category, device=device)
    spent, cpu = time.perf_counter() - begin, time.process_time() - cpu
    begin = time.perf_counter()
    (row,) = evaluate(trained.model, samples, plan.recipe).rows
    inference = (time.perf_counter() - begin) / row.images
    values = {name: getattr(row, name) for name in METRICS}
    return {
        "category": category, "method": method, "budget": budget, "seed": seed, "plan": plan.description,
        "seconds": round(spent, 1), "cpu_seconds": round(cpu, 1), "inference_ms": round(1000 * inference, 1),
        **{name: None if value is None else round(100 * value, 2) for name, value in values.items()},
    }  # fmt: skip


def print_table(runs: list[dict[str, Any]]) -> None:
    """Print the mean over categories and seeds by budget and method, and the spread of the seeds."""
    for seconds in sorted({run["budget"] for run in runs}):
        print(
            f"\nbudget {seconds:g} s\n| method | runs | " + " | ".join(METRICS.values()) + " | s | CPU s | ms/image |"
        )
        print("|---" * (len(METRICS) + 5) + "|")
        for method in METHODS:
            chosen = [run for run in runs if run["budget"] == seconds and run["method"] == method]
            if not chosen:
                continue
            cells = [
                f"{statistics.mean(v):.1f}" if (v := [r[m] for r in chosen if r[m] is not None]) else "-"
                for m in METRICS
            ]
            costs = [
                f"{statistics.mean(run[name] for run in chosen):.0f}"
                for name in ("seconds", "cpu_seconds", "inference_ms")
            ]
            print(f"| {method} | {len(chosen)} | " + " | ".join([*cells, *costs]) + " |")


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--categories", nargs="+")
    parser.add_argument("--backbone", default="wide_resnet50_2.tv_in1k")
    parser.add_argument("--weights")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--budgets", nargs="+", default=["15s", "1m", "3m"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--size", type=int, default=128, help="image size of the methods trained by steps")
    parser.add_argument("--precision", default="bfloat16", help="precision of the methods trained by steps")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", action="store_true", help="also draw accuracy against time, as SVG beside --out")
    arguments = parser.parse_args()
    planned = (
        {"category": category, "method": method, "budget": budget, "seed": seed}
        for budget in [parse_duration("--budgets", value) for value in arguments.budgets]
        for seed in arguments.seeds
        for category in arguments.categories or categories(arguments.data)
        for method in arguments.methods
    )
    record = measure_missing(arguments.out, planned, partial(measure, arguments=arguments))
    print_table(record["runs"])
    if arguments.plot and record["runs"]:
        with replace_file(arguments.out.with_suffix(".svg")) as file:
            file.write(plot_budget.plot(record).encode())


if __name__ == "__main__":
    main()
