r"""Exported files beside the checkpoint: largest relative difference of a score, file size, images per second.

Each detector has the real size and weights of its backbone (random weights for wide_resnet50_2) and an untrained
decoder with BatchNorm statistics of one batch. The export compares scores on drawn images of eight sizes and on the
images of --images. Then the checkpoint and the exported file score the same PNG files in turn.

    python benchmarks/export.py --resnet18 resnet18.pth --out export-cpu.json

With --checkpoint, files of less than float32 are made from a trained detector, and their reports are kept:

    python benchmarks/export.py --checkpoint RUN/checkpoint.pt --formats openvino,onnx --precisions int8,float16 \
        --images DATA/screw/train/good --data DATA/screw --out precision-cpu.json

This takes many minutes on a CPU. A second call continues with the results that the file lacks.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurements import write_record
from PIL import Image

import recontrast
from recontrast import checkpoint as checkpoints
from recontrast.data.image_files import ImageFiles
from recontrast.data.listing import list_images
from recontrast.export.export import SUFFIXES, export
from recontrast.inference.detector import CheckpointDetector, Detector
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.recipes.paper import RECIPES
from recontrast.recipes.recipe import Recipe
from recontrast.training.train import build_model

METRICS = ("i_auroc", "p_auroc", "aupro")


def save_untrained(folder: Path, recipe: Recipe) -> Path:
    """Save an untrained checkpoint whose BatchNorm statistics come from one batch, and return its path."""
    torch.manual_seed(0)
    model = build_model(recipe, "drawn").train()
    with torch.no_grad():
        model(torch.randn(2, 3, *recipe.out))
    about = {"size": list(recipe.out), "crop": None, "mean": list(model.mean), "std": list(model.std)}
    state, images = model.state_dict(), {"count": 0, "digest": ""}
    return checkpoints.save(
        folder / "checkpoint.pt", checkpoints.Checkpoint(0, "drawn", recipe, model.config, about, images, state)
    )


def draw_images(folder: Path, count: int, side: int) -> list[Path]:
    """Draw ``count`` PNG files with waves and noise, ``side`` pixels square, and return their paths."""
    random, paths = np.random.default_rng(0), []
    for index in range(count):
        waves = 120 + 60 * np.sin(np.arange(side) / (5 + index))[:, None, None] + random.normal(0, 20, (side, side, 3))
        paths.append(folder / f"{index:03}.png")
        Image.fromarray(waves.clip(0, 255).astype(np.uint8)).save(paths[-1], compress_level=1)
    return paths


def seconds(detector: Detector, paths: list[Path], batch: int) -> float:
    """Return the seconds from files to scores."""
    with ThreadPoolExecutor() as pool:
        start = time.perf_counter()
        for _ in detector.run(ImageFiles(paths, pool), batch):
            pass
        return time.perf_counter() - start


def measure(recipe: Recipe, kinds: list[str], args: argparse.Namespace, save: Callable[[str, dict], None]) -> None:
    """Measure one detector in all formats and call ``save`` after each."""
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        folder = Path(name)
        path, files = save_untrained(folder, recipe), draw_images(folder, args.count, args.side)
        own = CheckpointDetector(path, "cpu")
        for kind in kinds:
            start = time.perf_counter()
            exported_files = export(
                path, kind, folder / f"detector{SUFFIXES[kind]}", images=args.images and list_images(args.images)
            )
            export_seconds, exported = time.perf_counter() - start, ExportedDetector(exported_files.path)
            timings: list[tuple[float, float]] = []
            for detector in (own, exported):
                seconds(detector, files[: args.batch], args.batch)  # warm-up
            for _ in range(args.rounds):
                timings.append((seconds(own, files, args.batch), seconds(exported, files, args.batch)))
            rates = args.count / np.median(timings, axis=0)
            save(kind, {
                "images_compared": exported_files.images, "largest_relative_difference": exported_files.difference,
                "megabytes": sum(file.stat().st_size for file in exported_files.files) / 1e6,
                "export_seconds": export_seconds,
                "images_per_second": {"checkpoint": rates[0], "exported": rates[1]},
            })  # fmt: skip


def measure_precisions(args: argparse.Namespace) -> dict[str, Any]:
    """Export a trained detector in each precision and format, and return the reports."""
    good = list_images(args.images)

    def measure_metrics(detector: Any) -> dict[str, float]:
        mean = recontrast.evaluate(detector, args.data).mean
        return {name: value for name in METRICS if (value := getattr(mean, name)) is not None}

    reports = {}
    for kind in args.formats.split(","):
        for precision in args.precisions.split(","):
            with tempfile.TemporaryDirectory(dir=args.work) as name:
                start = time.perf_counter()
                result = export(
                    args.checkpoint, kind, Path(name) / f"detector{SUFFIXES[kind]}", precision=precision, images=good,
                    measure=measure_metrics if args.data else None,
                )  # fmt: skip
                if result.report is not None:
                    reports[f"{kind} {precision}"] = {
                        "export_seconds": time.perf_counter() - start, **result.report.to_dict(),
                    }  # fmt: skip
                print(f"{kind} {precision}: {reports.get(f'{kind} {precision}')}", file=sys.stderr, flush=True)
    return reports


def main() -> None:
    """Measure the results that the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resnet18", type=Path, help="weights file of resnet18; without it, resnet18 is skipped")
    parser.add_argument("--checkpoint", type=Path, help="trained detector, for files of less than float32")
    parser.add_argument("--precisions", default="int8,float16", help="of the files of --checkpoint")
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="labelled categories, for their metrics")
    parser.add_argument("--backbones", default="resnet18,tf_efficientnet_lite0,wide_resnet50_2")
    parser.add_argument("--formats", default=",".join(SUFFIXES))
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="further images to compare scores on")
    parser.add_argument("--count", type=int, default=16, help="number of timed images")
    parser.add_argument("--side", type=int, default=1024, help="side of the timed images, pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; the figures are medians")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=None, help="folder for temporary files")
    parser.add_argument("--out", type=Path, default=Path("export.json"), help="results; a later call continues it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    packages = ("torch", "onnx", "onnxruntime", "onnxscript", "openvino", "pillow", "timm")
    about: dict[str, Any] = {
        "date": f"{date.today()}", "machine": platform.machine(), "threads": args.threads, "side": args.side,
        "count": args.count, "batch": args.batch, "rounds": args.rounds,
        "versions": {p: version(p) for p in packages},
    }  # fmt: skip
    if args.checkpoint is not None:
        write_record(args.out, {"settings": about, "reports": measure_precisions(args)})
        return
    record = json.loads(args.out.read_text()) if args.out.exists() else {"settings": about, "detectors": {}}
    weights = {"resnet18": str(args.resnet18), "tf_efficientnet_lite0": "package", "wide_resnet50_2": "random"}
    for backbone in args.backbones.split(","):
        if backbone == "resnet18" and args.resnet18 is None:
            continue
        results = record["detectors"].setdefault(backbone, {})

        def save(kind: str, result: dict, results: dict = results, backbone: str = backbone) -> None:
            results[kind] = result
            write_record(args.out, record)
            print(f"{backbone} {kind}: {json.dumps(result)}", file=sys.stderr, flush=True)

        missing = [kind for kind in args.formats.split(",") if kind not in results]
        recipe = RECIPES["mvtec"].replace(backbone=backbone, weights=weights.get(backbone, "random"))
        if missing:
            measure(recipe, missing, args, save)


if __name__ == "__main__":
    main()
