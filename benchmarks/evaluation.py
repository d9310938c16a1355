"""A whole evaluation beside the reference's: the same unified detector on all categories of a folder, by wall time.

    python benchmarks/evaluation.py --data FOLDER --checkpoint runs/all/checkpoint.pt --out evaluation.json

FOLDER holds categories in MVTec AD layout. The reference side (`tests/upstream.py`, `tests/upstream_model.py`) has the
same weights and goes as its `evaluation` does: one image after the other, SciPy's blur, lists of pixels, AUPRO of each
image; it is given its images decoded, outside the time. Ours is timed from the files on. Each side in a process of its
own, whose peak memory is told too; a category without masks has metrics of images alone, on both sides.
"""

import argparse
import json
import multiprocessing
import platform
import resource
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the restated reference lives there
import upstream
from upstream_model import upstream_from

from recontrast.data import datasets
from recontrast.data.atomic import replacing
from recontrast.data.cache import ImageCache
from recontrast.data.images import normalise, read_mask
from recontrast.engine import checkpoint
from recontrast.engine.evaluate import evaluate

# What is measured -> changes of the recipe, and options of `evaluate`.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ours": ({}, {}),
    "ours, streaming": ({}, {"streaming": True}),
    "ours, bfloat16": ({"precision": "bfloat16"}, {}),
}


def tests_of(data: Path) -> dict[str, list[datasets.Sample]]:
    """Test images by category."""
    return {name: [s for s in group if s.split == "test"] for name, group in datasets.load(data).items()}


def ours(data: Path, file: Path, way: str) -> dict[str, Any]:
    """The evaluation of `recontrast evaluate`."""
    changes, options = WAYS[way]
    model, recipe, _ = checkpoint.load_model(file)
    begun = time.perf_counter()
    result = evaluate(model, tests_of(data), recipe.replace(**changes), **options)
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "split": result.mean.seconds, "table": result.to_markdown()}


def reference(data: Path, file: Path) -> dict[str, Any]:
    """The reference's loop over the same images."""
    ours, recipe, _ = checkpoint.load_model(file)
    model = upstream_from(ours, recipe.backbone.partition(".")[0]).to(next(ours.parameters()).device).eval()

    def pairs(batch: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(*model(batch), strict=True))

    device, seconds = next(ours.parameters()).device, 0.0
    found = {}
    for name, tests in tests_of(data).items():
        images = normalise(ImageCache(tests, recipe.size)[:], ours.mean, ours.std, device=device)
        labels = np.array([sample.label for sample in tests])
        masked = all(s.mask is not None for s in tests if s.label)
        empty = np.zeros(recipe.out, bool)
        masks = [read_mask(s.mask, size=recipe.size, rule="any") if s.mask is not None else empty for s in tests]
        shown = np.stack(masks) if masked else np.broadcast_to(labels[:, None, None] > 0, (len(tests), *recipe.out))
        begun = time.perf_counter()
        rows = upstream.evaluate(pairs, images, torch.from_numpy(shown.copy())[:, None], labels, calc_pro=masked)
        seconds += time.perf_counter() - begun
        found[name] = dict(zip(("p_auroc", "i_auroc", "aupro_per_image"), rows, strict=True))
    return {"seconds": seconds, "rows": found}


def measure(way: str, data: Path, file: Path) -> dict[str, Any]:
    """One way, in a process of its own."""
    found = reference(data, file) if way == "reference" else ours(data, file, way)
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return found


def main() -> None:
    """Measure every way and print them beside each other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of categories in MVTec AD layout")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a detector with a ResNet encoder")
    parser.add_argument("--ways", nargs="+", default=[*WAYS, "reference"], choices=[*WAYS, "reference"])
    parser.add_argument("--out", type=Path, default=Path("evaluation.json"))
    asked = parser.parse_args()
    found = {}
    for way in asked.ways:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[way] = pool.apply(measure, (way, asked.data, asked.checkpoint))
        print(f"{way}: {found[way]['seconds']:.1f} s", file=sys.stderr)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    about = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    record = {**about, "date": date.today().isoformat(), "ways": found}
    with replacing(asked.out) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
    print("| | seconds | x ours | peak memory | loading, forward, maps, metrics |\n|---|---:|---:|---:|---|")
    for way, row in found.items():
        ratio = row["seconds"] / found[asked.ways[0]]["seconds"]
        split = ", ".join(f"{row['split'][k]:.1f}" for k in ("loading", "forward", "maps", "metrics") if "split" in row)
        print(f"| {way} | {row['seconds']:.1f} | {ratio:.1f} | {row['peak_mb']} MB | {split} |")
    print("\n" + found[asked.ways[0]].get("table", ""))


if __name__ == "__main__":
    main()
