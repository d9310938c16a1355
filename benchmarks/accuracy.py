"""Accuracy beside the reference: its restated model and loops, and ours, from equal weights on equal batches.

A run takes minutes on a CPU. Each result is written to a JSON file at once, and a second call continues where the first
ended:

    python benchmarks/accuracy.py --data FOLDER --weights resnet18.pth --categories NAME NAME --out accuracy.json

With `--recipe mvtec_unified`, one detector is trained for all categories together. FOLDER holds categories in MVTec AD
layout. The reference (`tests/upstream.py`, `tests/upstream_model.py`) receives decoded images, uses the loss with
gradient hook and boolean indexing, and evaluates image by image. A category without masks is compared by I-AUROC only.
AUPRO over the data set is computed by this package for both sides and is not timed.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the restated reference lives there
import upstream
from measurements import name_machine, write_record
from upstream_model import replace_layers, upstream_from

from recontrast import metrics, ops
from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample, mvtec
from recontrast.data.images import normalise, read_mask
from recontrast.evaluation.evaluate import evaluate
from recontrast.recipes.paper import RECIPES
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import resolve_device
from recontrast.training.sampler import BatchSampler
from recontrast.training.train import build_model, train

METRICS = {
    "i_auroc": "I-AUROC",
    "p_auroc": "P-AUROC",
    "aupro": "AUPRO",
    "aupro_per_image": "AUPRO per image",
}
TIMES = {"step": "ms per step", "evaluation": "s of evaluation"}
SIDES = ("reference", "ours")
Run = dict[str, float | None]  # by the keys of METRICS and TIMES


def ours(samples: list[Sample], category: str, recipe: Recipe, device: torch.device) -> dict[str, Run]:
    """Train with this package and evaluate each category."""
    trained = train(recipe, samples, category=category, device=device, on_log=progress(category, "ours", recipe))
    start = time.perf_counter()
    rows = evaluate(trained.model, samples, recipe).rows
    times = {"step": 1000 * trained.seconds / recipe.steps, "evaluation": (time.perf_counter() - start) / len(rows)}
    return {row.category: {**{name: getattr(row, name) for name in METRICS}, **times} for row in rows}


def reference(samples: list[Sample], category: str, recipe: Recipe, device: torch.device) -> dict[str, Run]:
    """Train and evaluate as the reference does, with the initial weights and the batches of `ours`."""
    torch.manual_seed(recipe.seed)
    initial = build_model(recipe, category)
    model = upstream_from(initial, recipe.backbone.partition(".")[0]).to(device)
    unified = recipe.name == "mvtec_unified"
    if unified:
        replace_layers(model.decoder)
    model.train(encoder_bn_train=recipe.encoder_bn_for(category) == "train")

    def tensors(selected: list[Sample]) -> torch.Tensor:
        return normalise(ImageCache(selected, recipe.size)[:], initial.mean, initial.std, device=device)

    training = [sample for sample in samples if sample.split == "train"]
    images = tensors(training)
    order = BatchSampler(len(training), recipe.batch, drop_last=recipe.drop_last, seed=recipe.seed)
    parameters = itertools.chain(model.bottleneck.parameters(), model.decoder.parameters()), model.encoder.parameters()
    log = progress(category, "reference", recipe)

    def batches():
        for step in itertools.count():
            if step and step % recipe.log_every == 0:
                log(step, float("nan"), float("nan"), float("nan"))
            yield images[torch.from_numpy(next(order)).to(device)]

    def pairs(batch: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(*model(batch), strict=True))

    start = time.perf_counter()
    loop = upstream.train_unified if unified else upstream.train
    loop(pairs, batches(), recipe.steps, *parameters)
    step = 1000 * (time.perf_counter() - start) / recipe.steps

    model.eval()
    tests: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.split == "test":
            tests.setdefault(sample.category, []).append(sample)
    return {name: {**measure(pairs, group, tensors(group), recipe), "step": step} for name, group in tests.items()}


def measure(pairs, tests: list[Sample], images: torch.Tensor, recipe: Recipe) -> Run:
    """Evaluate one category as the reference's script does, and return metrics and time."""
    map_of = upstream.anomaly_map_sum if recipe.reduce == "sum" else upstream.anomaly_map_unified
    max_ratio = recipe.score if isinstance(recipe.score, float) else 0
    labels = np.array([sample.label for sample in tests])
    masks = load_masks(tests, recipe)
    with_masks = masks is not None
    truth = masks if masks is not None else np.broadcast_to(labels[:, None, None] > 0, (len(tests), *recipe.out)).copy()
    start = time.perf_counter()
    p_auroc, i_auroc, per_image = upstream.evaluate(
        pairs, images, torch.from_numpy(truth)[:, None], labels, max_ratio=max_ratio, calc_pro=with_masks, map_of=map_of
    )
    evaluation = time.perf_counter() - start
    values: Run = {"i_auroc": i_auroc, "p_auroc": None, "aupro": None, "aupro_per_image": None}
    if masks is not None:
        with torch.no_grad():
            maps = np.concatenate([np.asarray(map_of(pairs(image[None]), recipe.out)) for image in images])
        values |= {"p_auroc": p_auroc, "aupro": metrics.aupro(maps, masks), "aupro_per_image": per_image}
    return {**values, "evaluation": evaluation}


