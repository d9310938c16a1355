"""Prediction throughput by number of workers: local, and with 1, 2, ... Ray workers, in interleaved rounds.

    python benchmarks/fleet.py --checkpoint RUN/checkpoint.pt --images DIR --workers 1 2 --rounds 3

All variants use the same CPUs in total: the local one has a thread per CPU, and each worker has its share. Ray is
started once for all rounds. The start of the workers is timed separately: the seconds from the call to the first part.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from recontrast.app.prediction import ray_predict
from recontrast.app.prediction.predict import predict
from recontrast.data.images import list_images


def over_ray(checkpoint: Path, images: list[Path], workers: int, part: int) -> tuple[float, float]:
    """Return images per second after the first part of each worker, and the seconds to the first part."""
    marks: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as out:
        begin = time.perf_counter()
        ray_predict.predict(checkpoint, images, Path(out), workers=workers, part=part, device="cpu",
                      on_progress=lambda done, total: marks.append((time.perf_counter(), done)))  # fmt: skip
    (start, first), (end, last) = marks[workers - 1], marks[-1]
    return (last - first) / (end - start), marks[0][0] - begin


def local(checkpoint: Path, images: list[Path]) -> float:
    """Return images per second after the first batch."""
    marks: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as out:
        predict(checkpoint, images, Path(out), overlays=False, device="cpu",
                on_progress=lambda done, total: marks.append((time.perf_counter(), done)))  # fmt: skip
    (start, first), (end, last) = marks[0], marks[-1]
    return (last - first) / (end - start)


def main() -> None:
    """Measure all variants and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", type=int, default=16, help="images per part; each worker needs many parts")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    images = list_images(args.images)
    least = 4 * args.part * max(args.workers)
    if len(images) < least:
        parser.error(f"--images: wanted at least {least} images (four parts per worker), got {len(images)}")
    cpus = len(os.sched_getaffinity(0))
    torch.set_num_threads(cpus)
    rates: dict[str, list[float]] = {}
    starts: list[float] = []
    with ray_predict._cluster(ray_predict._import_ray(None), None):
        for _ in range(args.rounds):
            rates.setdefault("local", []).append(local(args.checkpoint, images))
            for workers in args.workers:
                rate, start = over_ray(args.checkpoint, images, workers, args.part)
                rates.setdefault(f"ray, {workers}", []).append(rate)
                starts.append(start)
    base = statistics.median(rates["local"])
    print(f"{len(images)} images, {cpus} CPUs; start of workers: {statistics.median(starts):.1f} s")
    print("| variant | images/s | x local | min, max |\n|---|---:|---:|---|")
    for name, values in rates.items():
        middle = statistics.median(values)
        print(f"| {name} | {middle:.1f} | {middle / base:.2f} | {min(values):.1f}, {max(values):.1f} |")
    if args.out:
        about: dict[str, Any] = {"images": len(images), "cpus": cpus, "torch": torch.__version__, "seconds": starts}
        args.out.write_text(json.dumps({**about, "images_per_second": rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
