"""Wall time of a whole evaluation beside the reference: one unified detector on all categories of a folder.

    python benchmarks/evaluation.py --data FOLDER --checkpoint runs/all/checkpoint.pt --out evaluation.json

FOLDER holds categories in MVTec AD layout. The reference (`tests/upstream.py`, `tests/upstream_model.py`) has the same
weights and works as its `evaluation` function: image by image, SciPy's blur, lists of pixels, AUPRO of each image. Its
images are decoded before the timer starts; ours is timed from the image files and includes folding. Each side runs in
its own process and reports its peak memory. A category without masks has image metrics only, on both sides. The table
also shows the metrics, and as a lower bound the time of the network's multiply-adds at the rate of a large matrix
product. bfloat16 is skipped on devices without kernels for it, unless `--ways` names it. `--files` adds exported files
of the same detector, evaluated as `recontrast evaluate FILE` does.
"""

import argparse
import multiprocessing
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
from measurements import name_machine, write_record
from upstream_model import upstream_from

import recontrast
from recontrast import checkpoint
from recontrast.data import datasets
from recontrast.data.cache import ImageCache
from recontrast.data.images import normalise, read_mask
from recontrast.evaluation.evaluate import evaluate
from recontrast.export.decisions import list_files
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.inference.options import InferenceOptions
from recontrast.runtime.device import is_bfloat16_fast, resolve_device

# Name -> inference options, and options of `evaluate`.
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
LEFT_OUT = ("float32, folded, streaming",)  # unless --ways names it
SHOWN = ("i_auroc", "p_auroc", "aupro", "aupro_per_image")


def rate(dtype: torch.dtype, device: torch.device, side: int = 2048) -> float:
    """Return multiply-adds per second of a matrix product, the best of five."""
    a = torch.randn(side, side, device=device).to(dtype)
    seconds = []
    for _ in range(6):  # the first is a warm-up
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return side**3 / min(seconds[1:])


def multiply_adds(network: Any, recipe: Any) -> float:
    """Return the number of multiply-adds of the network for one image."""
    weight = next(network.parameters())
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 3, *recipe.out, dtype=weight.dtype, device=weight.device), recipe.views)
    return counter.get_total_flops() / 2


def load_tests(data: Path) -> dict[str, list[datasets.Sample]]:
    """Return the test images by category."""
    return {name: [s for s in group if s.split == "test"] for name, group in datasets.load(data).items()}


def ours(data: Path, file: Path, way: str) -> dict[str, Any]:
    """Evaluate as `recontrast evaluate` does and return time, metrics and lower bound."""
    inference, options = WAYS[way]
    model, trained, _ = checkpoint.load_model(file)
    recipe, tests = inference.apply_to(trained), load_tests(data)
    start = time.perf_counter()
    network = inference.build_network(model, recipe, trained)
    result = evaluate(network, tests, recipe, **options)
    seconds = time.perf_counter() - start
    count = sum(map(len, tests.values()))
    weight = next(network.parameters())
    work = multiply_adds(network.float(), recipe)
    reached = rate(torch.bfloat16 if recipe.precision == "bfloat16" else torch.float32, weight.device)
    about = {"images": count, "multiply_adds": work, "matmul_rate": reached, "floor": count * work / reached}
    values = {name: getattr(result.mean, name) for name in SHOWN}
    split = result.mean.seconds
    return {"seconds": seconds, "split": split, "metrics": values, **about, "table": result.to_markdown()}


def exported(data: Path, file: Path) -> dict[str, Any]:
    """Evaluate an exported file as `recontrast evaluate` does and return time and metrics."""
    tests = [sample for samples in load_tests(data).values() for sample in samples]
    start = time.perf_counter()
    result = recontrast.evaluate(ExportedDetector(file), tests)
    seconds = time.perf_counter() - start
    values = {name: getattr(result.mean, name) for name in SHOWN}
    about = {"images": len(tests), "megabytes": sum(part.stat().st_size for part in list_files(file)) / 1e6}
    return {"seconds": seconds, "metrics": values, **about, "table": result.to_markdown()}


