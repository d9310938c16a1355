"""SVG figures of the report: score histogram, ROC and overlap curves, loss. Colours come from the CSS of the page."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import ArrayLike

from recontrast.metrics.curves import Curve

WIDTH, HEIGHT = 360, 240  # about CSS pixels on a phone, so that text stays readable there
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 14, 40  # margins
BINS = 32
_number = "{:.4g}".format


class _Frame:
    """Conversion from data values to positions in the figure."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x0, self.x1, self.y0, self.y1 = *x, *y

    def x(self, value: float) -> float:
        share = (value - self.x0) / ((self.x1 - self.x0) or 1)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y0) / ((self.y1 - self.y0) or 1)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def draw_histogram(good: ArrayLike, defects: ArrayLike, threshold: float | None, name: str) -> str:
    """Draw a histogram of scores: good images above the axis, defective images below, the threshold as a dashed line.

    Args:
        good: Scores (n,) of the good images.
        defects: Scores (m,) of the defective images; one of both can be empty.
        threshold: Threshold; None draws no line.
        name: Name of the category.
    """
    up, down = np.asarray(good, float), np.asarray(defects, float)
    values = np.concatenate([up, down, [] if threshold is None else [threshold]])
    low, high = float(values.min()), float(values.max())
    pad = (high - low) * 0.02 or 0.5
    edges = np.linspace(low - pad, high + pad, BINS + 1)
    above, below = np.histogram(up, edges)[0], np.histogram(down, edges)[0]
    most = int(max(above.max(), below.max(), 1))
    frame = _Frame((edges[0], edges[-1]), (-most, most))
    parts = []
    for kind, counts, sign in (("good", above, 1), ("defect", below, -1)):
        for count, start, end in zip(counts.tolist(), edges, edges[1:], strict=False):
            if count:
                a, b = sorted((frame.y(0), frame.y(sign * count)))
                x, width = frame.x(start) + 0.5, frame.x(end) - frame.x(start) - 1
                parts.append(f'<rect class="{kind}" x="{x:.1f}" y="{a}" width="{width:.1f}" height="{b - a:.1f}"/>')
    parts.append(_line(frame.x(edges[0]), frame.y(0), frame.x(edges[-1]), frame.y(0), "axis"))
    ticks = sorted({most, max(1, round(most / 2))})
    for tick in ticks:
        parts += [_text(LEFT - 6, frame.y(sign * tick) + 4, str(tick), "end") for sign in (1, -1)]
    parts.append(_text(LEFT - 6, frame.y(0) + 4, "0", "end"))
    parts += _ticks_x(frame, low, high)
    parts.append(_rotated_text(frame.y(most / 2), f"{up.size} good"))
    parts.append(_rotated_text(frame.y(-most / 2), f"{down.size} defective"))
    if threshold is not None:
        parts.append(_line(frame.x(threshold), TOP - 6, frame.x(threshold), HEIGHT - BOTTOM, "threshold"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "score", "middle", "name"))
    label = f"{name}: scores of {up.size} good and {down.size} defective images" + (
        "" if threshold is None else f", threshold {_number(threshold)}"
    )
    return _svg(parts, label)


def draw_curve(points: Curve, x_label: str, y_label: str, label: str, point: tuple[float, float] | None = None) -> str:
    """Draw a curve that rises from (0, 0), with a circle at ``point`` if given."""
    x, y = points
    frame = _Frame((0.0, float(x[-1])), (0.0, 1.0))
    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_line(LEFT, frame.y(tick), WIDTH - RIGHT, frame.y(tick), "grid"))
        parts.append(_text(LEFT - 6, frame.y(tick) + 4, f"{tick * 100:.0f}", "end"))
    for share in (0, 1 / 3, 2 / 3, 1) if x[-1] < 1 else (0, 0.25, 0.5, 0.75, 1):
        value = share * float(x[-1])
        parts.append(_text(frame.x(value), HEIGHT - BOTTOM + 15, f"{100 * value:.0f}", "middle"))
    corners = " ".join(f"{frame.x(a)},{frame.y(b)}" for a, b in zip(x.tolist(), y.tolist(), strict=True))
    parts.append(f'<polyline class="curve" points="{corners}"/>')
    if point is not None:
        parts.append(f'<circle class="point" cx="{frame.x(point[0])}" cy="{frame.y(point[1])}" r="4"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle", "name"))
    parts.append(_rotated_text((TOP + HEIGHT - BOTTOM) / 2, y_label))
    return _svg(parts, label)


def draw_losses(steps: Sequence[int], values: Sequence[float]) -> str:
    """Draw the training loss over steps with linear axes."""
    frame = _Frame((0.0, float(steps[-1])), (0.0, max(values)))
    parts = []
    for tick in _round_numbers(0.0, max(values), 4):
        parts.append(_line(LEFT, frame.y(tick), WIDTH - RIGHT, frame.y(tick), "grid"))
        parts.append(_text(LEFT - 6, frame.y(tick) + 4, _number(tick), "end"))
    parts += _ticks_x(frame, 0.0, float(steps[-1]))
    corners = " ".join(f"{frame.x(a)},{frame.y(b)}" for a, b in zip(steps, values, strict=True))
    parts.append(f'<polyline class="curve" points="{corners}"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "training step", "middle", "name"))
    return _svg(parts, f"training loss: {_number(values[0])} at step {steps[0]}, {_number(values[-1])} at {steps[-1]}")


def _ticks_x(frame: _Frame, low: float, high: float) -> list[str]:
    return [
        _text(frame.x(tick), HEIGHT - BOTTOM + 15, _number(tick), "middle") for tick in _round_numbers(low, high, 4)
    ]


def _round_numbers(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers, multiples of 1, 2 or 5 times a power of ten, from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    numbers: list[float] = []
    for step in (m * power for m in (10, 5, 2, 1, 0.5)):  # the largest step that gives enough numbers
        numbers = [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
        if len(numbers) >= count - 1:
            break
    return numbers


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _rotated_text(y: float, text: str) -> str:
    """Return a rotated label for the vertical axis."""
    transform = f'transform="translate(12 {y:.1f}) rotate(-90)"'
    return f'<text class="name" text-anchor="middle" {transform}>{escape(text)}</text>'


def _svg(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )  # fmt: skip
