"""Pictures of the gallery as data URIs, at the highest size and quality that fit a byte budget."""

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
from recontrast.app.report.map_summaries import SIDE, shrink_map
from recontrast.data import heatmaps
from recontrast.data.image_files import IMAGE_ERRORS, describe_image_error
from recontrast.data.images import read_image, reserve_memory
from recontrast.data.roi import resize_mask
from recontrast.data.views import list_views
from recontrast.data.window import to_levels
from recontrast.evaluation.ground_truth import read_ground_truth
from recontrast.inference.detector import map_extent
from recontrast.inference.drawing import ROI_OUTLINE, draw_outlines
from recontrast.inference.rois import read_sample
from recontrast.recipes.recipe import Recipe

# Longest side of photographs in pixels, and WebP quality; tried in this order.
LEVELS = ((320, 82), (256, 80), (224, 76), (192, 72), (160, 68), (128, 62), (96, 55), (64, 45), (48, 30), (32, 20))
MOST_PIXELS = (LEVELS[0][0], LEVELS[3][0])  # longest side of the first view of a part and of the others, to save memory
PROBES = 24  # number of pictures used to estimate the size of a level


@dataclass(frozen=True)
class Pictures:
    """Pictures of one image as data URIs."""

    image: str | None  # None if the image could not be read again after it was scored
    heat: str  # opacity follows the map value
    mask: str | None  # white on black
    ratio: float  # width / height of the part that the detector sees
    error: str | None = None  # why the image, or its mask, could not be read again
    is_outlined: bool = False  # whether a region of interest is drawn
    names: tuple[str, ...] = ()  # of the views of a part that are shown, that of ``image`` first
    others: tuple[str, ...] = ()  # the other views that are shown

    @property
    def bytes(self) -> int:
        """Total number of bytes in the file."""
        return len(self.image or "") + len(self.heat) + len(self.mask or "") + sum(map(len, self.others))


@dataclass(frozen=True)
class _Source:
    images: list[Image.Image]  # of the views of a part that are shown; empty if one cannot be read
    heat: NDArray[Any]  # (h, w) in [0, 1]
    mask: NDArray[np.bool_] | None
    ratio: float
    error: str | None = None
    is_outlined: bool = False
    names: tuple[str, ...] = ()


def encode_pictures(
    findings: Findings, shots: Sequence[Shot], recipe: Recipe, budget: int, shown: Sequence[Sequence[int]] = ()
) -> list[Pictures]:
    """Return the pictures of ``shots`` in order.

    Args:
        findings: Content of the report, with the maps and their colour ranges.
        shots: Images of the gallery.
        recipe: Recipe of the detector; determines the part of the image that it sees.
        budget: Maximum number of bytes.
        shown: Positions of the views to show of each part, see `recontrast.app.report.shown_views.select_views`. Empty:
            the first one.

    Raises:
        ValueError: If even the smallest pictures do not fit.
    """
    heats = {section.row.category: section.heat for section in findings.sections}

    def read(shot: Shot, views: Sequence[int]) -> _Source:
        return _read_source(shot, findings.heats[shot.index], heats[shot.sample.category], recipe, views)

    # Images of tiled detectors can be large, so they are read one at a time.
    with ThreadPoolExecutor(4 if recipe.tile is None else 1) as pool:
        sources = list(pool.map(read, shots, shown or [(0,)] * len(shots)))
        for side, quality in LEVELS:
            probes = sources[:: max(1, len(sources) // PROBES)]
            if sum(_encode_one(probe, side, quality).bytes for probe in probes) * len(sources) > budget * len(probes):
                continue
            pictures = list(pool.map(lambda s, at=(side, quality): _encode_one(s, *at), sources))
            if sum(picture.bytes for picture in pictures) <= budget:
                return pictures
    raise ValueError(f"report: wanted pictures of {len(shots)} images in {budget:,} bytes, got more: show fewer images")


def _read_source(
    shot: Shot, anomaly: NDArray[Any], heat: tuple[float, float], recipe: Recipe, shown: Sequence[int]
) -> _Source:
    """Read an image and its mask again; what was deleted or damaged after it was scored is missing, with an error."""
    images, mask, errors, is_outlined = [], None, [], False
    ratio, views = anomaly.shape[1] / anomaly.shape[0], recipe.image_views
    try:
        sources = list_views(shot.sample.path, views)
        for number, position in enumerate(shown):
            image, ratio, is_outlined = _read_photo(sources[position], shot, recipe, MOST_PIXELS[min(number, 1)])
            images.append(image)
    except IMAGE_ERRORS as error:
        images = []
        errors.append(describe_image_error(str(shot.sample.path), error, views))
    if shot.sample.mask is not None and images:  # the size of a mask is compared with that of its image
        try:
            mask = shrink_map(read_ground_truth(shot.sample, recipe).view(np.uint8)) > 0
        except IMAGE_ERRORS as error:
            errors.append(describe_image_error(str(shot.sample.path), error))
    low, high = heat
    heat_map = (anomaly - low) / max(high - low, 1e-12)
    names = () if views is None else tuple(views.names[position] for position in shown)
    return _Source(images, heat_map, mask, ratio, "; ".join(errors) or None, is_outlined, names)


def _read_photo(source: Any, shot: Shot, recipe: Recipe, side: int) -> tuple[Image.Image, float, bool]:
    """Return a small picture of what the detector sees, its width / height, and whether it has a region of interest.

    The region has a blue outline.
    """
    with reserve_memory(shot.sample.path):
        full = to_levels(read_image(source, bits=recipe.bits, window=recipe.window))
        top, left, height, width = map_extent(full.shape[:2], recipe)
        image = Image.fromarray(full[top : top + height, left : left + width])
        inside = read_sample(recipe, shot.sample, full.shape[:2])
        del full
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    if inside is not None:
        part = resize_mask(inside[top : top + height, left : left + width], (image.height, image.width))
        image = Image.fromarray(draw_outlines(np.asarray(image), part, ROI_OUTLINE))
    return image, width / height, inside is not None


def _encode_one(source: _Source, side: int, quality: int) -> Pictures:
    photos: list[str] = []
    for image in map(Image.Image.copy, source.images):
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        photos.append(encode_uri(image, "WEBP", quality=quality, method=4))
    size = tuple(min(n, SIDE, side) for n in source.heat.shape)
    values = np.clip(heatmaps.resize_map(source.heat, (size[0], size[1])), 0, 1)
    opacity = np.rint(255 * np.sqrt(values)).astype(np.uint8)
    heat = Image.fromarray(np.dstack([heatmaps.colourise(values), opacity]))
    mask = None
    if source.mask is not None:
        white = heatmaps.resize_map(source.mask.astype(np.float32), (size[0], size[1])) > 0
        mask = encode_uri(Image.fromarray(white), "PNG", optimize=True)
    return Pictures(
        photos[0] if photos else None,
        encode_uri(heat, "WEBP", quality=60, alpha_quality=60, method=4),
        mask,
        source.ratio,
        source.error,
        source.is_outlined,
        source.names,
        tuple(photos[1:]),
    )


def encode_uri(image: Image.Image, kind: str, **options: Any) -> str:
    """Return an image, encoded as ``kind`` with Pillow's ``options``, as a data URI."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"
