"""Test of the promised false-alarm rate, on random splits of held-out good images and on the test images.

For each category, a detector is trained on a part of the good training images and scores the held-out rest. The scores
are split into two random halves many times: one half calibrates, and false alarms are counted in the other. Their mean
must be at most the promise m/(n + 1) within the Monte Carlo error. Random halves are exchangeable for any images, so
this checks the arithmetic and not the images. Then all held-out images calibrate, and the good test images and each
defect type are judged. The promise does not cover test images of another day or another camera; the score check or the
image check should then warn.

    python benchmarks/calibration.py --data FOLDER --weights resnet18.pth --out calibration.json

A category takes minutes on a CPU. A second call continues with the categories that the file lacks. The image check
needs no detector, so it is added to an existing file within seconds.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurements import name_machine, write_record

from recontrast.calibration.appearance_drift import describe_appearance, measure_appearance_drift
from recontrast.calibration.conformal import (
    Calibration,
    allowed_false_alarms,
    conformal_threshold,
    false_alarm_interval,
)
from recontrast.calibration.score_drift import measure_score_drift
from recontrast.data.cache import ImageCache
from recontrast.data.datasets import categories, mvtec
from recontrast.evaluation.evaluate import evaluate
from recontrast.recipes.paper import RECIPES
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import resolve_device
from recontrast.training.holdout import split_holdout
from recontrast.training.train import train

RATES = (0.02, 0.05, 0.1, 0.2)


def resplits(scores: Sequence[float], rate: float, times: int, seed: int = 0) -> dict[str, float]:
    """Return false-alarm rates of one half of ``scores``, calibrated on the other, over ``times`` random halves."""
    random = np.random.default_rng(seed)
    pool = np.array(scores)
    half = len(pool) // 2
    promise = allowed_false_alarms(half, rate) / (half + 1)
    rates = np.empty(times)
    for i in range(times):
        order = random.permutation(pool)
        limit = conformal_threshold(tuple(np.sort(order[:half]).tolist()), rate)
        rates[i] = np.mean(order[half:] > limit)
    low, high = false_alarm_interval(half, rate)
    return {
        "calibration": half, "new": len(pool) - half, "times": times, "promise": promise, "mean": float(rates.mean()),
        "error": float(rates.std(ddof=1) / math.sqrt(times)),  # Monte Carlo: standard error of the mean
        "p5": float(np.quantile(rates, 0.05)), "p95": float(np.quantile(rates, 0.95)), "beta5": low, "beta95": high,
    }  # fmt: skip


def measure(data: Path, category: str, recipe: Recipe, times: int, device: torch.device) -> dict[str, Any]:
    """Train a detector and count its false alarms on random splits and on the test images."""

    def log(step: int, *_: float) -> None:
        print(f"\r{category}: step {step}/{recipe.steps} ", end="", file=sys.stderr)

    samples = mvtec(data, category)
    trained = train(recipe, samples, category=category, device=device, on_log=log)
    held = trained.calibration
    if held is None:
        raise ValueError(f"{category}: wanted a share of the good images held out, got holdout {recipe.holdout:g}")
    rates = [rate for rate in RATES if rate * (held.count // 2 + 1) >= 1]
    result: dict[str, Any] = {
        "held_out": held.count,
        "resplits": {str(rate): resplits(held.scores, rate, times) for rate in rates},
        "observed": {},
    }
    if any(sample.split == "test" for sample in samples):
        scores: dict[str, list[float]] = {}
        for image in evaluate(trained.model, samples, recipe).scored:
            scores.setdefault(image.defect if image.label else "good", []).append(image.score)
        result["images"] = {kind: len(values) for kind, values in scores.items()}
        result["observed"] = {
            str(rate): {kind: float(held.with_rate(rate).is_defect(values).mean()) for kind, values in scores.items()}
            for rate in rates
        }
        result["check"] = check_scores(held, scores.get("good", []))
    return result


def check_scores(held: Calibration, good: Sequence[float]) -> dict[str, Any] | None:
    """Return the result of the score check on the good test images, or None without images."""
    if not good:
        return None
    drift = measure_score_drift(held, good)
    return {
        "far": drift.is_significant,
        "p_value": drift.p_value,
        "distance": drift.distance,
        "sentence": drift.describe(),
    }


def check_images(data: Path, category: str, recipe: Recipe) -> dict[str, Any]:
    """Return the result of the image check: good test images compared with held-out training images."""
    samples = mvtec(data, category)
    _, held = split_holdout([s for s in samples if s.split == "train"], recipe.holdout, recipe.seed)
    good = [s for s in samples if s.split == "test" and not s.label]
    reference, new = (describe_appearance(ImageCache(group, recipe.size, recipe.crop)) for group in (held, good))
    drift = measure_appearance_drift(reference, new)
    return {"far": drift.is_significant, "p_value": drift.p_value, "name": drift.name, "sentence": drift.describe()}


def tables(results: dict[str, dict[str, Any]]) -> str:
    """Return both tables as Markdown, in percent."""
    lines = [
        "| category | n | requested rate | promise m/(n + 1) | mean of splits | standard error | holds "
        "| 5 to 95 % of splits | 5 to 95 % of Beta |",
        "|---|---:|---:|---:|---:|---:|---|---|---|",
    ]
    for category, result in results.items():
        for rate, r in result["resplits"].items():
            holds = "yes" if r["mean"] <= r["promise"] + 3 * r["error"] else "**no**"
            values = [f"{100 * r[name]:.2f}" for name in ("promise", "mean", "error")]
            ranges = [f"{100 * r[a]:.1f} to {100 * r[b]:.1f}" for a, b in (("p5", "p95"), ("beta5", "beta95"))]
            cells = [category, r["calibration"], f"{100 * float(rate):g}", *values, holds, *ranges]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| category | test images | n | " + " | ".join(f"{100 * rate:g} %" for rate in RATES) + " | checks |"]
    lines.append("|---|---|---:|" + "---:|" * len(RATES) + "---|")
    for category, result in results.items():
        for kind, count in result.get("images", {}).items():
            cells = [
                f"{100 * result['observed'][str(rate)][kind]:.1f}" if str(rate) in result["observed"] else "-"
                for rate in RATES
            ]
            checks = ", ".join(
                f"{name} {'warning' if check['far'] else 'no warning'}, p = {check['p_value']:.2g}"
                for name, check in (("scores", result["check"]), ("images", result["looks"]))
                if kind == "good" and check is not None
            )
            lines.append(f"| {category} | {kind} | {count} | {' | '.join(cells)} | {checks} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of categories in MVTec AD layout")
    parser.add_argument("--weights", required=True, help="weights file of the backbone, or random")
    parser.add_argument("--categories", nargs="+", help="default: all in DATA")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--holdout", type=float, default=0.4, help="held-out share of the good images")
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--times", type=int, default=1000, help="number of random splits")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--out", type=Path, default=Path("calibration.json"), help="results; a later call continues it")
    return parser.parse_args()


def main() -> None:
    """Measure the categories that the file lacks and print the tables."""
    args = arguments()
    device = resolve_device(args.device)
    names = ("backbone", "steps", "batch", "size", "holdout", "precision", "seed")
    settings = {name: getattr(args, name) for name in names}
    about = {**settings, "weights": Path(args.weights).name, "times": args.times, "device": device.type}
    record = json.loads(args.out.read_text()) if args.out.exists() else {"settings": about, "categories": {}}
    if record["settings"] != about:
        sys.exit(f"{args.out}: wanted runs with {about}, got {record['settings']}: choose another --out")
    record["machine"] = {"name": name_machine(device), "torch": torch.__version__}
    record["machine"]["date"] = date.today().isoformat()
    recipe = RECIPES["mvtec"].replace(weights=args.weights, **settings)
    for category in args.categories or categories(args.data):
        result = record["categories"].get(category)
        if result is not None and "looks" in result:
            continue
        result = result or measure(args.data, category, recipe, args.times, device)
        record["categories"][category] = {**result, "looks": check_images(args.data, category, recipe)}
        write_record(args.out, record)
    print(", ".join(f"{key} {value}" for key, value in {**about, **record["machine"]}.items()) + "\n")
    print(tables(record["categories"]))


if __name__ == "__main__":
    main()
