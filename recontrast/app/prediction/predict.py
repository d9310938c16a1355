"""Prediction on image files: scores, decisions, anomaly maps and heat-map overlays on disk.

The images are scored by a `recontrast.inference.detector.Detector`; its docstring says how to add one.
Decisions are made in `recontrast.inference.decisions`, files are written in `recontrast.app.prediction.output_files`.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import recontrast
from recontrast.app.prediction.journal import LINES, MAPS, Journal, describe_identity
from recontrast.app.prediction.output_files import (
    SUFFIX,
    TABLES,
    Failure,
    Prediction,
    describe_maps,
    list_earlier_results,
    result_path,
    save_scores,
)
from recontrast.app.prediction.writer import PredictionWriter
from recontrast.calibration.conformal import Calibration
from recontrast.data import images
from recontrast.data.image_files import ImageFiles, assign_result_names
from recontrast.data.locks import lock_folder
from recontrast.data.own_files import check_replaceable
from recontrast.data.roi import describe_roi
from recontrast.data.views import group_paths, list_view_files
from recontrast.inference.decisions import describe_undecided, select_calibration
from recontrast.inference.detector import Detector, open_detector, run_checked
from recontrast.inference.options import InferenceOptions

Maps = Literal["tiff16", "tiff32", "npy", "none"]


@dataclass(frozen=True)
class PredictionSummary:
    """Result of a prediction.

    Attributes:
        predictions: One entry for each image that could be read.
        unread: One sentence for each file that could not be read.
        undecided: One sentence for each image whose map is not finite: it has no score and no decision.
        rate: Promised false-alarm rate of the decisions; None without decisions.
        calibration_note: Why there are no decisions although the checkpoint has a calibration; else None.
        incomplete: One sentence for each image that has a score, but no map, overlay or regions.
        continued: Number of images that an earlier call, which was stopped, had scored.
        noun: What is counted: "images", or "parts" with several views.
    """

    predictions: list[Prediction]
    unread: list[str]
    rate: float | None = None
    calibration_note: str | None = None
    undecided: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    continued: int = 0
    noun: str = "images"


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
    roi: Path | None = None,
    inference: InferenceOptions | None = None,
    workers: int | None = None,
    device: str | None = None,
    batch: int = 16,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> PredictionSummary:
    """Score images, decide on them if there is a calibration, and write all results below ``out``.

    The results are ``scores.csv``, ``scores.json``, ``regions.csv`` (with decisions), ``maps/`` and ``overlays/``.
    Results of an earlier finished run that this run does not write are removed. An error about one image (its file,
    map or overlay) is the content of its column ``error`` in scores.csv, and the other images go on. Scores are
    written as they come: if the process is killed, the same call goes on where it stopped
    (`recontrast.app.prediction.journal`). Every written file is complete.

    Args:
        checkpoint: Path of a checkpoint or an exported file, or a `recontrast.inference.detector.Detector`.
        inputs: Image files, or folders that are searched for images at any depth.
        out: Folder for the results.
        maps: ``"tiff16"`` (uint16 over the range given in scores.json), ``"tiff32"`` or ``"npy"`` (float32), or
            ``"none"``; in the size of the model's input.
        overlays: Whether to write heat maps laid over the images as PNG, in the size of the original, reduced by an
            integer factor above `recontrast.data.large_maps.OVERLAY_PIXELS`. All share one colour range, given in
            scores.json: from the median to the largest map value of this run, or with the threshold in the middle if
            there is a threshold on the maximum.
        threshold: Images with at least this score are flagged.
        rate: Promised false-alarm rate. None: the rate of the calibration.
        decide: Whether a detector without a calibration is an error. With a calibration, decisions are always made.
        tile: Side of the tiles in pixels, for a detector trained on tiles. None: as trained.
        overlap: Pixels that neighbouring tiles share. None: a quarter of the tile.
        roi: Another region of interest, see `recontrast.inference.detector.CheckpointDetector`. None: as trained.
        inference: Inference options. None: as trained, with folded BatchNorm. If they change the scores, the
            calibration does not apply and there are no decisions.
        workers: Number of threads that decode images. None: a few for each CPU.
        device: PyTorch device. None: the GPU, if there is one.
        batch: Number of images per batch.
        overwrite: Whether files in ``out`` that this package did not write may be replaced. Inputs never are.
        on_progress: Called with the number of finished images and of all images.

    Returns:
        The predictions, and the files that could not be read.

    Raises:
        ValueError: If an option is invalid, no image can be read, or ``decide`` or ``rate`` is given and the
            calibration is missing or too small.
        OSError: If an input does not exist, or a result cannot be written.
    """
    if maps not in (*SUFFIX, "none"):
        raise ValueError(f"predict: maps: wanted tiff16, tiff32, npy or none, got {maps!r}")
    if batch < 1:
        raise ValueError(f"predict: batch: wanted at least 1 image, got {batch}")
    paths = images.list_images(inputs)
    detector = checkpoint
    if isinstance(detector, Path):
        detector = open_detector(detector, device, tile, overlap, inference, roi)
    files = ImageFiles(group_paths(paths, detector.recipe.image_views))  # parts have the names of their first views
    names = {str(path): name for path, name in zip(files.paths, assign_result_names(files.paths), strict=True)}
    kinds = {"maps": SUFFIX.get(maps), "overlays": ".png" if overlays else None}
    results = [
        result_path(Path(), folder, name, suffix).as_posix()
        for folder, suffix in kinds.items()
        if suffix is not None
        for name in names.values()
    ]
    check_replaceable(out, [*TABLES, LINES, MAPS, *results], overwrite=overwrite, inputs=paths)
    with lock_folder(out), ThreadPoolExecutor(workers) as pool:
        calibration = select_calibration(detector, rate, decide, checkpoint)
        identity = None
        if isinstance(checkpoint, Path):
            options = {"recontrast": recontrast.__version__, "maps": maps, "overlays": overlays, "threshold": threshold}
            options |= {"rate": rate, "tile": tile, "overlap": overlap, "inference": repr(inference)}
            options["roi"] = None if roi is None else [str(roi), detector.recipe.roi]
            identity = describe_identity(checkpoint, options)
        journal = Journal(out, identity, with_maps=overlays, list_inputs=partial(_list_inputs, detector))
        source = str(checkpoint) if isinstance(checkpoint, Path) else type(checkpoint).__name__
        return _run(
            detector, source, files, names, out, calibration, threshold, maps, overlays, journal, pool, batch,
            on_progress,
        )  # fmt: skip


def _list_inputs(detector: Detector, path: str) -> list[Path]:
    """Return the files that the result of an image depends on: its views, and its mask if each image has its own."""
    masks = getattr(detector, "roi_folder", None)
    return [*list_view_files(Path(path), detector.recipe.image_views), *(masks.list_for([path]) if masks else ())]


def _run(
    detector: Detector, name: str, files: ImageFiles, names: dict[str, Path], out: Path,
    calibration: Calibration | None, threshold: float | None, maps: Maps, overlays: bool, journal: Journal,
    pool: ThreadPoolExecutor, batch: int, on_progress: Callable[[int, int], None] | None,
) -> PredictionSummary:  # fmt: skip
    """Score the images that no earlier call scored, and write all results to a folder that is locked."""
    earlier = list_earlier_results(out)
    writer = PredictionWriter(out, names, detector, calibration, threshold, maps, overlays, journal, earlier)
    continued = done = len(writer.entries)
    rest = ImageFiles([path for path in files.paths if str(path) not in writer.entries], pool)
    try:
        for batch_maps, scores in run_checked(detector, rest, batch) if len(rest) else ():
            writer.add(rest, done - continued, batch_maps, scores)
            done += len(scores)
            del batch_maps  # a map may be large, and should not stay in memory beside the next image
            if on_progress is not None:
                on_progress(done, len(names))
        results = [writer.failures.get(path) or writer.entries[path].prediction for path in names]
        unread = [result.error for result in results if isinstance(result, Failure)]
        if not writer.entries:
            raise ValueError(f"none of {len(names)} images could be read: {unread[0]}")
        colours = writer.write_overlays()
        results = [writer.failures.get(path) or writer.entries[path].prediction for path in names]
        description = _describe_run(name, detector, calibration, threshold, maps, colours, unread)
        journal.close()  # Windows removes no open file
        save_scores(out, results, description, earlier, [LINES, MAPS])
    finally:
        journal.close()
    predictions = [result for result in results if isinstance(result, Prediction)]
    return PredictionSummary(
        predictions, unread, None if calibration is None else calibration.rate, detector.calibration_note,
        undecided=[describe_undecided(prediction.path) for prediction in predictions if math.isnan(prediction.score)],
        incomplete=[prediction.error for prediction in predictions if prediction.error is not None],
        continued=continued, noun=f"{detector.recipe.noun}s",
    )  # fmt: skip


def _describe_run(
    name: str, detector: Detector, calibration: Calibration | None, threshold: float | None, maps: Maps,
    colours: tuple[float, float] | None, unread: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Return the content of scores.json besides the images."""
    recipe, promise = detector.recipe, None
    if calibration is not None:
        stored = {key: value for key, value in calibration.to_dict().items() if key not in ("scores", "looks")}
        promise = {"images": stored.pop("image_count", calibration.count), "groups": calibration.count, **stored}
    return {
        "recontrast": recontrast.__version__,
        "checkpoint": name,
        "trained_on": detector.category,
        "score": recipe.score,
        "threshold": threshold,
        "calibration": promise,
        "region_of_interest": None if recipe.roi is None else describe_roi(recipe.roi),
        **({} if recipe.window is None else {"window": list(recipe.window)}),
        **({} if recipe.image_views is None else {"views": list(recipe.view_names), "view_map": recipe.view_map}),
        "tile": None if recipe.tile is None else {"size": recipe.tile, "overlap": detector.overlap},
        "maps": None if maps == "none" else describe_maps(maps, detector.max_map_value, recipe),
        "overlay_range": colours,
        "unread": unread,
    }
