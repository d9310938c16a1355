"""Devices of the benchmarks, and the table at the end of `pytest benchmarks --benchmark-only`.

Each row is one implementation of the work of its group, with GB/s if the number of bytes to move is known. Ratios
compare medians of one run; on a shared machine only such ratios are worth quoting.
"""

import json
import platform
import sys
import warnings
from datetime import date
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # bench_train.py shares functions with other scripts
with warnings.catch_warnings():  # without compiled kernels, the header says so
    warnings.filterwarnings("ignore", "recontrast runs")
    from recontrast import ops
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
warnings.simplefilter("ignore")  # torch.compile warns about its caches and modes


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="write medians, quartiles and GB/s by group to this JSON file")


def device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def pytest_report_header():
    name = device_name()
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads, kernels {ops.BACKEND}"


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def timed(benchmark, device):
    """Return a function that runs pytest-benchmark with warm-up and synchronisation, and reports GB/s."""

    def run(function, moved=None, rounds=15):
        synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None

        def once():
            function()
            synchronise()

        torch.manual_seed(0)
        benchmark.pedantic(once, rounds=rounds, warmup_rounds=2, iterations=1)
        if moved:
            benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 1)
        benchmark.extra_info["threads"] = torch.get_num_threads()

    return run


def pytest_terminal_summary(terminalreporter, config):
    """Print median, quartiles, GB/s and the ratio to our fastest implementation for each group."""
    session = getattr(config, "_benchmarksession", None)
    groups = {}
    for row in session.benchmarks if session else []:
        if row.stats.data:
            groups.setdefault(row.group, []).append(row)
    for group, rows in groups.items():
        ours = min((r.stats.median for r in rows if "ours" in r.name), default=min(r.stats.median for r in rows))
        terminalreporter.write_sep("-", group)
        for row in sorted(rows, key=lambda r: r.stats.median):
            stats, rate = row.stats, row.extra_info.get("GB/s", "")
            terminalreporter.write_line(
                f"{row.name[row.name.find('[') + 1 : -1]:>34} {stats.median * 1e3:10.2f} ms"
                f" (quartiles {stats.q1 * 1e3:.2f} to {stats.q3 * 1e3:.2f}) {stats.median / ours:8.2f} x ours"
                f" {rate:>8} {'GB/s' if rate else ''}"
            )
            extra = [f"{name} {value}" for name, value in row.extra_info.items() if name not in ("GB/s", "threads")]
            if extra:
                terminalreporter.write_line(f"{'':>34} {', '.join(extra)}")
    if groups and config.getoption("results"):
        save(config.getoption("results"), groups)


def save(path, groups):
    """Add the groups to a results file and keep the groups of earlier runs."""
    record = json.loads(path.read_text()) if path.exists() else {}
    record |= {"device": device_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    record |= {"python": platform.python_version(), "date": date.today().isoformat()}
    for group, rows in groups.items():
        record.setdefault("groups", {})[group] = {
            row.name[row.name.find("[") + 1 : -1]: {
                "median_ms": round(row.stats.median * 1e3, 4),
                "quartiles_ms": [round(row.stats.q1 * 1e3, 4), round(row.stats.q3 * 1e3, 4)],
                **row.extra_info,
            }
            for row in sorted(rows, key=lambda r: r.stats.median)
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
