"""Threads or processes for decoding: images a second to 256 px, alone and beside the network.

    python benchmarks/decoding.py [--data FOLDER] [--workers 2] [--seconds 5]

Pictures: those of FOLDER (any images), and drawn ones of 2000 px as JPEG and as PNG. Processes are spawned and write
into shared memory; threads are those of `recontrast.data.cache`. Each is measured alone, and while ResNet-18's network
runs all the time in the main process, whose passes a second are told as well. Interleaved rounds, medians.
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
    """Read one image into its place: of shared memory by name, or of an array that is thrown away."""
    path, name, place = job
    pixels = read_image(path, size=SIDE)
    if name is not None:
        block = _block(name)
        np.ndarray(pixels.shape, np.uint8, block.buf, place * BYTES)[:] = pixels


_BLOCKS: dict[str, SharedMemory] = {}


def _block(name: str) -> SharedMemory:
    if name not in _BLOCKS:
        _BLOCKS[name] = SharedMemory(name)
    return _BLOCKS[name]


def speed(pool: Executor, paths: list[str], name: str | None, seconds: float) -> float:
    """Images a second, in batches of 16."""
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        batch = [(paths[(done + i) % len(paths)], name, i) for i in range(16)]
        list(pool.map(decode, batch))
        done += len(batch)
    return done / (time.perf_counter() - begun)


@contextmanager
def network(run: Callable[[], object]) -> Iterator[list[float]]:
    """Runs it again and again on a thread; the list tells when each pass ended."""
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


def pictures(folder: Path, suffix: str, count: int = 4) -> list[str]:
    """Drawn ones: smooth with a little noise, as photographs are."""
    random = np.random.default_rng(0)
    paths = []
    for i in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).resize((2000, 2000), Image.BICUBIC)
        noisy = np.asarray(coarse, np.int16) + random.integers(-4, 5, (2000, 2000, 1), np.int16)
        paths.append(folder / f"{i}.{suffix}")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(paths[-1])
    return list(map(str, paths))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of images; default: drawn ones alone")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    model = fold(ReContrast("resnet18", weights="random")).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, SIDE, SIDE).to(memory_format=torch.channels_last)

    def run() -> None:
        with torch.inference_mode():
            model(images)

    run()
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(asked.workers) as threads,
        ProcessPoolExecutor(asked.workers, multiprocessing.get_context("spawn")) as processes,
    ):
        block = SharedMemory(create=True, size=16 * BYTES)
        kinds = {"2000 px JPEG": pictures(Path(folder), "jpg"), "2000 px PNG": pictures(Path(folder), "png")}
        if asked.data is not None:
            kinds["images of the folder"] = list(map(str, list_images([asked.data])))[:200]
        pools: dict[str, tuple[Executor, str | None]] = {
            "threads": (threads, None),
            "processes": (processes, block.name),
        }
        found: dict[tuple[str, str, str], list[float]] = {}
        for number in range(asked.rounds + 1):  # the first warms up, and starts the processes
            for kind, paths in kinds.items():
                for who, (pool, name) in pools.items():
                    alone = speed(pool, paths, name, asked.seconds)
                    with network(run) as ended:
                        begun = time.perf_counter()
                        beside = speed(pool, paths, name, asked.seconds)
                        passes = len(ended) / (time.perf_counter() - begun)
                    for what, value in (("alone", alone), ("beside", beside), ("network", 4 * passes)):
                        if number:
                            found.setdefault((kind, who, what), []).append(value)
            print(f"round {number} of {asked.rounds}", file=sys.stderr, flush=True)
        block.close()
        block.unlink()
    print("| | | decoded/s alone | beside the network | images/s of the network |\n|---|---|---:|---:|---:|")
    for kind in kinds:
        for who in pools:
            cells = [f"{statistics.median(found[kind, who, what]):.1f}" for what in ("alone", "beside", "network")]
            print(f"| {kind} | {who} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
