"""A whole evaluation beside the reference's: the same unified detector on all categories of a folder, by wall time.

    python benchmarks/evaluation.py --data FOLDER --checkpoint runs/all/checkpoint.pt --out evaluation.json

FOLDER holds categories in MVTec AD layout. The reference side (`tests/upstream.py`, `tests/upstream_model.py`) has the
same weights and goes as its `evaluation` does: one image after the other, SciPy's blur, lists of pixels, AUPRO of each
image; it is given its images decoded, outside the time. Ours is timed from the files on, folding included. Each side in
a process of its own, whose peak memory is told too; a category without masks has metrics of images alone, on both
sides. Beside each time stand the metrics that it bought, and the floor: the network's multiply-adds at the rate of a
large matrix product. bfloat16 is left out where the device has no kernels for it; `--ways` asks for it all the same.
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
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the restated reference lives there
import upstream
from upstream_model import upstream_from

from recontrast import checkpoint
from recontrast.data import datasets
from recontrast.data.atomic import replace_file
from recontrast.data.cache import ImageCache
from recontrast.data.images import normalise, read_mask
from recontrast.evaluation.evaluate import evaluate
from recontrast.inference.options import InferenceOptions
from recontrast.runtime.device import is_bfloat16_fast, resolve_device

# What is measured -> how the model is run, and options of `evaluate`. The last column of the table is over the first.
WAYS: dict[str, tuple[InferenceOptions, dict[str, Any]]] = {
    "float32": (InferenceOptions(folded=False), {}),
    "float32, folded": (InferenceOptions(), {}),
    "float32, folded, trained view": (InferenceOptions(views="trained"), {}),
    "float32, folded, frozen view": (InferenceOptions(views="frozen"), {}),
    "float32, folded, streaming": (InferenceOptions(), {"streaming": True}),
    "bfloat16": (InferenceOptions(precision="bfloat16", folded=False), {}),
    "bfloat16, folded": (InferenceOptions(precision="bfloat16"), {}),
    "bfloat16, folded, trained view": (InferenceOptions(precision="bfloat16", views="trained"), {}),
}
LEFT_OUT = ("float32, folded, streaming",)  # unless asked for
SHOWN = ("i_auroc", "p_auroc", "aupro", "aupro_per_image")


def rate(dtype: torch.dtype, device: torch.device, side: int = 2048) -> float:
    """Multiply-adds a second of a matrix product, the best of five."""
    a = torch.randn(side, side, device=device).to(dtype)
    seconds = []
    for _ in range(6):  # the first warms up
        begun = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - begun)
    return side**3 / min(seconds[1:])


def multiply_adds(network: Any, recipe: Any) -> float:
    """Of one image."""
    weight = next(network.parameters())
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 3, *recipe.out, dtype=weight.dtype, device=weight.device), recipe.views)
    return counter.get_total_flops() / 2


def tests_of(data: Path) -> dict[str, list[datasets.Sample]]:
    """Test images by category."""
    return {name: [s for s in group if s.split == "test"] for name, group in datasets.load(data).items()}


def ours(data: Path, file: Path, way: str) -> dict[str, Any]:
    """The evaluation of `recontrast evaluate`."""
    inference, options = WAYS[way]
    model, trained, _ = checkpoint.load_model(file)
    recipe, tests = inference.apply_to(trained), tests_of(data)
    begun = time.perf_counter()
    network = inference.build_network(model, recipe, trained)
    result = evaluate(network, tests, recipe, **options)
    seconds = time.perf_counter() - begun
    count = sum(map(len, tests.values()))
    weight = next(network.parameters())
    work = multiply_adds(network.float(), recipe)
    reached = rate(torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32, weight.device)
    about = {"images": count, "multiply_adds": work, "matmul_rate": reached, "floor": count * work / reached}
    values = {name: getattr(result.mean, name) for name in SHOWN}
    split = result.mean.seconds
    return {"seconds": seconds, "split": split, "metrics": values, **about, "table": result.to_markdown()}


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
    means = {name: [row[name] for row in found.values() if row.get(name) is not None] for name in SHOWN}
    values = {name: float(np.nanmean(of)) if of else None for name, of in means.items()}
    return {"seconds": seconds, "rows": found, "metrics": values}


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
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, "reference"])
    parser.add_argument("--out", type=Path, default=Path("evaluation.json"))
    asked = parser.parse_args()
    pays = is_bfloat16_fast(resolve_device(None))
    ways = asked.ways or [w for w in WAYS if w not in LEFT_OUT and (pays or not w.startswith("bfloat16"))]
    ways = ways if asked.ways else [*ways, "reference"]
    found: dict[str, dict[str, Any]] = {}
    for way in ways:
        print(f"{way} ...", file=sys.stderr, flush=True)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found[way] = pool.apply(measure, (way, asked.data, asked.checkpoint))
        print(f"{way}: {found[way]['seconds']:.1f} s", file=sys.stderr, flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    about = {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, "bfloat16_pays": pays}
    record = {**about, "date": date.today().isoformat(), "ways": found}
    with replace_file(asked.out) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
    head = (
        "seconds | reference / it | floor | peak memory | loading, forward, maps, metrics | I-AUROC | P-AUROC | AUPRO"
    )
    print(f"| | {head} | per image |\n|---|" + "---:|" * 4 + "---|" + "---:|" * 4)
    longest = found.get("reference", {}).get("seconds")
    for way, row in found.items():
        cells = [f"{row['seconds']:.1f}", f"{longest / row['seconds']:.2f}" if longest else "-"]
        cells += [f"{row['floor']:.1f}" if "floor" in row else "-", f"{row['peak_mb']} MB"]
        cells += [
            ", ".join(f"{row['split'][k]:.1f}" for k in ("loading", "forward", "maps", "metrics") if "split" in row)
        ]
        cells += ["-" if (v := row["metrics"].get(name)) is None else f"{100 * v:.2f}" for name in SHOWN]
        print(f"| {way} | " + " | ".join(cells) + " |")
    for row in found.values():
        if "floor" in row:
            work, reached = row["multiply_adds"] / 1e9, row["matmul_rate"] / 1e9
            print(f"\nfloor: {work:.2f} G multiply-adds an image, a product reaches {reached:.0f} G a second", end="")
            break
    print("\n\n" + next((row["table"] for row in found.values() if "table" in row), ""))


if __name__ == "__main__":
    main()
