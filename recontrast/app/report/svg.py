"""Drawings in SVG: histogram of scores, ROC and overlap curve, loss. They take their colours from the page's CSS."""

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import ArrayLike

from recontrast.metrics.curves import Curve

WIDTH, HEIGHT = 360, 240  # units of the drawing; about CSS pixels on a telephone, so that its text can be read there
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 14, 40  # margins
BINS = 32
_number = "{:.4g}".format


class _Frame:
    """A scale for each axis."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x0, self.x1, self.y0, self.y1 = *x, *y

    def x(self, value: float) -> float:
        share = (value - self.x0) / ((self.x1 - self.x0) or 1)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y0) / ((self.y1 - self.y0) or 1)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)


def histogram(good: ArrayLike, defects: ArrayLike, threshold: float | None, name: str) -> str:
    """Good images stand above the line, defects hang below it; the threshold is a broken line.

    Args:
        good: scores (n,).
        defects: scores (m,); one of both may be empty.
        threshold: None draws none.
        name: of the category.
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
    parts.append(_turned(frame.y(most / 2), f"{up.size} good"))
    parts.append(_turned(frame.y(-most / 2), f"{down.size} defective"))
    if threshold is not None:
        parts.append(_line(frame.x(threshold), TOP - 6, frame.x(threshold), HEIGHT - BOTTOM, "threshold"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "score", "middle", "name"))
    said = f"{name}: scores of {up.size} good images and of {down.size} with a defect" + (
        "" if threshold is None else f", threshold {_number(threshold)}"
    )
    return _svg(parts, said)


def curve(found: Curve, across: str, upwards: str, said: str, point: tuple[float, float] | None = None) -> str:
    """A rising curve from (0, 0); ``point`` is where the threshold lies on it."""
    x, y = found
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
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, across, "middle", "name"))
    parts.append(_turned((TOP + HEIGHT - BOTTOM) / 2, upwards))
    return _svg(parts, said)


def losses(steps: Sequence[int], values: Sequence[float]) -> str:
    """Training loss over steps, both axes linear."""
    frame = _Frame((0.0, float(steps[-1])), (0.0, max(values)))
    parts = []
    for tick in _round_numbers(0.0, max(values), 4):
        parts.append(_line(LEFT, frame.y(tick), WIDTH - RIGHT, frame.y(tick), "grid"))
        parts.append(_text(LEFT - 6, frame.y(tick) + 4, _number(tick), "end"))
    parts += _ticks_x(frame, 0.0, float(steps[-1]))
    corners = " ".join(f"{frame.x(a)},{frame.y(b)}" for a, b in zip(steps, values, strict=True))
    parts.append(f'<polyline class="curve" points="{corners}"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, "optimiser step", "middle", "name"))
    return _svg(parts, f"training loss: {_number(values[0])} at step {steps[0]}, {_number(values[-1])} at {steps[-1]}")


def _ticks_x(frame: _Frame, low: float, high: float) -> list[str]:
    return [
        _text(frame.x(tick), HEIGHT - BOTTOM + 15, _number(tick), "middle") for tick in _round_numbers(low, high, 4)
    ]


def _round_numbers(low: float, high: float, count: int) -> list[float]:
    """About ``count`` multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high``."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _turned(y: float, text: str) -> str:
    """Beside the vertical axis."""
    turn = f'transform="translate(12 {y:.1f}) rotate(-90)"'
    return f'<text class="name" text-anchor="middle" {turn}>{escape(text)}</text>'


def _svg(parts: Sequence[str], said: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said)}">'
        f"{''.join(parts)}</svg>"
    )  # fmt: skip
