"""Files in; scores, decisions, anomaly maps and heat-map overlays out.

Whatever scores the images is a `recontrast.inference.detector.Detector`; how to add one is said there. What is decided
is in `recontrast.inference.decisions`, what is written in `recontrast.app.prediction.output_files`.
"""

import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import recontrast
from recontrast.app.prediction.output_files import (
    SUFFIX,
    Prediction,
    Waiting,
    below,
    describe,
    save_map,
    save_overlays,
    save_scores,
)
from recontrast.calibration.conformal import Calibration
from recontrast.data import heatmaps, images, large_maps
from recontrast.data.image_files import ImageFiles, assign_result_names
from recontrast.inference.decisions import Decision, select_calibration
from recontrast.inference.decisions import decide as decide_on
from recontrast.inference.detector import Detector, open_detector
from recontrast.inference.options import InferenceOptions
from recontrast.recipes.recipe import Recipe

Maps = Literal["tiff16", "tiff32", "npy", "none"]


@dataclass(frozen=True)
class PredictionSummary:
    """All predictions, and for each file that could not be read one sentence that names it."""

    predictions: list[Prediction]
    unread: list[str]
    rate: float | None = None  # promised share of false alarms that was decided by; None: nothing was decided
    calibration_note: str | None = None  # why nothing was decided though the checkpoint holds a calibration


def predict(
    checkpoint: Path | Detector,
    inputs: Sequence[Path],
    out: Path,
    *,
    maps: Maps = "none",
    overlays: bool = True,
    threshold: float | None = None,
    rate: float | None = None,
    decide: bool = False,
    tile: int | None = None,
    overlap: int | None = None,
    inference: InferenceOptions | None = None,
    workers: int | None = None,
    device: str | None = None,
    batch: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> PredictionSummary:
    """Score images, decide where there is a calibration, and write all of it below ``out``.

    That is ``scores.csv``, ``scores.json``, ``regions.csv`` (with decisions), ``maps/`` and ``overlays/``;
    what a finished former run wrote there and this one does not is removed.

    A file that cannot be read is left out and reported; every file that is written is whole.

    Args:
        checkpoint: what training wrote, or any other `recontrast.inference.detector.Detector`.
        inputs: image files, or folders that are searched for images to the bottom.
        out: folder for the results.
        maps: ``"tiff16"`` (uint16 over the range that scores.json states), ``"tiff32"`` or ``"npy"`` (float32), or
            ``"none"``; in the size of the model's input.
        overlays: write heat maps over the images as PNG, in the size of the original, reduced by a
            whole factor beyond `large.OVERLAY_PIXELS`. All share one range of
            colours, which scores.json states: from the median to the largest map value of this run, or, where a
            threshold on the maximum is given, with the threshold in the middle.
        threshold: flag images whose score is at least this.
        rate: promised share of false alarms in place of the calibration's.
        decide: refuse a detector without a calibration; with one, decisions are always made.
        tile: of a detector that was trained on tiles, pixels; None: as it was trained. 0: whole images, resized.
        overlap: pixels that neighbouring tiles share; None: a quarter of the tile.
        inference: how the model is run, None: as trained, and folded; where that changes scores there are no decisions.
        workers: threads that decode; None takes a few for each CPU.
        device: torch device; None: the GPU where there is one.
        batch: images at once.
        on_progress: called with the number of images done and of all.

    Returns:
        What was written, and what could not be read.

    Raises:
        ValueError: a wrong option, nothing to read, nothing that could be read, no calibration for a decision that was
            asked for, or one of too few images for the rate.
        OSError: an input does not exist, or a result cannot be written.
    """
    if maps not in (*SUFFIX, "none"):
        raise ValueError(f"predict: maps: wanted tiff16, tiff32, npy or none, got {maps!r}")
    if batch < 1:
        raise ValueError(f"predict: batch: wanted at least 1 image, got {batch}")
    listed = images.list_images(inputs)
    detector = checkpoint
    if isinstance(detector, Path):
        detector = open_detector(detector, device, tile, overlap, inference)
    recipe, top = detector.recipe, detector.max_map_value
    calibration = select_calibration(detector, rate, decide, checkpoint)
    pool = ThreadPoolExecutor(workers)
    files = ImageFiles(listed, pool)
    names = assign_result_names(files.paths)
    found: list[Prediction] = []
    kept: list[int] = []  # places of the files that could be read
    out.mkdir(parents=True, exist_ok=True)
    with pool, tempfile.TemporaryFile(dir=out) as file:
        stored = Waiting(file, out)  # maps wait on the disk, not in memory, until their range is known
        place = 0
        for some, scores in detector.run(files, batch):
            for anomaly, score in zip(some, scores.tolist(), strict=True):
                if place not in files.errors:
                    kept.append(place)
                    if maps != "none":
                        save_map(below(out, "maps", names[place], SUFFIX[maps]), anomaly, maps, top, recipe)
                    if overlays:
                        stored.append(
                            large_maps.reduce_blocks(anomaly, large_maps.find_reduction(anomaly.shape), "max")
                        )
                    found.append(Prediction(
                        str(files.paths[place]), score,
                        None if threshold is None else score >= threshold,
                        None if maps == "none" else below(Path(), "maps", names[place], SUFFIX[maps]).as_posix(),
                        below(Path(), "overlays", names[place], ".png").as_posix() if overlays else None,
                        _decided(calibration, anomaly, score, files.paths[place], recipe),
                    ))  # fmt: skip
                place += 1
            del some, anomaly  # a whole map may be large: not beside the next image
            if on_progress is not None:
                on_progress(place, len(files))
        unread = [files.errors[place] for place in sorted(files.errors)]  # threads note them in any order
        if not kept:
            raise ValueError(f"none of {len(files)} images could be read: {unread[0]}")
        colours = None
        if overlays:
            middle = threshold if threshold is not None or calibration is None else calibration.threshold
            colours = heatmaps.colour_range(
                [np.median(stored[i]) for i in range(len(stored))],
                (float(stored[i].max()) for i in range(len(stored))),
                middle if recipe.score == "max" else None,
            )
            save_overlays(stored, [(files.paths[i], names[i]) for i in kept], recipe, colours, out)
    said = (
        None
        if calibration is None
        else {k: v for k, v in calibration.to_dict().items() if k not in ("scores", "looks")}
    )
    save_scores(out, found, {
        "recontrast": recontrast.__version__,
        "checkpoint": str(checkpoint) if isinstance(checkpoint, Path) else type(checkpoint).__name__,
        "trained_on": detector.category,
        "score": recipe.score,
        "threshold": threshold,
        "calibration": said if calibration is None else {"images": calibration.count, **(said or {})},
        "tile": None if recipe.tile is None else {"size": recipe.tile, "overlap": detector.overlap},
        "maps": None if maps == "none" else describe(maps, top, recipe),
        "overlay_range": colours,
        "unread": unread,
    })  # fmt: skip
    rated = None if calibration is None else calibration.rate
    return PredictionSummary(found, unread, rated, detector.calibration_note)


def _decided(
    calibration: Calibration | None, anomaly: np.ndarray, score: float, path: Path, recipe: Recipe
) -> Decision | None:
    if calibration is None:
        return None
    return decide_on(calibration, anomaly, score, images.image_size(path), recipe)
