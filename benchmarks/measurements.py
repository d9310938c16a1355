"""Measurements: run on the device, written to JSON one by one, and printed as a table."""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from recontrast import ops
from recontrast.data.atomic import replace_file

Function = Callable[[], object]


class Run:
    """Measurements of one stage.

    Args:
        args: Command line with the device, the JSON file ``out``, ``tiny`` shapes, name filters ``only`` and the time
            limit ``seconds``.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.tiny, self.out = torch.device(args.device), args.tiny, args.out
        self.only, self.deadline = args.only, time.monotonic() + args.seconds
        self.cuda = self.device.type == "cuda"
        previous = json.loads(self.out.read_text()) if self.out.exists() else {}
        self.record = {"about": describe_environment(self.device), "rows": [], **previous}

    def is_out_of_time(self) -> bool:
        """Return whether the time limit of the stage is over."""
        return time.monotonic() > self.deadline

    def measure(
        self, group, name, function=None, *, make=None, moved=None, least=None, images=None, seconds=0.8, most=50
    ):
        """Time one implementation and write its row.

        Args:
            group: Group of implementations that do the same work.
            name: Name of the implementation.
            function: Function to time.
            make: Function that returns the function to time, if ``function`` is not given.
            moved: Bytes that the function must move, for GB/s.
            least: Bytes that it must move for hard points alone, for a second GB/s figure.
            images: Number of images per call, for images/s.
            seconds: Time to spend on repetitions.
            most: Largest number of repetitions.
        """
        if self.is_out_of_time() or (self.only and not any(part in name for part in self.only)):
            return
        row = {"group": group, "name": name}
        try:
            row |= self._time(function or make(), seconds, most)
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
        except Exception as error:  # a failing implementation must not end the run
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        if moved and "ms" in row:
            row["GB/s"] = round(moved / row["ms"] / 1e6, 1)
        if least and "ms" in row:
            row["GB/s of hard points"] = round(least / row["ms"] / 1e6, 1)
        if images and "ms" in row:
            row["images/s"] = round(images / row["ms"] * 1e3, 1)
        self.record["rows"] = [r for r in self.record["rows"] if (r["group"], r["name"]) != (group, name)] + [row]
        self.save()
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    def save(self) -> None:
        """Write all rows to the file atomically."""
        write_record(self.out, self.record)

    def _time(self, function: Function, seconds: float, most: int) -> dict:
        synchronise = torch.cuda.synchronize if self.cuda else lambda: None
        peak = {}
        function()
        synchronise()
        if self.cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        function()
        synchronise()
        once = time.perf_counter() - start
        if self.cuda:
            peak = {"peak MB": round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)}
        rounds = int(min(max(seconds / max(once, 1e-5), 3), most))
        times = []
        if self.cuda:
            marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
            for first, last in marks:
                first.record()
                function()
                last.record()
            synchronise()
            times = [first.elapsed_time(last) for first, last in marks]
        else:
            for _ in range(rounds):
                start = time.perf_counter()
                function()
                times.append((time.perf_counter() - start) * 1e3)
        low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        return {"ms": round(middle, 4), "low": round(low, 4), "high": round(high, 4), "rounds": rounds, **peak}


def measure_missing(
    out: Path, planned: Iterable[dict[str, Any]], measure: Callable[..., dict[str, Any] | None]
) -> dict[str, Any]:
    """Measure what a file does not hold yet, and write each result at once, so that a later call continues.

    Args:
        out: JSON file of the results.
        planned: Keyword arguments of ``measure`` for each result, which holds them as well.
        measure: Measures one result; None if there is none.

    Returns:
        The content of the file: the results, ``runs``, and date, machine and version of the last of them.
    """
    record = json.loads(out.read_text()) if out.exists() else {"runs": []}
    for arguments in planned:
        if any(arguments.items() <= run.items() for run in record["runs"]):
            continue
        if (run := measure(**arguments)) is None:
            continue
        machine = f"{name_machine()}, {torch.get_num_threads()} threads"
        about = {"date": date.today().isoformat(), "machine": machine, "torch": torch.__version__}
        record = {**about, "runs": [*record["runs"], run]}
        write_record(out, record)
        print(run, flush=True)
    return record


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, whole or not at all."""
    text = json.dumps(record, indent=1).encode() + b"\n"
    with replace_file(out, size=len(text)) as file:
        file.write(text)


def name_machine(device: torch.device | None = None) -> str:
    """Return the name of a GPU, or of the processor; by default of the GPU, if there is one."""
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def describe_environment(device: torch.device) -> dict:
    """Return the device, driver, versions and date."""
    environment = {"date": date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__}
    environment |= {"threads": torch.get_num_threads(), "kernels": dict(ops.BACKEND)}
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        properties, driver = torch.cuda.get_device_properties(device), []
        if shutil.which(query[0]):
            driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()[:1]
        environment |= {"device": properties.name, "driver": (driver or ["unknown"])[0], "cuda": torch.version.cuda}
        environment |= {
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
        }
        environment |= {"memory MB": properties.total_memory >> 20, "cudnn": torch.backends.cudnn.version()}
    else:
        environment["device"] = name_machine(device)
    try:
        import triton

        environment["triton"] = triton.__version__
    except ImportError:
        environment["triton"] = None
    return environment


def table(record: dict) -> str:
    """Return a table of the rows by group, with ratios to our fastest implementation in the group."""
    lines = [", ".join(f"{k} {v}" for k, v in record["about"].items())]
    groups: dict[str, list[dict]] = {}
    for row in record["rows"]:
        groups.setdefault(row["group"], []).append(row)
    for group, rows in groups.items():
        lines.append(f"\n{group}")
        ours = min((r["ms"] for r in rows if "ours" in r["name"] and "ms" in r), default=None)
        for row in sorted(rows, key=lambda r: r.get("ms", float("inf"))):
            if "ms" not in row:
                lines.append(f"  {row['name']:<52} {row['failed']}")
                continue
            extra = "".join(
                f"  {row[key]} {key}" for key in ("GB/s", "GB/s of hard points", "images/s", "peak MB") if key in row
            )
            ratio = f"{row['ms'] / ours:8.2f} x" if ours and "images/s" not in row else " " * 10
            lines.append(f"  {row['name']:<52} {row['ms']:10.3f} ms {ratio}{extra}")
    lines.append("")
    for name, value in record.get("stages", {}).items():
        lines.append(f"{name}: {value}")
    return "\n".join(lines)
