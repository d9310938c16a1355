"""Defects mixed into the good images: how many `recontrast audit` finds, and what they cost a detector.

    python benchmarks/audit.py --data FOLDER --backbone resnet18 --weights FILE.pth --out FILE.json

FOLDER holds categories in MVTec AD layout. For each share, some of the test images with defects are added to the
training images as good ones, and taken out of the test. PatchCore is trained on the good images alone, on all, and on
those that remain when twice the share is left out by the audit. Each result is written at once, and a second call
continues where the first ended.

    python benchmarks/audit.py --draws 10 ... --out FILE.json

ranks the images of several draws of defects, with the distances that the audit measures, and prints means. Each pair of
images is compared once for all draws. No detector is trained.
"""

import argparse
import random
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurements import measure_missing
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from recontrast.data.datasets import Sample, categories, mvtec
from recontrast.data.groups import group_samples
from recontrast.data.images import read_image
from recontrast.evaluation.evaluate import evaluate
from recontrast.models.patchcore import PatchCore
from recontrast.recipes.recipe import Recipe
from recontrast.training.audit import SEED, audit_images, choose_others, embed_images, select_good
from recontrast.training.train import train

METRICS = {"i_auroc": "I-AUROC", "p_auroc": "P-AUROC", "aupro": "AUPRO"}


