"""Pictures of the gallery as data URIs: the largest and best ones that together stay within a budget of bytes."""

import base64
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recontrast.app.report.findings import Findings, Shot
from recontrast.app.report.map_summaries import SIDE, small
from recontrast.data import heatmaps
from recontrast.data.images import read_image
from recontrast.evaluation.ground_truth import read_ground_truth
from recontrast.inference.detector import map_extent
from recontrast.recipes.recipe import Recipe

# Longest side of photographs in pixels, and WebP quality; tried in this order.
LEVELS = ((320, 82), (256, 80), (224, 76), (192, 72), (160, 68), (128, 62), (96, 55), (64, 45), (48, 30), (32, 20))
PROBES = 24  # pictures of which the bytes of a level are guessed


@dataclass(frozen=True)
class Pictures:
    """Data URIs of one image."""

    image: str
    heat: str  # with the opacity of its heat
    mask: str | None  # white on black
    ratio: float  # width / height of the part that the detector saw

    @property
    def bytes(self) -> int:
        """Of all three in the file."""
        return len(self.image) + len(self.heat) + len(self.mask or "")


@dataclass(frozen=True)
class _Source:
    image: Image.Image
    heat: NDArray[Any]  # (h, w) in [0, 1]
    mask: NDArray[np.bool_] | None
    ratio: float


def encode(findings: Findings, shots: Sequence[Shot], recipe: Recipe, budget: int) -> list[Pictures]:
    """Pictures of ``shots``, in their order.

    Args:
        findings: have the maps and their colours.
        shots: of the gallery.
        recipe: for the part of an image that the detector saw.
        budget: bytes in the file, at most.

    Raises:
        ValueError: not even the smallest pictures fit.
    """
    heats = {section.row.category: section.heat for section in findings.sections}
    # Originals of tiled detectors may be large: one at a time.
    with ThreadPoolExecutor(4 if recipe.tile is None else 1) as pool:
        sources = list(pool.map(lambda s: _source(s, findings.heats[s.place], heats[s.sample.category], recipe), shots))
        for side, quality in LEVELS:
            probes = sources[:: max(1, len(sources) // PROBES)]
            if sum(_encode(probe, side, quality).bytes for probe in probes) * len(sources) > budget * len(probes):
                continue
            found = list(pool.map(lambda s, at=(side, quality): _encode(s, *at), sources))
            if sum(one.bytes for one in found) <= budget:
                return found
    raise ValueError(f"report: wanted pictures of {len(shots)} images in {budget:,} bytes, got more: show fewer images")


def _source(shot: Shot, anomaly: NDArray[Any], heat: tuple[float, float], recipe: Recipe) -> _Source:
    full = read_image(shot.sample.path)
    top, left, height, width = map_extent(full.shape[:2], recipe)
    image = Image.fromarray(full[top : top + height, left : left + width])
    image.thumbnail((LEVELS[0][0],) * 2, Image.Resampling.LANCZOS)
    mask = None
    if shot.sample.mask is not None:
        mask = small(read_ground_truth(shot.sample, recipe).view(np.uint8)) > 0
    low, high = heat
    return _Source(image, (anomaly - low) / max(high - low, 1e-12), mask, width / height)


def _encode(source: _Source, side: int, quality: int) -> Pictures:
    image = source.image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    size = tuple(min(n, SIDE, side) for n in source.heat.shape)
    warm = np.clip(heatmaps.resize_map(source.heat, (size[0], size[1])), 0, 1)
    opacity = np.rint(255 * np.sqrt(warm)).astype(np.uint8)
    heat = Image.fromarray(np.dstack([heatmaps.colourise(warm), opacity]))
    mask = None
    if source.mask is not None:
        white = heatmaps.resize_map(source.mask.astype(np.float32), (size[0], size[1])) > 0
        mask = _uri(Image.fromarray(white), "PNG", optimize=True)
    return Pictures(
        _uri(image, "WEBP", quality=quality, method=4),
        _uri(heat, "WEBP", quality=60, alpha_quality=60, method=4),
        mask,
        source.ratio,
    )


def _uri(image: Image.Image, kind: str, **options: Any) -> str:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
