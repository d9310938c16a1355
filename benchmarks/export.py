"""Exported files beside the checkpoint: largest relative difference of a score, bytes, images a second from files.

Each detector has its backbone's real size and weights (wide_resnet50_2: random ones) and an untrained decoder, whose
statistics are those of a batch. It is exported to each format, which compares scores on drawn images of eight sizes,
and on those of --images. Then checkpoint and exported file score the same PNG files in turn, from file to score.

    python benchmarks/export.py --resnet18 resnet18.pth --out export-cpu.json

Many minutes on a CPU; a second call goes on with what the file lacks.
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
from PIL import Image

from recontrast import checkpoint as checkpoints
from recontrast.data.atomic import replace_file
from recontrast.data.image_files import ImageFiles
from recontrast.data.listing import list_images
from recontrast.export.export import SUFFIXES, export
from recontrast.inference.detector import CheckpointDetector, Detector
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.recipes.paper import RECIPES
from recontrast.recipes.recipe import Recipe
from recontrast.training.train import build_model


def untrained(folder: Path, recipe: Recipe) -> Path:
    """A checkpoint whose BatchNorms have seen a batch."""
    torch.manual_seed(0)
    model = build_model(recipe, "drawn").train()
    with torch.no_grad():
        model(torch.randn(2, 3, *recipe.out))
    about = {"size": list(recipe.out), "crop": None, "mean": list(model.mean), "std": list(model.std)}
    state, images = model.state_dict(), {"count": 0, "digest": ""}
    return checkpoints.save(
        folder / "checkpoint.pt", checkpoints.Checkpoint(0, "drawn", recipe, model.config, about, images, state)
    )


def photographs(folder: Path, count: int, side: int) -> list[Path]:
    """PNG files of noise over waves, ``side`` pixels square."""
    random, found = np.random.default_rng(0), []
    for place in range(count):
        waves = 120 + 60 * np.sin(np.arange(side) / (5 + place))[:, None, None] + random.normal(0, 20, (side, side, 3))
        found.append(folder / f"{place:03}.png")
        Image.fromarray(waves.clip(0, 255).astype(np.uint8)).save(found[-1], compress_level=1)
    return found


def seconds(detector: Detector, paths: list[Path], batch: int) -> float:
    """Time from files to scores."""
    with ThreadPoolExecutor() as pool:
        start = time.perf_counter()
        for _ in detector.run(ImageFiles(paths, pool), batch):
            pass
        return time.perf_counter() - start


def measure(recipe: Recipe, kinds: list[str], asked: argparse.Namespace, save: Callable[[str, dict], None]) -> None:
    """All formats of one detector; ``save`` is told of each."""
    with tempfile.TemporaryDirectory(dir=asked.work) as name:
        folder = Path(name)
        path, files = untrained(folder, recipe), photographs(folder, asked.count, asked.side)
        own = CheckpointDetector(path, "cpu")
        for kind in kinds:
            start = time.perf_counter()
            made = export(
                path, kind, folder / f"detector{SUFFIXES[kind]}", images=asked.images and list_images(asked.images)
            )
            took, exported = time.perf_counter() - start, ExportedDetector(made.path)
            both: list[tuple[float, float]] = []
            for detector in (own, exported):
                seconds(detector, files[: asked.batch], asked.batch)  # warm
            for _ in range(asked.rounds):
                both.append((seconds(own, files, asked.batch), seconds(exported, files, asked.batch)))
            rates = asked.count / np.median(both, axis=0)
            save(kind, {
                "images_compared": made.images, "largest_relative_difference": made.difference,
                "megabytes": sum(file.stat().st_size for file in made.files) / 1e6, "export_seconds": took,
                "images_per_second": {"checkpoint": rates[0], "exported": rates[1]},
            })  # fmt: skip


def main() -> None:
    """Measure what the file lacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resnet18", type=Path, help="weights of resnet18; default: left out")
    parser.add_argument("--backbones", default="resnet18,tf_efficientnet_lite0,wide_resnet50_2")
    parser.add_argument("--formats", default=",".join(SUFFIXES))
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="compare scores on these too")
    parser.add_argument("--count", type=int, default=16, help="images timed")
    parser.add_argument("--side", type=int, default=1024, help="of the images timed, pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="medians are of so many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=None, help="folder for files while it runs")
    parser.add_argument("--out", type=Path, default=Path("export.json"), help="results, read again by the next call")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    packages = ("torch", "onnx", "onnxruntime", "onnxscript", "openvino", "pillow", "timm")
    about: dict[str, Any] = {
        "date": f"{date.today()}", "machine": platform.machine(), "threads": asked.threads, "side": asked.side,
        "count": asked.count, "batch": asked.batch, "rounds": asked.rounds,
        "versions": {p: version(p) for p in packages},
    }  # fmt: skip
    record = json.loads(asked.out.read_text()) if asked.out.exists() else {"settings": about, "detectors": {}}
    weights = {"resnet18": str(asked.resnet18), "tf_efficientnet_lite0": "package", "wide_resnet50_2": "random"}
    for backbone in asked.backbones.split(","):
        if backbone == "resnet18" and asked.resnet18 is None:
            continue
        known = record["detectors"].setdefault(backbone, {})

        def save(kind: str, found: dict, known: dict = known, backbone: str = backbone) -> None:
            known[kind] = found
            with replace_file(asked.out) as file:
                file.write(json.dumps(record, indent=1).encode() + b"\n")
            print(f"{backbone} {kind}: {json.dumps(found)}", file=sys.stderr, flush=True)

        missing = [kind for kind in asked.formats.split(",") if kind not in known]
        recipe = RECIPES["mvtec"].replace(backbone=backbone, weights=weights.get(backbone, "random"))
        if missing:
            measure(recipe, missing, asked, save)


if __name__ == "__main__":
    main()
