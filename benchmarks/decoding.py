"""Image decoding in threads and in processes: images per second to 256 px, alone and beside the network.

    python benchmarks/decoding.py [--data FOLDER] [--workers 2] [--seconds 5]

The images are those of FOLDER, and drawn images of 2000 px as JPEG and as PNG. Processes are spawned and write to
shared memory; threads decode as in `recontrast.data.cache`. Each is measured alone, and while the ResNet-18 network
runs in the main process, whose images per second are also reported. The figures are medians of interleaved rounds.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from recontrast import ReContrast
from recontrast.data.images import list_images, read_image
from recontrast.models.fold import fold

SIDE = 256
BYTES = SIDE * SIDE * 3


def decode(job: tuple[str, str | None, int]) -> None:
    """Read one image and, if a shared memory block is named, write it there at its index."""
    path, name, index = job
    pixels = read_image(path, size=SIDE)
    if name is not None:
        block = _block(name)
        np.ndarray(pixels.shape, np.uint8, block.buf, index * BYTES)[:] = pixels


_BLOCKS: dict[str, SharedMemory] = {}


def _block(name: str) -> SharedMemory:
    if name not in _BLOCKS:
        _BLOCKS[name] = SharedMemory(name)
    return _BLOCKS[name]


def speed(pool: Executor, paths: list[str], name: str | None, seconds: float) -> float:
    """Return the images per second that the pool decodes in batches of 16."""
    decoded, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = [(paths[(decoded + i) % len(paths)], name, i) for i in range(16)]
        list(pool.map(decode, batch))
        decoded += len(batch)
    return decoded / (time.perf_counter() - start)


@contextmanager
def run_in_background(run: Callable[[], object]) -> Iterator[list[float]]:
    """Call ``run`` repeatedly in a thread and yield a list of the end times of its calls."""
    ended: list[float] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            run()
            ended.append(time.perf_counter())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield ended
    finally:
        stop.set()
        thread.join()


def draw_images(folder: Path, suffix: str, count: int = 4) -> list[str]:
    """Draw images that are smooth with a little noise, as photographs are, and return their paths."""
    random = np.random.default_rng(0)
    paths = []
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).resize((2000, 2000), Image.BICUBIC)
        noisy = np.asarray(coarse, np.int16) + random.integers(-4, 5, (2000, 2000, 1), np.int16)
        paths.append(folder / f"{i}.{suffix}")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1])
    return list(map(str, paths))


def main() -> None:
    """Measure all combinations and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of images; default: drawn images only")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5, help="duration of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = fold(ReContrast("resnet18", weights="random")).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, SIDE, SIDE).to(memory_format=torch.channels_last)

    def run() -> None:
        with torch.inference_mode():
            model(images)

    run()
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(args.workers) as threads,
        ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as processes,
    ):
        block = SharedMemory(create=True, size=16 * BYTES)
        kinds = {"2000 px JPEG": draw_images(Path(folder), "jpg"), "2000 px PNG": draw_images(Path(folder), "png")}
        if args.data is not None:
            kinds["images of the folder"] = list(map(str, list_images([args.data])))[:200]
        pools: dict[str, tuple[Executor, str | None]] = {
            "threads": (threads, None),
            "processes": (processes, block.name),
        }
        results: dict[tuple[str, str, str], list[float]] = {}
        for number in range(args.rounds + 1):  # the first round warms up and starts the processes
            for kind, paths in kinds.items():
                for method, (pool, name) in pools.items():
                    alone = speed(pool, paths, name, args.seconds)
                    with run_in_background(run) as ended:
                        start = time.perf_counter()
                        beside = speed(pool, paths, name, args.seconds)
                        passes = len(ended) / (time.perf_counter() - start)
                    for quantity, value in (("alone", alone), ("beside", beside), ("network", 4 * passes)):
                        if number:
                            results.setdefault((kind, method, quantity), []).append(value)
            print(f"round {number} of {args.rounds}", file=sys.stderr, flush=True)
        block.close()
        block.unlink()
    print(
        "| images | decoders | decoded/s alone | decoded/s beside the network | images/s of the network |\n"
        "|---|---|---:|---:|---:|"
    )
    for kind in kinds:
        for method in pools:
            cells = [
                f"{statistics.median(results[kind, method, quantity]):.1f}"
                for quantity in ("alone", "beside", "network")
            ]
            print(f"| {kind} | {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
