"""Gallery of a comparison: the images on which the methods differ most, with the heat map of each method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from recontrast.app.compare.record import MethodResult
from recontrast.app.compare.unlabelled import rank_scores
from recontrast.app.report.thumbnails import encode_uri
from recontrast.data import heatmaps
from recontrast.data.image_files import ImageFiles
from recontrast.data.window import to_levels
from recontrast.inference.detector import CheckpointDetector, map_extent

COUNT = 12  # images in the gallery
SIDE = 224  # longest side of a picture in pixels


@dataclass(frozen=True)
class Pane:
    """Heat map of one method over one image: the method, the picture as a data URI, and what the method says."""

    method: str
    picture: str
    rank: float  # of the score among all compared images, from 0 for the lowest to 1 for the highest
    decision: str | None  # None without a calibration


@dataclass(frozen=True)
class Card:
    """One image of the gallery: its path, its label in words, the photograph as a data URI, and a pane per method."""

    path: str
    label: str
    photo: str
    panes: list[Pane]


def list_pool(results: Sequence[MethodResult]) -> list[str]:
    """Return the paths of the images that all methods gave a score."""
    if not results:
        return []
    scores = [result.scores for result in results]
    return [path for path in scores[0] if all(other.get(path) is not None for other in scores)]


def rank_pool(results: Sequence[MethodResult], pool: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the rank of each image in [0, 1] by method and path."""
    ranks = {}
    for result in results:
        values = np.array([result.scores[path] for path in pool], np.float64)
        ranks[result.name] = dict(zip(pool, rank_scores(values).tolist(), strict=True))
    return ranks


def select_differing(ranks: Mapping[str, Mapping[str, float]], count: int = COUNT) -> list[str]:
    """Select the images whose ranks differ most between two methods, the largest difference first.

    Args:
        ranks: Ranks of the images by method and path.
        count: Largest number of images.
    """
    if len(ranks) < 2:
        return []
    paths = next(iter(ranks.values()))
    spread = {path: np.ptp([values[path] for values in ranks.values()]) for path in paths}
    return sorted((path for path in paths if spread[path] > 0), key=lambda path: -spread[path])[:count]


def draw_cards(
    detectors: Mapping[str, Path], device: str, paths: Sequence[str], ranks: Mapping[str, Mapping[str, float]],
    labels: Mapping[str, str],
) -> list[Card]:  # fmt: skip
    """Draw the images of the gallery.

    Args:
        detectors: Checkpoints by method.
        device: Device of the detectors.
        paths: Paths of the images, in order.
        ranks: Ranks of the images by method and path.
        labels: Labels in words by path.

    Returns:
        One card for each image that can be read.
    """
    panes: dict[str, list[Pane]] = {path: [] for path in paths}
    photos: dict[str, str] = {}
    for method, checkpoint in detectors.items() if paths else ():
        detector = CheckpointDetector(checkpoint, device)
        for path, pane, photo in _draw_method(method, detector, paths, ranks[method]):
            panes[path].append(pane)
            photos.setdefault(path, photo)
    return [Card(path, labels.get(path, "without label"), photos[path], panes[path]) for path in photos]


def _draw_method(
    method: str, detector: CheckpointDetector, paths: Sequence[str], ranks: Mapping[str, float]
) -> list[tuple[str, Pane, str]]:
    """Return path, pane and photograph of each image for one method."""
    recipe, calibration, files = detector.recipe, detector.calibration, ImageFiles([Path(path) for path in paths])
    batches = [(maps, scores) for maps, scores in detector.run(files, recipe.batch)]
    maps = [anomaly for part, _ in batches for anomaly in part]
    scores = np.concatenate([part for _, part in batches])
    threshold = calibration.threshold if calibration is not None and recipe.score == "max" else None
    low, high = heatmaps.colour_range([float(np.median(m)) for m in maps], (float(m.max()) for m in maps), threshold)
    drawn = []
    for position, path in enumerate(paths):
        pixels = files.read(position, bits=recipe.bits, window=recipe.window)
        if pixels is None:
            continue
        pixels = to_levels(pixels)
        top, left, height, width = map_extent(pixels.shape[:2], recipe)
        image = Image.fromarray(pixels[top : top + height, left : left + width])
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        photo = np.asarray(image)
        heat = heatmaps.resize_map((maps[position] - low) / max(high - low, 1e-12), photo.shape[:2])
        decision = None
        if calibration is not None:
            decision = "defect" if bool(calibration.is_defect(scores[position : position + 1])[0]) else "good"
        overlay = Image.fromarray(heatmaps.draw_overlay(photo, heat))
        pane = Pane(method, encode_uri(overlay, "WEBP", quality=78, method=4), ranks[path], decision)
        drawn.append((path, pane, encode_uri(image, "WEBP", quality=78, method=4)))
    return drawn


def render_gallery(cards: Sequence[Card], pool: int, noun: str) -> str:
    """Return the HTML of the gallery; empty without images.

    Args:
        cards: Images in order.
        pool: Number of compared images.
        noun: What is counted, see `recontrast.recipes.recipe.Recipe.noun`.
    """
    if not cards:
        return ""
    items = "".join(_render_card(card) for card in cards)
    return (
        '<section aria-labelledby="gallery"><h2 id="gallery">Where the methods differ</h2>'
        f"<p>The {len(cards)} of {pool} {noun}s whose ranks differ most between two methods. "
        f"100 % is the most anomalous of all compared {noun}s, 0 % the least.</p>"
        f'<ol class="differing">{items}</ol></section>\n'
    )


def _render_card(card: Card) -> str:
    name = Path(card.path).name.encode(errors="backslashreplace").decode()
    parts = _render_picture(card.photo, f"{name}: photograph", "<b>image</b>")
    for pane in card.panes:
        decision = "" if pane.decision is None else f", {pane.decision}"
        text = f"<b>{escape(pane.method)}</b> {100 * pane.rank:.0f} %{decision}"
        parts += _render_picture(pane.picture, f"{name}: heat map of {pane.method}", text)
    where = card.path.encode(errors="backslashreplace").decode()
    return (
        f'<li><p><b>{escape(card.label)}</b> <span class="file">{escape(where)}</span></p>'
        f'<div class="methods">{parts}</div></li>'
    )


def _render_picture(uri: str, description: str, caption: str) -> str:
    image = f'<img src="{uri}" alt="{escape(description)}" loading="lazy">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