def load_masks(tests: list[Sample], recipe: Recipe) -> np.ndarray | None:
    """Return masks as bool (N, H, W), False for good images, or None if a defect has no mask."""
    if any(sample.label and sample.mask is None for sample in tests):
        return None
    empty = np.zeros(recipe.out, bool)
    return np.stack([read_mask(s.mask, size=recipe.size, rule="any") if s.mask is not None else empty for s in tests])


def progress(category: str, side: str, recipe: Recipe):
    """Return an `on_log` function that rewrites one line of progress."""

    def log(step: int, *_: float) -> None:
        print(f"\r{category}, seed {recipe.seed}, {side}: step {step}/{recipe.steps} ", end="", file=sys.stderr)

    return log


def table(runs: dict[str, Run], categories: list[str], seeds: list[int]) -> str:
    """Return mean and standard deviation over the seeds that both sides have, as a Markdown table."""
    lines = [
        "| category | metric | reference | ours | difference | within the spread of the reference, or above |",
        "|---|---|---:|---:|---:|---|",
    ]
    for category in categories:
        both = [seed for seed in seeds if all(f"{category}/{seed}/{side}" in runs for side in SIDES)]
        for name, title in {**METRICS, **TIMES}.items():
            all_values = {side: [runs[f"{category}/{seed}/{side}"][name] for seed in both] for side in SIDES}
            values = {side: [v for v in all_values[side] if v is not None] for side in SIDES}
            if not values["reference"] or not values["ours"]:
                continue
            scale = 100 if name in METRICS else 1
            means = {side: scale * statistics.fmean(values[side]) for side in SIDES}
            spreads = {side: scale * statistics.stdev(v) if len(v) > 1 else 0.0 for side, v in values.items()}
            cells = [f"{means[side]:.2f} ± {spreads[side]:.2f}" for side in SIDES]
            if name in METRICS:
                gain = means["ours"] - means["reference"]
                verdict = "yes" if gain >= -spreads["reference"] else "**no**"
                cells += [f"{gain:+.2f}", verdict if len(values["reference"]) > 1 else "one seed"]
            else:
                cells += [f"{means['reference'] / means['ours']:.2f}x", ""]
            lines.append(f"| {category} | {title} | {' | '.join(cells)} |")
        if len(both) < len(seeds):
            lines.append(f"| {category} | {len(both)} of {len(seeds)} seeds | | | | |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of categories in MVTec AD layout")
    parser.add_argument("--weights", required=True, help="weights file of the backbone, or random")
    parser.add_argument("--categories", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--backbone", default="resnet18", help="resnet18, resnet50 or wide_resnet50_2")
    parser.add_argument("--recipe", default="mvtec", choices=("mvtec", "mvtec_unified"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--size", type=int, default=128, help="pixels")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--out", type=Path, default=Path("accuracy.json"), help="results; a later call continues it")
    return parser.parse_args()


def main() -> None:
    """Make the runs that the file lacks and print the table."""
    args = arguments()
    device = resolve_device(args.device)
    settings = {name: getattr(args, name) for name in ("backbone", "steps", "batch", "size")}
    settings |= {"weights": Path(args.weights).name, "device": device.type}
    if args.recipe != "mvtec":  # one detector for all categories
        settings |= {"recipe": args.recipe, "categories": args.categories}
    record = json.loads(args.out.read_text()) if args.out.exists() else {"settings": settings, "runs": {}}
    if record["settings"] != settings:
        sys.exit(f"{args.out}: wanted runs with {settings}, got {record['settings']}: choose another --out")
    record["machine"] = {"device": name_machine(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    record["machine"] |= {"kernels": ops.BACKEND[device.type], "date": date.today().isoformat()}
    base = RECIPES[args.recipe].replace(backbone=args.backbone, weights=args.weights, steps=args.steps)
    base = base.replace(batch=args.batch, size=args.size)
    groups = [args.categories] if args.recipe == "mvtec_unified" else [[name] for name in args.categories]
    for categories in groups:
        samples = [sample for name in categories for sample in mvtec(args.data, name)]
        category = "+".join(categories)
        for seed, side in itertools.product(args.seeds, SIDES):
            if f"{categories[0]}/{seed}/{side}" in record["runs"]:
                continue
            runs = {"ours": ours, "reference": reference}[side](samples, category, base.replace(seed=seed), device)
            record["runs"] |= {f"{name}/{seed}/{side}": run for name, run in runs.items()}
            write_record(args.out, record)
            print(f"\r{category}/{seed}/{side}: {json.dumps(runs)}", file=sys.stderr)
    print(", ".join(f"{key} {value}" for key, value in {**settings, **record["machine"]}.items()) + "\n")
    print(table(record["runs"], args.categories, args.seeds))


if __name__ == "__main__":
    main()
