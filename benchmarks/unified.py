"""One detector for all categories: what each method reaches after the same processor time of training.

    python benchmarks/unified.py --data FOLDER --resnet resnet18.pth --vit deit_tiny.pth --seconds 240 --out FILE.json

FOLDER holds categories in MVTec AD layout. Each result is written at once, and a second call continues where the first
ended. The number of steps comes from the processor time of a few steps before the training, so that each method trains
for about ``--seconds`` of processor time, with its whole schedule. PatchCore takes one pass. Frozen encoders are
computed once an image (`teacher_cache`). No setting is chosen by the metrics: rates, rules and scores are those of the
published recipes, ramps and warm-ups keep their share of the steps.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from measurements import measure_missing

from recontrast.data.datasets import Sample, categories, mvtec
from recontrast.evaluation.evaluate import evaluate
from recontrast.models.network import Network
from recontrast.recipes.paper import RECIPES
from recontrast.recipes.recipe import Recipe
from recontrast.training.train import train

METRICS = {"i_auroc": "I-AUROC", "p_auroc": "P-AUROC", "p_ap": "AP", "aupro": "AUPRO"}
PROBE = (4, 12)  # steps of the two runs whose difference is the cost of a step
CACHE = 4 << 30  # bytes of frozen features
UNIFIED = {"encoder_bn": "eval"}
VIT = "deit_tiny_patch16_224.fb_in1k"
LAYERS = {"layers": ((2, 3, 4, 5), (6, 7, 8, 9))}
METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {  # method: recipe, weights, changes
    "dinomaly": ("dinomaly_mvtec", "vit", {}),
    "inp_former": ("inp_former_mvtec", "vit", {}),
    "recontrast_vit": ("mvtec_unified", "vit", LAYERS),
    "recontrast": ("mvtec_unified", "resnet", {}),
    "rd4ad": ("mvtec_unified", "resnet", {"pairs": "self", "train_encoder": False, "mining": False}),
    "uniad": ("uniad_mvtec", "efficientnet", {}),
    "patchcore_vit": ("patchcore_mvtec", "vit", LAYERS | {"levels": (1, 2), "bank_share": 0.01}),
    "patchcore": ("patchcore_mvtec", "resnet", {"bank_share": 0.01}),
}


def build_recipe(method: str, seed: int, arguments: argparse.Namespace) -> Recipe:
    """Build the recipe of a method at the size and batch of the study."""
    base, encoder, changes = METHODS[method]
    backbones = {
        "vit": (VIT, arguments.vit),
        "resnet": ("resnet18.tv_in1k", arguments.resnet),
        "efficientnet": ("tf_efficientnet_lite0.in1k", "package"),
    }
    backbone, weights = backbones[encoder]
    recipe = RECIPES[base].replace(
        name=method, backbone=backbone, weights=weights, size=arguments.size, crop=None, map_size=None, seed=seed,
        log_every=10**6, checkpoint_every=10**6, **UNIFIED,
    )  # fmt: skip
    if recipe.uses_steps:
        recipe = recipe.replace(batch=arguments.batch)
    return recipe.replace(**changes)


def choose_steps(recipe: Recipe, samples: list[Sample], seconds: float) -> int:
    """Return how many steps take ``seconds`` of processor time; after the first epoch, frozen features are cached."""

    def time_step(images: int) -> float:
        chosen = samples[:: max(len(samples) // images, 1)][:images]
        spent = []
        for steps in PROBE:
            begin = time.process_time()
            train(recipe.replace(steps=steps), chosen, category="probe", device="cpu", teacher_cache=CACHE)
            spent.append(time.process_time() - begin)
        return (spent[1] - spent[0]) / (PROBE[1] - PROBE[0])

    first, later = time_step(PROBE[1] * recipe.batch), time_step(PROBE[0] * recipe.batch)
    epoch = len(samples) // recipe.batch
    steps = seconds / first if seconds < first * epoch else epoch + (seconds - first * epoch) / later
    return max(round(steps), 1)


def measure(method: str, seed: int, samples: list[Sample], arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one detector of all categories and evaluate it; metrics in percent, and costs."""
    recipe = build_recipe(method, seed, arguments)
    good = [sample for sample in samples if sample.split == "train" and not sample.label]
    if recipe.uses_steps:
        recipe = recipe.replace(steps=choose_steps(recipe, good, arguments.seconds))
    begin, cpu = time.perf_counter(), time.process_time()
    trained = train(recipe, good, category="all", device="cpu", teacher_cache=CACHE if recipe.uses_steps else 0)
    spent, cpu = time.perf_counter() - begin, time.process_time() - cpu
    model: Network = trained.model
    begin = time.process_time()
    rows = evaluate(model, samples, recipe).rows
    inference = (time.process_time() - begin) / sum(row.images for row in rows)
    return {
        "method": method, "seed": seed, "size": arguments.size, "steps": recipe.steps if recipe.uses_steps else None,
        "seconds": round(spent, 1), "cpu_seconds": round(cpu, 1), "inference_cpu_ms": round(1000 * inference, 1),
        "rows": {
            row.category: {
                name: None if (value := getattr(row, name)) is None else round(100 * value, 2) for name in METRICS
            }
            for row in rows
        },
    }  # fmt: skip


def print_table(runs: list[dict[str, Any]]) -> None:
    """Print I-AUROC by category, the means of all metrics over categories and seeds, and costs."""
    names = list(dict.fromkeys(category for run in runs for category in run["rows"]))
    print("| method | seeds | steps | CPU s | " + " | ".join([*names, *METRICS.values()]) + " |")
    print("|---" * (4 + len(names) + len(METRICS)) + "|")
    for method in METHODS:
        chosen = [run for run in runs if run["method"] == method]
        if not chosen:
            continue
        cells = [statistics.mean(run["rows"][name]["i_auroc"] for run in chosen) for name in names]
        shown = [f"{value:.1f}" for value in cells]
        for metric in METRICS:
            means = [
                statistics.mean(v for row in run["rows"].values() if (v := row[metric]) is not None) for run in chosen
            ]
            shown.append(f"{statistics.mean(means):.1f} ± {statistics.pstdev(means):.1f}")
        steps = "one pass" if chosen[0]["steps"] is None else f"{statistics.mean(run['steps'] for run in chosen):.0f}"
        cpu = f"{statistics.mean(run['cpu_seconds'] for run in chosen):.0f}"
        print(f"| {method} | {len(chosen)} | {steps} | {cpu} | " + " | ".join(shown) + " |")


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--categories", nargs="+")
    parser.add_argument("--resnet", help="file of ResNet-18 weights")
    parser.add_argument("--vit", help="file of DeiT-Tiny weights")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seconds", type=float, default=240.0, help="processor time of the training")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    chosen = arguments.categories or categories(arguments.data)
    samples = [sample for category in chosen for sample in mvtec(arguments.data, category)]
    planned = ({"method": method, "seed": seed} for seed in arguments.seeds for method in arguments.methods)
    record = measure_missing(arguments.out, planned, partial(measure, samples=samples, arguments=arguments))
    print_table(record["runs"])


if __name__ == "__main__":
    main()