def reference(data: Path, file: Path) -> dict[str, Any]:
    """Evaluate the same images with the reference's loop and return time and metrics."""
    ours, recipe, _ = checkpoint.load_model(file)
    model = upstream_from(ours, recipe.backbone.partition(".")[0]).to(next(ours.parameters()).device).eval()

    def pairs(batch: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(*model(batch), strict=True))

    device, seconds = next(ours.parameters()).device, 0.0
    rows_by_category = {}
    for name, tests in load_tests(data).items():
        images = normalise(ImageCache(tests, recipe.size)[:], ours.mean, ours.std, device=device)
        labels = np.array([sample.label for sample in tests])
        masked = all(s.mask is not None for s in tests if s.label)
        empty = np.zeros(recipe.out, bool)
        masks = [read_mask(s.mask, size=recipe.size, rule="any") if s.mask is not None else empty for s in tests]
        truth = np.stack(masks) if masked else np.broadcast_to(labels[:, None, None] > 0, (len(tests), *recipe.out))
        start = time.perf_counter()
        row = upstream.evaluate(pairs, images, torch.from_numpy(truth.copy())[:, None], labels, calc_pro=masked)
        seconds += time.perf_counter() - start
        rows_by_category[name] = dict(zip(("p_auroc", "i_auroc", "aupro_per_image"), row, strict=True))
    columns = {name: [row[name] for row in rows_by_category.values() if row.get(name) is not None] for name in SHOWN}
    values = {name: float(np.nanmean(column)) if column else None for name, column in columns.items()}
    return {"seconds": seconds, "rows": rows_by_category, "metrics": values}


def measure(way: str, data: Path, file: Path) -> dict[str, Any]:
    """Measure one configuration; runs in its own process."""
    if way == "reference":
        result = reference(data, file)
    else:
        result = ours(data, file, way) if way in WAYS else exported(data, Path(way))
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return result


def main() -> None:
    """Measure all configurations and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of categories in MVTec AD layout")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint of a detector with a ResNet encoder")
    parser.add_argument("--ways", nargs="+", choices=[*WAYS, "reference"])
    parser.add_argument("--files", nargs="+", type=Path, default=[], help="exported files of the detector")
    parser.add_argument("--out", type=Path, default=Path("evaluation.json"))
    args = parser.parse_args()
    fast_bfloat16 = is_bfloat16_fast(resolve_device(None))
    ways = args.ways or [w for w in WAYS if w not in LEFT_OUT and (fast_bfloat16 or not w.startswith("bfloat16"))]
    ways = [*(ways if args.ways else [*ways, "reference"]), *map(str, args.files)]
    results: dict[str, dict[str, Any]] = {}
    for way in ways:
        print(f"{way} ...", file=sys.stderr, flush=True)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[way] = pool.apply(measure, (way, args.data, args.checkpoint))
        print(f"{way}: {results[way]['seconds']:.1f} s", file=sys.stderr, flush=True)
    about = {
        "device": name_machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "bfloat16_pays": fast_bfloat16,
    }
    record = {**about, "date": date.today().isoformat(), "ways": results}
    write_record(args.out, record)
    print("| configuration | seconds | speedup over the reference | lower bound, s | peak memory ", end="")
    print("| loading, forward, maps, metrics | I-AUROC | P-AUROC | AUPRO | AUPRO per image |")
    print("|---|" + "---:|" * 4 + "---|" + "---:|" * 4)
    reference_seconds = results.get("reference", {}).get("seconds")
    for way, row in results.items():
        cells = [f"{row['seconds']:.1f}", f"{reference_seconds / row['seconds']:.2f}" if reference_seconds else "-"]
        cells += [f"{row['floor']:.1f}" if "floor" in row else "-", f"{row['peak_mb']} MB"]
        parts = ("loading", "forward", "maps", "metrics")
        cells += [", ".join(f"{row['split'][k]:.1f}" for k in parts) if "split" in row else "-"]
        cells += ["-" if (v := row["metrics"].get(name)) is None else f"{100 * v:.2f}" for name in SHOWN]
        print(f"| {way} | " + " | ".join(cells) + " |")
    for row in results.values():
        if "floor" in row:
            work, reached = row["multiply_adds"] / 1e9, row["matmul_rate"] / 1e9
            print(f"\nlower bound: {work:.2f} G multiply-adds per image, at {reached:.0f} G per second", end="")
            break
    print("\n\n" + next((row["table"] for row in results.values() if "table" in row), ""))


if __name__ == "__main__":
    main()
