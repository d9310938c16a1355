"""Whether the promised false-alarm rate holds: on re-splits of good images of one source, and on the test images.

For each category a detector is trained on a part of the good training images, and scores the part held out. Those are
split by chance into two halves, again and again: one calibrates, the other counts false alarms, and the mean of them
must be at most the promise m/(n + 1) within the Monte Carlo error (random halves are exchangeable, whatever the images
are: this checks the arithmetic, not the source). Then all that was held out calibrates, and good test images and each
kind of defect are decided on, whatever comes out: test images of another day or another camera are not covered by the
promise, and the check of the p-values or that of the images themselves should say so.

    python benchmarks/calibration.py --data FOLDER --weights resnet18.pth --out calibration.json

Minutes for each category on a CPU; a second call goes on with the categories that the file lacks. The check of the
images needs no detector: what a file lacks of it is filled in within seconds.
"""

import argparse
import json
import math
import platform
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recontrast.calibration.appearance_drift import describe_appearance, measure_appearance_drift
from recontrast.calibration.conformal import (
    Calibration,
    allowed_false_alarms,
    conformal_threshold,
    false_alarm_interval,
)
from recontrast.calibration.score_drift import measure_score_drift
from recontrast.data.atomic import replace_file
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
    """False alarms of one half of ``scores`` by a calibration on the other, mean over ``times`` random halves."""
    random = np.random.default_rng(seed)
    pool = np.array(scores)
    half = len(pool) // 2
    promise = allowed_false_alarms(half, rate) / (half + 1)
    found = np.empty(times)
    for i in range(times):
        order = random.permutation(pool)
        limit = conformal_threshold(tuple(np.sort(order[:half]).tolist()), rate)
        found[i] = np.mean(order[half:] > limit)
    low, high = false_alarm_interval(half, rate)
    return {
        "calibration": half, "new": len(pool) - half, "times": times, "promise": promise, "mean": float(found.mean()),
        "error": float(found.std(ddof=1) / math.sqrt(times)),  # Monte Carlo, one standard deviation of the mean
        "p5": float(np.quantile(found, 0.05)), "p95": float(np.quantile(found, 0.95)), "beta5": low, "beta95": high,
    }  # fmt: skip


