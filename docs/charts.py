"""Charts of the guide as SVG cards, which bring their own background: light, or dark where the reader's system is."""

import math
from html import escape
from pathlib import Path

import numpy as np

WIDTH = 520  # units; the card scales to the width of the page, and its text can still be read on a telephone
STYLE = """
.card { fill: #ffffff; stroke: #d0d7de; }
text { fill: #1f2328; font-family: system-ui, sans-serif; font-size: 16px; }
.label { paint-order: stroke; stroke: #ffffff; stroke-width: 5px; }
.axis { stroke: #57606a; }
.calibration { fill: #57606a; }
.good { fill: #1b7f5c; }
.defect { fill: #c2410c; }
.bar { fill: #8a929c; }
.box { fill: #eef2f6; stroke: #8c959f; }
.accent { fill: #d3efe4; stroke: #1b7f5c; }
.arrow { stroke: #57606a; stroke-width: 1.6; fill: none; marker-end: url(#head); }
.head { fill: #57606a; }
.dashed { stroke-dasharray: 5 4; }
.highlight { fill: #1b7f5c; }
.threshold { stroke: #b3261e; stroke-width: 2; stroke-dasharray: 6 4; }
@media (prefers-color-scheme: dark) {
.card { fill: #15191f; stroke: #3d444d; }
text { fill: #e6edf3; }
.label { stroke: #15191f; }
.axis { stroke: #9198a1; }
.calibration { fill: #9198a1; }
.good, .highlight { fill: #3fb68b; }
.defect { fill: #f0883e; }
.bar { fill: #6e7681; }
.box { fill: #222a33; stroke: #6e7681; }
.accent { fill: #16392d; stroke: #3fb68b; }
.arrow { stroke: #9198a1; }
.head { fill: #9198a1; }
.threshold { stroke: #ff7b72; }
}
"""


def save_svg(path: Path, drawing: tuple[int, list[str]]) -> None:
    """Write a card.

    Args:
        path: the file.
        drawing: height in units, and the elements.
    """
    height, elements = drawing
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        *elements,
        "</svg>",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def text(x: float, y: float, content: str, anchor: str = "start", weight: str = "normal") -> str:
    """A line of text; ``anchor`` is SVG's."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}"'
    return f"<text {place}>{escape(content)}</text>"


def number(value: float) -> str:
    """Three digits, never in scientific notation."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def histograms(
    rows: dict[str, tuple[str, list[float]]], threshold: float, label: str, bins: int = 40
) -> tuple[int, list[str]]:
    """Histograms of scores below one another on one axis, with the threshold through all of them.

    Args:
        rows: title -> CSS class and scores.
        threshold: of the score.
        label: of the axis.
        bins: columns of each histogram.

    Returns:
        Height and elements for `save_svg`.
    """
    values = np.concatenate([scores for _, scores in rows.values()])
    low, high = float(values.min()), float(values.max())
    left, right, top, row_height = 20, WIDTH - 20, 44, 110
    bottom = top + row_height * len(rows)

    def x_of(value: float) -> float:
        return left + (value - low) / (high - low) * (right - left)

    at = x_of(threshold)
    elements = [
        f'<line class="threshold" x1="{at:.1f}" y1="{top - 12}" x2="{at:.1f}" y2="{bottom}"/>',
        text(at, top - 18, f"threshold {threshold:.2f}", "middle", "bold"),
    ]
    for row, (title, (kind, scores)) in enumerate(rows.items()):
        base = top + (row + 1) * row_height
        counts, edges = np.histogram(scores, bins, (low, high))
        for count, start, end in zip(counts, edges, edges[1:], strict=False):
            height = count / counts.max() * (row_height - 40)
            x, width = x_of(start) + 0.5, x_of(end) - x_of(start) - 1
            elements.append(
                f'<rect class="{kind}" x="{x:.1f}" y="{base - height:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
            )
        share = np.mean(np.asarray(scores) > threshold)
        elements += [
            f'<line class="axis" x1="{left}" y1="{base}" x2="{right}" y2="{base}"/>',
            text(right, base - row_height + 30, f"{title}: {100 * share:.1f} % above", "end").replace(
                "<text", '<text class="label"'
            ),
        ]
    ticks = np.arange(math.ceil(2 * low) / 2, high, 0.5)
    elements += [text(x_of(tick), bottom + 20, f"{tick:.1f}", "middle") for tick in ticks]
    elements.append(text((left + right) / 2, bottom + 42, label, "middle"))
    return bottom + 54, elements


def bar_chart(groups: dict[str, dict[str, float]], title: str, highlight: str) -> tuple[int, list[str]]:
    """Horizontal bars on a logarithmic scale.

    Args:
        groups: group -> label -> milliseconds.
        title: of the chart.
        highlight: label of the bars that stand out; ratios are to its bar of the group.

    Returns:
        Height and elements for `save_svg`.
    """
    left, right, row_height = 212, WIDTH - 150, 26
    values = [value for rows in groups.values() for value in rows.values()]
    low, high = math.log(min(values) / 2), math.log(max(values))
    elements, y = [text(16, 28, title, weight="bold")], 40
    for group, rows in groups.items():
        y += 26
        elements.append(text(16, y, group, weight="bold"))
        y += 8
        for label, value in rows.items():
            length = (math.log(value) - low) / (high - low) * (right - left)
            kind = "highlight" if label == highlight else "bar"
            elements += [
                text(left - 8, y + 18, label, "end"),
                f'<rect class="{kind}" x="{left}" y="{y + 3}" width="{length:.1f}" height="{row_height - 6}" rx="2"/>',
                text(left + length + 6, y + 18, f"{number(value)} ms, {number(value / rows[highlight])} x"),
            ]
            y += row_height
    return y + 16, elements
