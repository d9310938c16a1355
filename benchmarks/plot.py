"""Table and plot of the results of `gpu.sh`, for README.md.

    python benchmarks/plot.py benchmarks/results/nvidia-h200.json

prints the table as Markdown and writes the plot as an SVG file beside the JSON file.
"""

import json
import math
import sys
from html import escape
from pathlib import Path

WIDTH, ROW, LABEL = 760, 22, 300  # pixels
COLOURS = {"ours": "#1b7f5c", "reference": "#b5493c"}
OTHERS = "#8a8f98"


def group_rows(record: dict) -> dict[str, list[dict]]:
    """Return the measured rows by group, the fastest first."""
    groups: dict[str, list[dict]] = {}
    for row in record["rows"]:
        if "ms" in row:
            groups.setdefault(row["group"], []).append(row)
    return {group: sorted(rows, key=cost) for group, rows in groups.items()}


def cost(row: dict) -> float:
    """Return milliseconds per image if the row has a rate, since batch sizes differ, and otherwise per call."""
    return 1000 / row["images/s"] if "images/s" in row else row["ms"]


def our_best_cost(rows: list[dict]) -> float | None:
    """Return the lowest cost among our rows, or None without one."""
    return min((cost(row) for row in rows if row["name"].startswith("ours")), default=None)


def table(record: dict) -> str:
    """Return a Markdown table with one line per row and ratios to our fastest row of the group."""
    about = record["about"]
    keys = ("device", "driver", "torch", "cuda", "triton", "date")
    lines = [", ".join(f"{key} {about[key]}" for key in keys if about.get(key)), ""]
    lines += [
        "| work | implementation | median | x ours | GB/s | images/s | peak MB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for group, rows in group_rows(record).items():
        ours = our_best_cost(rows)
        for index, row in enumerate(rows):
            ratio = f"{cost(row) / ours:.2f}" if ours else ""
            cells = ["" if index else group, row["name"], f"{row['ms']:.3g} ms", ratio]
            cells += [f"{row[key]:g}" if key in row else "" for key in ("GB/s", "images/s", "peak MB")]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(record: dict) -> str:
    """Return an SVG with one bar per row; its length is the logarithm of the ratio to our fastest row."""
    body, y = [], 30
    groups = group_rows(record)
    ratios = [cost(r) / ours for rows in groups.values() if (ours := our_best_cost(rows)) for r in rows]
    low, high = min([*ratios, 0.5]), max([*ratios, 2.0])

    def bar_length(ratio: float) -> float:
        return max((WIDTH - LABEL - 70) * math.log(ratio / low) / math.log(high / low), 2)

    for group, rows in groups.items():
        ours = our_best_cost(rows)
        if ours is None:
            continue
        y += 18
        body.append(f'<text x="8" y="{y}" font-weight="bold">{escape(group)}</text>')
        y += 8
        for row in rows:
            ratio = cost(row) / ours
            colour = next((c for name, c in COLOURS.items() if row["name"].startswith(name)), OTHERS)
            length = bar_length(ratio)
            body += [
                f'<text x="{LABEL - 8}" y="{y + 15}" text-anchor="end">{escape(row["name"])}</text>',
                f'<rect x="{LABEL}" y="{y + 3}" width="{length:.1f}" height="{ROW - 6}" fill="{colour}"/>',
                f'<text x="{LABEL + length + 6:.1f}" y="{y + 15}">{ratio:.2f} x, {row["ms"]:.3g} ms</text>',
            ]
            y += ROW
    title = escape(f"{record['about']['device']}: time relative to our fastest, logarithmic")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + 80}" height="{y + 12}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n<text x="8" y="18">{title}</text>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


def main() -> None:
    """Print the table of each given file and write its plot."""
    if len(sys.argv) < 2:
        sys.exit("plot.py: wanted at least one JSON of benchmarks/results, got none")
    for path in map(Path, sys.argv[1:]):
        record = json.loads(path.read_text())
        print(table(record) + "\n")
        path.with_suffix(".svg").write_text(plot(record))


if __name__ == "__main__":
    main()
