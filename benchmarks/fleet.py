"""Throughput of prediction by number of workers: local, and over Ray with 1, 2, ... workers, interleaved.

    python benchmarks/fleet.py --checkpoint RUN/checkpoint.pt --images DIR --workers 1 2 --rounds 3

Each side has the same CPUs in all: the local one uses a thread for each, a worker its share of them. Ray runs once for
all rounds; the start of the workers is timed apart: seconds from the call until the first part is there.
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
    """Images a second after the first part of each worker, and seconds until the first part."""
    marks: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as out:
        begun = time.perf_counter()
        ray_predict.predict(checkpoint, images, Path(out), workers=workers, part=part, device="cpu",
                      on_progress=lambda done, total: marks.append((time.perf_counter(), done)))  # fmt: skip
    (start, first), (end, last) = marks[workers - 1], marks[-1]
    return (last - first) / (end - start), marks[0][0] - begun


def local(checkpoint: Path, images: list[Path]) -> float:
    """Images a second after the first batch."""
    marks: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as out:
        predict(checkpoint, images, Path(out), overlays=False, device="cpu",
                on_progress=lambda done, total: marks.append((time.perf_counter(), done)))  # fmt: skip
    (start, first), (end, last) = marks[0], marks[-1]
    return (last - first) / (end - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", type=int, default=16, help="images in a part: many parts for each worker")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args()
    images = list_images(given.images)
    if len(images) < 4 * given.part * max(given.workers):
        parser.error(f"wanted at least {4 * given.part * max(given.workers)} images, four parts a worker")
    cpus = len(os.sched_getaffinity(0))
    torch.set_num_threads(cpus)
    rates: dict[str, list[float]] = {}
    starts: list[float] = []
    with ray_predict._cluster(ray_predict._ray(None), None):
        for _ in range(given.rounds):
            rates.setdefault("local", []).append(local(given.checkpoint, images))
            for workers in given.workers:
                rate, start = over_ray(given.checkpoint, images, workers, given.part)
                rates.setdefault(f"ray, {workers}", []).append(rate)
                starts.append(start)
    base = statistics.median(rates["local"])
    print(f"{len(images)} images, {cpus} CPUs; start of workers: {statistics.median(starts):.1f} s")
    print("| | images/s | of local | lowest, highest |\n|---|---:|---:|---|")
    for name, found in rates.items():
        middle = statistics.median(found)
        print(f"| {name} | {middle:.1f} | {middle / base:.2f} | {min(found):.1f}, {max(found):.1f} |")
    if given.out:
        about: dict[str, Any] = {"images": len(images), "cpus": cpus, "torch": torch.__version__, "seconds": starts}
        given.out.write_text(json.dumps({**about, "images_per_second": rates}, indent=1) + "\n")


if __name__ == "__main__":
    main()