def measure(data: Path, category: str, recipe: Recipe, times: int, device: torch.device) -> dict[str, Any]:
    """Train, and count on re-splits and on the test images."""

    def log(step: int, *_: float) -> None:
        print(f"\r{category}: step {step}/{recipe.steps} ", end="", file=sys.stderr)

    samples = mvtec(data, category)
    trained = train(recipe, samples, category=category, device=device, on_log=log)
    held = trained.calibration
    if held is None:
        raise ValueError(f"{category}: wanted a share of the good images held out, got holdout {recipe.holdout:g}")
    rates = [rate for rate in RATES if rate * (held.count // 2 + 1) >= 1]
    found: dict[str, Any] = {
        "held_out": held.count,
        "resplits": {str(rate): resplits(held.scores, rate, times) for rate in rates},
        "observed": {},
    }
    if any(sample.split == "test" for sample in samples):
        scores: dict[str, list[float]] = {}
        for image in evaluate(trained.model, samples, recipe).scored:
            scores.setdefault(image.defect if image.label else "good", []).append(image.score)
        found["images"] = {kind: len(some) for kind, some in scores.items()}
        found["observed"] = {
            str(rate): {kind: float(held.with_rate(rate).is_defect(some).mean()) for kind, some in scores.items()}
            for rate in rates
        }
        found["check"] = checked(held, scores.get("good", []))
    return found


def checked(held: Calibration, good: Sequence[float]) -> dict[str, Any] | None:
    """What the test for uniform p-values says of the good test images."""
    if not good:
        return None
    seen = measure_score_drift(held, good)
    return {"far": seen.is_significant, "p_value": seen.p_value, "distance": seen.distance, "sentence": seen.describe()}


def looked_at(data: Path, category: str, recipe: Recipe) -> dict[str, Any]:
    """What the check of the images themselves says of the good test images, beside those held out."""
    samples = mvtec(data, category)
    _, held = split_holdout([s for s in samples if s.split == "train"], recipe.holdout, recipe.seed)
    good = [s for s in samples if s.split == "test" and not s.label]
    known, new = (describe_appearance(ImageCache(some, recipe.size, recipe.crop)) for some in (held, good))
    seen = measure_appearance_drift(known, new)
    return {"far": seen.is_significant, "p_value": seen.p_value, "name": seen.name, "sentence": seen.describe()}


def tables(found: dict[str, dict[str, Any]]) -> str:
    """Both tables as Markdown, in percent."""
    lines = [
        "| category | n | asked | promise m/(n + 1) | mean of re-splits | its error | holds | 5 to 95 % | Beta |",
        "|---|---:|---:|---:|---:|---:|---|---|---|",
    ]
    for category, of in found.items():
        for rate, r in of["resplits"].items():
            holds = "yes" if r["mean"] <= r["promise"] + 3 * r["error"] else "**no**"
            values = [f"{100 * r[name]:.2f}" for name in ("promise", "mean", "error")]
            ranges = [f"{100 * r[a]:.1f} to {100 * r[b]:.1f}" for a, b in (("p5", "p95"), ("beta5", "beta95"))]
            cells = [category, r["calibration"], f"{100 * float(rate):g}", *values, holds, *ranges]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| category | test images | n | " + " | ".join(f"{100 * rate:g} %" for rate in RATES) + " | check |"]
    lines.append("|---|---|---:|" + "---:|" * len(RATES) + "---|")
    for category, of in found.items():
        for kind, count in of.get("images", {}).items():
            cells = [
                f"{100 * of['observed'][str(rate)][kind]:.1f}" if str(rate) in of["observed"] else "-" for rate in RATES
            ]
            said = ", ".join(
                f"{what} {'warns' if check['far'] else 'rests'}, p = {check['p_value']:.2g}"
                for what, check in (("scores", of["check"]), ("images", of["looks"]))
                if kind == "good" and check is not None
            )
            lines.append(f"| {category} | {kind} | {count} | {' | '.join(cells)} | {said} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of categories in MVTec AD layout")
    parser.add_argument("--weights", required=True, help="weights file of the backbone, or random")
    parser.add_argument("--categories", nargs="+", help="default: all below DATA")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--holdout", type=float, default=0.4, help="share of the good images")
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--times", type=int, default=1000, help="random halves")
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--out", type=Path, default=Path("calibration.json"), help="results, read by the next call")
    return parser.parse_args()


def main() -> None:
    """Measure the categories that are not in the file, and print the tables."""
    asked = arguments()
    device = resolve_device(asked.device)
    names = ("backbone", "steps", "batch", "size", "holdout", "precision", "seed")
    settings = {name: getattr(asked, name) for name in names}
    about = {**settings, "weights": Path(asked.weights).name, "times": asked.times, "device": device.type}
    record = json.loads(asked.out.read_text()) if asked.out.exists() else {"settings": about, "categories": {}}
    if record["settings"] != about:
        sys.exit(f"{asked.out}: holds runs with {record['settings']}, asked for {about}; name another --out")
    record["machine"] = {"name": platform.processor() or platform.machine(), "torch": torch.__version__}
    record["machine"]["date"] = date.today().isoformat()
    recipe = RECIPES["mvtec"].replace(weights=asked.weights, **settings)
    for category in asked.categories or categories(asked.data):
        of = record["categories"].get(category)
        if of is not None and "looks" in of:
            continue
        of = of or measure(asked.data, category, recipe, asked.times, device)
        record["categories"][category] = {**of, "looks": looked_at(asked.data, category, recipe)}
        text = json.dumps(record, indent=1).encode() + b"\n"
        with replace_file(asked.out, size=len(text)) as file:
            file.write(text)
    print(", ".join(f"{key} {value}" for key, value in {**about, **record["machine"]}.items()) + "\n")
    print(tables(record["categories"]))


if __name__ == "__main__":
    main()
