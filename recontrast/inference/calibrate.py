"""Calibration of a detector: run it on good images, and set its thresholds."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.calibration.appearance_drift import describe_appearance
from recontrast.calibration.conformal import (
    DEFAULT_PIXEL_RATE,
    DEFAULT_RATE,
    Calibration,
    allowed_false_alarms,
    calibrate_maps,
)
from recontrast.checkpoint import Checkpoint, digest
from recontrast.data.fingerprint import compute_fingerprint, read_fingerprints
from recontrast.data.image_files import ImageFiles
from recontrast.data.sources import Images
from recontrast.data.tiles import Tiles
from recontrast.inference.detector import CheckpointDetector, MapsAndScores
from recontrast.inference.infer import infer
from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe


def calibrate(
    model: ReContrast,
    recipe: Recipe,
    images: Images,
    *,
    rate: float = DEFAULT_RATE,
    pixel_rate: float = DEFAULT_PIXEL_RATE,
    source: str = "",
    batch: int = 16,
) -> Calibration:
    """Score good images that the model was not trained on, and set both thresholds.

    Args:
        model: trained, on any device.
        recipe: that it was trained with.
        images: decoded at ``recipe.out``, (n, H, W, 3) uint8; see `recontrast.inference.infer.infer`.
        rate: promised share of false alarms, at least 1 / (n + 1).
        pixel_rate: promised share of flagged pixels of a good image.
        source: where the images came from, in words.
        batch: images at once.

    Returns:
        The calibration of these weights and this recipe.

    Raises:
        ValueError: too few images for the rate, or a rate that is no share.
    """
    allowed_false_alarms(len(images), rate)
    found = ((maps.float().cpu().numpy(), scores.cpu().numpy()) for maps, scores in infer(
        model, images, recipe, batch=batch))  # fmt: skip
    return calibrate_maps(
        found, len(images), rate=rate, pixel_rate=pixel_rate, source=source,
        weights=digest(model.state_dict(), recipe), seen=describe_appearance(images, batch),
    )  # fmt: skip


def refuse_training_images(option: str, paths: Sequence[Path], stored: Checkpoint) -> None:
    """A detector scores the images of its training lower than any others; of older checkpoints they are unknown."""
    recipe, trained = stored.recipe, read_fingerprints(stored.images)
    if not trained:
        return
    files = ImageFiles(paths)

    def seen(place: int) -> bool:
        if recipe.tile is None:
            pixels = files.read(place, recipe.size, recipe.crop)
            return pixels is not None and compute_fingerprint(pixels) in trained
        pixels = files.read(place)
        if pixels is None:  # said when it is to be scored
            return False
        tiles = Tiles(pixels, recipe.tile, recipe.stride or recipe.tile)
        return compute_fingerprint(tiles[range(len(tiles))]) in trained

    with ThreadPoolExecutor(1 if recipe.tile is not None else None) as pool:  # whole images may be large
        found = [files.paths[place] for place, was in enumerate(pool.map(seen, range(len(files)))) if was]
    if found:
        raise ValueError(
            f"{option}: wanted good images that were not trained on, got {len(found)} of {len(files)} that were "
            f"(first: {found[0]})"
        )


def calibrate_files(
    detector: CheckpointDetector,
    paths: Sequence[Path],
    batch: int,
    on_progress: Callable[[int, int], None],
    **options: Any,
) -> tuple[Calibration, list[str]]:
    """The calibration by all images that can be read, and a sentence for each other file."""
    unread: list[str] = []
    with ThreadPoolExecutor() as pool:
        while True:  # again where files could not be read: how many there are decides what is kept
            files = ImageFiles(paths, pool)

            def run(files: ImageFiles = files) -> Iterator[MapsAndScores]:
                done = 0
                for maps, scores in detector.run(files, batch):
                    yield maps, scores
                    done += len(scores)
                    on_progress(done, len(files))

            found = calibrate_maps(run(), len(files), **options)
            seen = _appearance(detector, files)  # may find that a file cannot be read any more
            if not files.errors:
                return replace(found, appearance=tuple(map(tuple, seen.tolist()))), unread
            unread += [files.errors[place] for place in sorted(files.errors)]
            paths = [path for place, path in enumerate(files.paths) if place not in files.errors]
            if not paths:
                raise ValueError(f"none of {len(unread)} images could be read: {unread[0]}")


def _appearance(detector: CheckpointDetector, files: ImageFiles) -> NDArray[np.float64]:
    """Of each file, read once more, in the size of the recipe."""
    return describe_appearance(files.resized(detector.recipe.size, detector.recipe.crop))


def score_files(
    detector: CheckpointDetector, paths: Sequence[Path], batch: int
) -> tuple[list[float], NDArray[np.float64], list[str]]:
    """Scores and looks of all images that can be read, and a sentence for each other file."""
    with ThreadPoolExecutor() as pool:
        files = ImageFiles(paths, pool)
        scores = [score for _, some in detector.run(files, batch) for score in some.tolist()]
        seen = _appearance(detector, files)
    kept = [place for place in range(len(scores)) if place not in files.errors]
    return [scores[place] for place in kept], seen[kept], [files.errors[place] for place in sorted(files.errors)]
