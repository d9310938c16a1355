"""Plot of the results of `budget.py`: accuracy against the time that each method used.

    python benchmarks/plot_budget.py benchmarks/results/budget-cpu.json

writes an SVG file beside the JSON file, with a panel for each metric. A point is the mean over categories and seeds in
one time budget, and a vertical line the range of the seeds.
"""

import json
import math
import statistics
import sys
from html import escape
from pathlib import Path
from typing import Any

METRICS = {"i_auroc": "I-AUROC", "p_auroc": "P-AUROC", "aupro": "AUPRO"}
COLOURS = {
    "budget": "#1b7f5c", "patchcore": "#b5493c", "padim": "#3b6fb6", "rd4ad": "#8a5fb0", "recontrast": "#8a6d1d",
}  # fmt: skip
NAMES = {"budget": "--budget", "patchcore": "PatchCore", "padim": "PaDiM", "rd4ad": "RD4AD", "recontrast": "ReContrast"}
PANEL, GAP, TOP, HEIGHT, BOTTOM = 250, 60, 62, 230, 48  # pixels
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)  # seconds


def average(runs: list[dict[str, Any]], metric: str) -> tuple[float, float, float] | None:
    """Return the mean over the runs, and the lowest and highest mean of a seed; None without a value."""
    by_seed: dict[int, list[float]] = {}
    for run in runs:
        if run[metric] is not None:
            by_seed.setdefault(run["seed"], []).append(run[metric])
    means = [statistics.mean(values) for values in by_seed.values()]
    return (statistics.mean(means), min(means), max(means)) if means else None


def collect(runs: list[dict[str, Any]], metric: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """Return for each method its points: seconds used, mean, lowest and highest seed; ordered by budget."""
    points: dict[str, list[tuple[float, float, float, float]]] = {}
    for method in COLOURS:
        for budget in sorted({run["budget"] for run in runs}):
            chosen = [run for run in runs if run["method"] == method and run["budget"] == budget]
            if chosen and (values := average(chosen, metric)) is not None:
                seconds = statistics.mean(run["cpu_seconds"] for run in chosen)
                points.setdefault(method, []).append((seconds, *values))
    return points


def draw_panel(
    left: float, title: str, points: dict[str, list[tuple[float, float, float, float]]], span: tuple[float, float]
) -> list[str]:
    """Return the elements of a panel; ``span`` is the range of seconds, which is logarithmic."""
    values = [value for row in points.values() for _, *numbers in row for value in numbers]
    low, high = math.floor(min(values) / 2) * 2, math.ceil((max(values) + 0.1) / 2) * 2

    def x(seconds: float) -> float:
        return left + PANEL * math.log(seconds / span[0]) / math.log(span[1] / span[0])

    def y(value: float) -> float:
        return TOP + HEIGHT * (high - value) / (high - low)

    step = max(2, round((high - low) / 5 / 2) * 2)
    body = [f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{escape(title)}, %</text>']
    for value in range(low, high + 1, step):
        body.append(f'<path d="M{left} {y(value):.1f}h{PANEL}" stroke="#e1e4e8"/>')
        body.append(f'<text x="{left - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value}</text>')
    for seconds in TICKS:
        if span[0] <= seconds <= span[1]:
            body.append(f'<text x="{x(seconds):.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{seconds}</text>')
    body.append(f'<text x="{left + PANEL / 2}" y="{TOP + HEIGHT + 38}" text-anchor="middle">CPU seconds</text>')
    for method, row in points.items():
        colour = COLOURS[method]
        line = "L".join(f"{x(seconds):.1f} {y(mean):.1f}" for seconds, mean, _, _ in row)
        body.append(f'<path d="M{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for seconds, mean, least, most in row:
            body.append(f'<path d="M{x(seconds):.1f} {y(most):.1f}V{y(least):.1f}" stroke="{colour}"/>')
            body.append(f'<circle cx="{x(seconds):.1f}" cy="{y(mean):.1f}" r="4" fill="{colour}"/>')
    return body


def plot(record: dict[str, Any]) -> str:
    """Return the plot as SVG."""
    runs = record["runs"]
    panels = {title: collect(runs, metric) for metric, title in METRICS.items()}
    seconds = [point[0] for points in panels.values() for row in points.values() for point in row]
    span = (min(seconds) / 1.3, max(seconds) * 1.3)
    body = []
    for number, (title, points) in enumerate(panels.items()):
        if points:
            body += draw_panel(GAP + number * (PANEL + GAP), title, points, span)
    shown = [method for method in COLOURS if any(method in points for points in panels.values())]
    for number, method in enumerate(shown):
        left = GAP + number * 120
        body.append(f'<circle cx="{left}" cy="18" r="5" fill="{COLOURS[method]}"/>')
        body.append(f'<text x="{left + 10}" y="22">{escape(NAMES[method])}</text>')
    width, height = len(METRICS) * (PANEL + GAP) + GAP, TOP + HEIGHT + BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def main() -> None:
    """Write the plot of each given file."""
    if len(sys.argv) < 2:
        sys.exit("plot_budget.py: wanted at least one JSON file of budget.py, got none")
    for path in map(Path, sys.argv[1:]):
        path.with_suffix(".svg").write_text(plot(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