def mix(samples: list[Sample], share: float, seed: int) -> tuple[list[Sample], set[Path]]:
    """Add defects to the training images, so that they are ``share`` of them; return the samples and the defects."""
    good = sum(sample.split == "train" for sample in samples)
    defects = [sample for sample in samples if sample.split == "test" and sample.label]
    count = min(max(round(share * good / (1 - share)), 1), len(defects) // 2)
    chosen = {sample.path for sample in random.Random(seed).sample(defects, count)}
    mixed = [
        replace(sample, split="train", label=0, defect="good", mask=None) if sample.path in chosen else sample
        for sample in samples
    ]
    return mixed, chosen


def measure_detector(samples: list[Sample], recipe: Recipe, category: str) -> dict[str, float | None]:
    """Train PatchCore and evaluate it; metrics in percent."""
    trained = train(recipe, samples, category=category, device="cpu")
    (row,) = evaluate(trained.model, samples, trained.recipe).rows
    return {name: None if (value := getattr(row, name)) is None else round(100 * value, 2) for name in METRICS}


def measure(category: str, share: float, seed: int, recipe: Recipe, data: Path) -> dict[str, Any]:
    """Audit one mixture, and train with it, without what the audit leaves out, and without the defects."""
    samples, defects = mix(mvtec(data, category), share, seed)
    network = PatchCore(recipe.backbone, weights=recipe.weights)
    begin, cpu = time.perf_counter(), time.process_time()
    images, _ = audit_images(samples, network, size=recipe.size)
    spent, cpu = time.perf_counter() - begin, time.process_time() - cpu
    is_defect = np.array([image.sample.path in defects for image in images])
    first = 2 * len(defects)
    gone = {image.sample.path for image in images[:first]}
    variants = {
        "clean": [sample for sample in samples if sample.path not in defects],
        "mixed": samples,
        "audited": [sample for sample in samples if sample.path not in gone],
    }
    return {
        "category": category, "share": share, "seed": seed, "images": len(images), "defects": len(defects),
        "auroc": round(100 * float(roc_auc_score(is_defect, [image.score for image in images])), 1),
        "found_in_first": int(is_defect[: len(defects)].sum()), "found_in_twice": int(is_defect[:first].sum()),
        "seconds": round(spent, 1), "cpu_seconds": round(cpu, 1),
        **{name: measure_detector(chosen, recipe, category) for name, chosen in variants.items()},
    }  # fmt: skip


def measure_pairs(features: torch.Tensor) -> NDArray[np.float32]:
    """Measure the distance of each point of each image to the nearest point of each other image.

    Args:
        features: Features (n, P, d), float32.

    Returns:
        Distances (n, n, P): of the points of the first image to the second one.
    """
    squares = features.square().sum(2)
    nearest = torch.zeros(len(features), len(features), features.shape[1])
    for first in range(len(features)):
        for second in range(first + 1, len(features)):
            gaps = torch.addmm(squares[second], features[first], features[second].T, alpha=-2)
            gaps += squares[first][:, None]
            nearest[first, second], nearest[second, first] = gaps.amin(1), gaps.amin(0)
    return nearest.clamp_min_(0).sqrt_().numpy()


def rank_draws(category: str, shares: list[float], draws: int, recipe: Recipe, data: Path) -> dict[str, Any]:
    """Rank the images of several draws of defects at several shares, as `audit_images` ranks those of one."""
    samples, network = mvtec(data, category), PatchCore(recipe.backbone, weights=recipe.weights).eval()
    cpu = time.process_time()
    used = [sample for sample in samples if sample.split == "train" or sample.label]
    pixels = np.stack([read_image(sample.path, size=recipe.size) for sample in used])
    starts = range(0, len(used), 8)
    features = [one for start in starts for one in embed_images(network, pixels[start : start + 8], "cpu")]
    nearest = measure_pairs(torch.stack(features).flatten(1, 2))
    positions = {sample.path: position for position, sample in enumerate(used)}
    ranked = []
    for share in shares:
        for seed in range(1, draws + 1):
            mixed, defects = mix(samples, share, seed)
            good = select_good(mixed)
            own = np.array([positions[sample.path] for sample in good])
            others = choose_others(np.array(group_samples(good)), np.random.default_rng([SEED, len(good)]))
            scores = [nearest[row, own[chosen]].min(0).max() for row, chosen in zip(own, others, strict=True)]
            is_defect = np.array([sample.path in defects for sample in good])
            ranks = is_defect[np.argsort(-np.array(scores), kind="stable")]
            count = len(defects)
            ranked.append({
                "share": share, "seed": seed, "defects": count,
                "auroc": round(100 * float(roc_auc_score(is_defect, scores)), 1),
                "found_in_first": int(ranks[:count].sum()), "found_in_twice": int(ranks[: 2 * count].sum()),
            })  # fmt: skip
    return {
        "category": category, "shares": shares, "draws": draws, "cpu_seconds": round(time.process_time() - cpu, 1),
        "ranked": ranked,
    }  # fmt: skip


def print_means(runs: list[dict[str, Any]]) -> None:
    """Print the means over the draws, in percent: AUROC, found among the first n, found among the first 2 n."""
    runs = [run for run in runs if "ranked" in run]
    print("| mixed in | " + " | ".join(run["category"] for run in runs) + " | mean |")
    print("|---" * (len(runs) + 2) + "|")
    for share in dict.fromkeys(share for run in runs for share in run["shares"]):
        cells = []
        for run in runs:
            draws = [draw for draw in run["ranked"] if draw["share"] == share]
            first, twice = (
                [100 * draw[key] / draw["defects"] for draw in draws] for key in ("found_in_first", "found_in_twice")
            )
            cells.append([float(np.mean(values)) for values in ([draw["auroc"] for draw in draws], first, twice)])
        cells.append(np.mean(cells, axis=0).tolist())
        texts = (", ".join(f"{value:.0f}" for value in cell) for cell in cells)
        print(f"| {100 * share:.0f} % | " + " | ".join(texts), "|")


def print_table(runs: list[dict[str, Any]]) -> None:
    """Print one line for each category and share."""
    print("| set | share | AUROC | found in the first n | in the first 2 n | " + " | ".join(METRICS.values()) + " |")
    print("|---" * (5 + len(METRICS)) + "|")
    for run in (run for run in runs if "audited" in run):
        cells = [
            " / ".join("-" if run[name][metric] is None else f"{run[name][metric]:.1f}"
                       for name in ("clean", "mixed", "audited"))
            for metric in METRICS
        ]  # fmt: skip
        found = [f"{run[key]} of {run['defects']}" for key in ("found_in_first", "found_in_twice")]
        print(
            f"| {run['category']} | {100 * run['share']:.0f} % | {run['auroc']} | " + " | ".join([*found, *cells]), "|"
        )


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--categories", nargs="+")
    parser.add_argument("--backbone", default="wide_resnet50_2.tv_in1k")
    parser.add_argument("--weights")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.02, 0.05, 0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--draws", type=int, help="rank so many draws of defects, and train no detector")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = Recipe(
        name="audit", architecture="patchcore", backbone=arguments.backbone, weights=arguments.weights,
        size=arguments.size, log_every=10**6,
    )  # fmt: skip
    chosen = arguments.categories or categories(arguments.data)
    if arguments.draws is not None:
        planned = [{"category": name, "shares": arguments.shares, "draws": arguments.draws} for name in chosen]
        rank = partial(rank_draws, recipe=recipe, data=arguments.data)
        print_means(measure_missing(arguments.out, planned, rank)["runs"])
        return
    planned = [
        {"category": category, "share": share, "seed": seed}
        for seed in arguments.seeds
        for share in arguments.shares
        for category in chosen
    ]
    record = measure_missing(arguments.out, planned, partial(measure, recipe=recipe, data=arguments.data))
    print_table(record["runs"])


if __name__ == "__main__":
    main()
