"""The service under load: throughput beside its detector's own, p50 and p99, lost and wrong answers, memory.

A client in a process of its own sends drawn images over several connections and compares every answer with the score
of the detector. In the second part another process sends garbage, half requests, bodies of 100 MB, decompression
bombs, slow bytes, and closes connections at the same time. At the end the service gets SIGTERM under load: it must have
answered what it accepted.

Where other programs run, images per second say little: the ratio of the processor times of one image, in the detector
alone and in the whole service, does not depend on them.

    python benchmarks/service.py --seconds 60 --out service.json
    python benchmarks/service.py --backbone test_resnet --size 64 --answers 10000
"""

import argparse
import json
import os
import platform
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from datetime import date
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

CONNECTIONS = 8
IMAGES = 20
SIDE = 512  # pixels of a drawn image


# ---- clients, which run in processes of their own --------------------------------------------------------------------


def run_client(port: int, folder: Path, seconds: float, answers: int) -> dict[str, Any]:
    """Send images over several connections until the time is over or so many answers have come.

    Args:
        port: Port of the service.
        folder: Folder with images, and scores.json with their scores.
        seconds: Longest time.
        answers: Largest number of answers.

    Returns:
        Numbers of answers, of wrong ones and of requests without an answer, and the latencies in seconds.
    """
    scores = json.loads((folder / "scores.json").read_text())
    images = {name: (folder / name).read_bytes() for name in scores}
    end, lock = time.monotonic() + seconds, threading.Lock()
    found: dict[str, Any] = {"answered": 0, "wrong": 0, "refused": 0, "lost": 0, "latencies": []}

    def work(seed: int) -> None:
        connection, names = HTTPConnection("127.0.0.1", port, timeout=120), list(images)
        chosen = random.Random(seed)
        while time.monotonic() < end and found["answered"] < answers:
            name, begin = chosen.choice(names), time.perf_counter()
            kind, score = "lost", None
            try:
                connection.request("POST", "/predict", images[name], {"Content-Type": "image/png"})
                response = connection.getresponse()
                content = json.loads(response.read())
                kind, score = ("answered" if response.status == 200 else "refused"), content.get("score")
            except ConnectionRefusedError:  # the service has stopped: nothing was sent
                return
            except (OSError, HTTPException, ValueError):
                connection.close()
            with lock:
                found[kind] += 1
                if kind == "answered":
                    found["latencies"].append(time.perf_counter() - begin)
                    found["wrong"] += abs(score - scores[name]) > 1e-5 * abs(scores[name])
            if kind == "refused":
                time.sleep(0.1)

    begin = time.perf_counter()
    threads = [threading.Thread(target=work, args=[seed]) for seed in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {**found, "seconds": time.perf_counter() - begin}


def build_bomb() -> bytes:
    """Return a PNG file of a few kilobytes that states 65,000 x 65,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head, pixels = struct.pack(">IIBBBBB", 65_000, 65_000, 8, 2, 0, 0, 0), zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def run_hostile(port: int, seconds: float) -> dict[str, int]:
    """Send what a good client never sends, until the time is over; return how often each kind was sent."""
    end, sent = time.monotonic() + seconds, {}
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"
    bomb = build_bomb()

    def talk(parts: list[bytes], pause: float = 0.0, answer: bool = True) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            if answer:
                connection.recv(1 << 16)

    kinds = {
        "garbage": lambda: talk([os.urandom(500) + b"\r\n\r\n"]),
        "half": lambda: talk([head.format(90_000).encode() + bytes(1000)], answer=False),
        "large": lambda: talk([head.format(100_000_000).encode(), *[bytes(1 << 20)] * 95]),
        "bomb": lambda: talk([head.format(len(bomb)).encode() + bomb]),
        "slow": lambda: talk([head.format(1000).encode(), *[b"x"] * 20], pause=0.2, answer=False),
        "headers": lambda: talk([b"GET / HTTP/1.1\r\nX: " + b"x" * 30_000]),
        "disconnect": lambda: talk([head.format(10).encode()], answer=False),
    }

    def work(name: str) -> None:
        while time.monotonic() < end:
            try:
                kinds[name]()
            except OSError:  # the service has closed the connection
                pass
            sent[name] = sent.get(name, 0) + 1
            time.sleep(0.1)

    threads = [threading.Thread(target=work, args=[name]) for name in kinds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sent


# ---- the benchmark ---------------------------------------------------------------------------------------------------


def prepare(folder: Path, backbone: str, size: int) -> tuple[Path, float, float]:
    """Save an untrained detector and drawn images with their scores; return its path and `measure_own`."""
    import numpy as np
    import torch
    from PIL import Image

    from recontrast import checkpoint as checkpoints
    from recontrast.data.image_files import ImageFiles
    from recontrast.inference.detector import CheckpointDetector, run_checked
    from recontrast.recipes.recipe import Recipe
    from recontrast.training.train import build_model

    recipe = Recipe(backbone=backbone, weights="random", size=size, encoder_bn="eval")
    torch.manual_seed(0)
    model = build_model(recipe, "drawn")
    about = {"size": list(recipe.out), "crop": None, "mean": list(model.mean), "std": list(model.std)}
    path = checkpoints.save(
        folder / "checkpoint.pt",
        checkpoints.Checkpoint(0, "drawn", recipe, model.config, about, {"count": 0, "digest": ""}, model.state_dict()),
    )
    noise, paths = np.random.default_rng(0), []
    for index in range(IMAGES):
        waves = 120 + 60 * np.sin(np.arange(SIDE) / (5 + index))[:, None, None] + noise.normal(0, 9, (SIDE, SIDE, 3))
        paths.append(folder / f"{index:03}.png")
        Image.fromarray(waves.clip(0, 255).astype(np.uint8)).save(paths[-1], compress_level=1)
    detector = CheckpointDetector(path, "cpu")
    scores = np.concatenate([scores for _, scores in run_checked(detector, ImageFiles(paths), 1)])
    named = {file.name: float(f"{score:.9g}") for file, score in zip(paths, scores, strict=True)}
    (folder / "scores.json").write_text(json.dumps(named))
    return path, *measure_own(detector, paths)


def measure_own(detector: Any, paths: list[Path], seconds: float = 15.0) -> tuple[float, float]:
    """Return images per second and processor seconds per image of a detector that reads the files itself."""
    from concurrent.futures import ThreadPoolExecutor

    from recontrast.data.image_files import ImageFiles
    from recontrast.inference.detector import run_checked

    count, begin, processor = 0, time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(2) as pool:
        while time.perf_counter() - begin < seconds:
            for _, scores in run_checked(detector, ImageFiles(paths, pool), 8):
                count += len(scores)
    return count / (time.perf_counter() - begin), (time.process_time() - processor) / count


def read_processor_time(pid: int) -> float:
    """Return the seconds of processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_memory(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    match = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(match[1]) / 1024 if match else float("nan")


def start_self(*words: Any) -> "subprocess.Popen[str]":
    """Start this file in another process."""
    return subprocess.Popen([sys.executable, __file__, *map(str, words)], stdout=subprocess.PIPE, text=True)


def collect(process: "subprocess.Popen[str]") -> dict[str, Any]:
    """Wait for a process of `start_self`, and return what it printed."""
    return dict(json.loads(process.communicate()[0]))


def describe_load(found: dict[str, Any]) -> dict[str, Any]:
    """Summarise the answers of a client."""
    latencies = sorted(found.pop("latencies"))
    found["images_per_second"] = found["answered"] / found["seconds"]
    if latencies:
        found["p50"], found["p99"] = latencies[len(latencies) // 2], latencies[int(0.99 * (len(latencies) - 1))]
    return found


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run all parts."""
    path, own, own_processor = prepare(folder, options.backbone, options.size)
    row: dict[str, Any] = {
        "date": date.today().isoformat(), "machine": platform.processor() or platform.machine(),
        "backbone": options.backbone, "size": options.size, "threads": os.environ.get("OMP_NUM_THREADS"),
        "own_images_per_second": own,
    }  # fmt: skip
    command = [sys.executable, "-m", "recontrast", "serve", str(path), "--port", "0", "--device", "cpu"]
    command += ["--body-timeout", "5"]
    service = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        port = int(re.search(r":(\d+)/", service.stdout.readline())[1])  # type: ignore[union-attr, index]
        client = ("--client", port, folder, "--answers", options.answers, "--seconds")
        collect(start_self(*client, 3))  # warm
        before, processor = read_memory(service.pid), read_processor_time(service.pid)
        row["load"] = describe_load(collect(start_self(*client, options.seconds)))
        row["load"]["share_of_own"] = row["load"]["images_per_second"] / own
        spent = (read_processor_time(service.pid) - processor) / max(row["load"]["answered"], 1)
        row["processor_seconds_per_image"] = {"own": own_processor, "service": spent, "ratio": own_processor / spent}
        row["memory_mb"] = [before, read_memory(service.pid)]
        hostile = start_self("--hostile", port, "--seconds", options.seconds / 2)
        row["beside_hostile"] = describe_load(collect(start_self(*client, options.seconds / 2)))
        row["hostile_requests"] = collect(hostile)
        row["memory_mb"].append(read_memory(service.pid))
        last = start_self(*client, 60)
        time.sleep(3)
        service.send_signal(signal.SIGTERM)
        stopped = describe_load(collect(last))
        row["sigterm"] = {"status": service.wait(60), **stopped}
        text = service.stderr.read()  # type: ignore[union-attr]
        counts = re.search(r"(\d+) images accepted, (\d+) answered", text)
        row["sigterm"] |= {"accepted": int(counts[1]), "answers": int(counts[2])} if counts else {"said": text}
    finally:
        service.kill()
        service.communicate()
    return row


def main() -> None:
    """Run the benchmark, or one of its clients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=60.0, help="time of the load; half of it beside bad clients")
    parser.add_argument("--answers", type=int, default=10**9, help="end a part after so many answers")
    parser.add_argument("--out", type=Path, help="file for the results, JSON")
    parser.add_argument("--client", nargs=2, metavar=("PORT", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--hostile", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        port, folder = options.client
        print(json.dumps(run_client(int(port), Path(folder), options.seconds, options.answers)))
        return
    if options.hostile:
        print(json.dumps(run_hostile(options.hostile, options.seconds)))
        return
    with tempfile.TemporaryDirectory() as name:
        row = measure(Path(name), options)
    print(json.dumps(row, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
