"""Prediction on image files: scores, decisions, anomaly maps and heat-map overlays on disk.

The images are scored by a `recontrast.inference.detector.Detector`; its docstring says how to add one.
Decisions are made in `recontrast.inference.decisions`, files are written in `recontrast.app.prediction.output_files`.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

import recontrast
from recontrast.app.prediction.output_files import (
    SUFFIX,
    MapStore,
    Prediction,
    begin,
    describe_maps,
    list_earlier_results,
    result_path,
    save_map,
    save_overlays,
    save_scores,
)
from recontrast.calibration.conformal import Calibration
from recontrast.data import heatmaps, images, large_maps
from recontrast.data.image_files import ImageFiles, assign_result_names
from recontrast.data.locks import lock_folder
from recontrast.inference.decisions import decide as decide_on
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
    """

    predictions: list[Prediction]
    unread: list[str]
    rate: float | None = None
    calibration_note: str | None = None
    undecided: list[str] = field(default_factory=list)


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
    """Score images, decide on them if there is a calibration, and write all results below ``out``.

    The results are ``scores.csv``, ``scores.json``, ``regions.csv`` (with decisions), ``maps/`` and ``overlays/``.
    Results of an earlier finished run that this run does not write are removed. Unreadable files are skipped and
    reported. Every written file is complete.

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
        inference: Inference options. None: as trained, with folded BatchNorm. If they change the scores, the
            calibration does not apply and there are no decisions.
        workers: Number of threads that decode images. None: a few for each CPU.
        device: PyTorch device. None: the GPU, if there is one.
        batch: Number of images per batch.
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
    with lock_folder(out):
        detector = checkpoint
        if isinstance(detector, Path):
            detector = open_detector(detector, device, tile, overlap, inference)
        calibration = select_calibration(detector, rate, decide, checkpoint)
        name = str(checkpoint) if isinstance(checkpoint, Path) else type(checkpoint).__name__
        return _run(detector, name, paths, out, calibration, threshold, maps, overlays, workers, batch, on_progress)


def _run(
    detector: Detector, name: str, paths: Sequence[Path], out: Path, calibration: Calibration | None,
    threshold: float | None, maps: Maps, overlays: bool, workers: int | None, batch: int,
    on_progress: Callable[[int, int], None] | None,
) -> PredictionSummary:  # fmt: skip
    """Score images and write all results to a folder that is locked."""
    with ThreadPoolExecutor(workers) as pool, tempfile.TemporaryFile(dir=out) as file:
        files = ImageFiles(paths, pool)
        writer = _Writer(files, out, detector, calibration, threshold, maps, MapStore(file, out) if overlays else None)
        for batch_maps, scores in run_checked(detector, files, batch):
            writer.add(batch_maps, scores)
            del batch_maps  # a map may be large, and should not stay in memory beside the next image
            if on_progress is not None:
                on_progress(writer.position, len(files))
        unread = [files.errors[position] for position in sorted(files.errors)]  # threads add them in any order
        if not writer.predictions:
            raise ValueError(f"none of {len(files)} images could be read: {unread[0]}")
        colours = writer.write_overlays()
    description = _describe_run(name, detector, calibration, threshold, maps, colours, unread)
    save_scores(out, writer.predictions, description, writer.earlier)
    used_rate = None if calibration is None else calibration.rate
    undecided = [
        describe_undecided(prediction.path) for prediction in writer.predictions if math.isnan(prediction.score)
    ]
    return PredictionSummary(writer.predictions, unread, used_rate, detector.calibration_note, undecided)


class _Writer:
    """Collects predictions in the order of the files, and writes the maps and overlays of each.

    Attributes:
        position: Number of files handled so far.
        predictions: One entry for each image that could be read.
        earlier: Files of earlier runs in the folder.
    """

    def __init__(
        self, files: ImageFiles, out: Path, detector: Detector, calibration: Calibration | None,
        threshold: float | None, maps: Maps, waiting: MapStore | None,
    ) -> None:  # fmt: skip
        self.files, self.out, self.detector = files, out, detector
        self.calibration, self.threshold, self.maps = calibration, threshold, maps
        self.waiting = waiting  # maps wait on the disk until their colour range is known
        self.names = assign_result_names(files.paths)
        self.position = 0
        self.predictions: list[Prediction] = []
        self.earlier = list_earlier_results(out)
        self._readable: list[int] = []  # positions of the files that could be read

    def add(self, maps: np.ndarray, scores: np.ndarray) -> None:
        """Process the maps (n, H, W) and scores (n,) of the next files."""
        for anomaly, score in zip(maps, scores.tolist(), strict=True):
            if self.position not in self.files.errors:
                if not self._readable and (self.maps != "none" or self.waiting is not None):
                    planned = {result for name in self.names for result in self._name_results(name) if result}
                    begin(self.out, self.earlier | planned)
                self._readable.append(self.position)
                self.predictions.append(self._predict_one(anomaly, score))
            self.position += 1

    def write_overlays(self) -> tuple[float, float] | None:
        """Write the overlays of all images; return the map values of the coldest and the hottest colour."""
        if self.waiting is None:
            return None
        recipe, middle = self.detector.recipe, self.threshold
        if middle is None and self.calibration is not None:
            middle = self.calibration.threshold
        usable = [index for index, prediction in enumerate(self.predictions) if math.isfinite(prediction.score)]
        colours = (0.0, 1.0)
        if usable:
            colours = heatmaps.colour_range(
                [np.median(self.waiting[index]) for index in usable],
                (float(self.waiting[index].max()) for index in usable),
                middle if recipe.score == "max" else None,
            )
        sources = [(self.files.paths[position], self.names[position]) for position in self._readable]
        save_overlays(self.waiting, sources, recipe, colours, self.out)
        return colours

    def _predict_one(self, anomaly: np.ndarray, score: float) -> Prediction:
        path, name = self.files.paths[self.position], self.names[self.position]
        recipe = self.detector.recipe
        map_name, overlay_name = self._name_results(name)
        if map_name is not None:
            save_map(self.out / map_name, anomaly, self.maps, self.detector.max_map_value, recipe)
        if self.waiting is not None:
            factor = large_maps.find_reduction(anomaly.shape)
            self.waiting.append(large_maps.reduce_blocks(anomaly, factor, "max"))
        decision = None
        if self.calibration is not None:
            decision = decide_on(self.calibration, anomaly, score, images.image_size(path), recipe)
        return Prediction(
            str(path), score, None if self.threshold is None or math.isnan(score) else score >= self.threshold,
            map_name, overlay_name, decision,
        )  # fmt: skip

    def _name_results(self, name: Path) -> tuple[str | None, str | None]:
        """Return the paths of the map and the overlay of an image, relative to the folder; None if not written."""
        map_name = result_path(Path(), "maps", name, SUFFIX[self.maps]).as_posix() if self.maps != "none" else None
        overlay_name = result_path(Path(), "overlays", name, ".png").as_posix() if self.waiting is not None else None
        return map_name, overlay_name


def _describe_run(
    name: str, detector: Detector, calibration: Calibration | None, threshold: float | None, maps: Maps,
    colours: tuple[float, float] | None, unread: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Return the content of scores.json besides the images."""
    recipe, promise = detector.recipe, None
    if calibration is not None:
        stored = {key: value for key, value in calibration.to_dict().items() if key not in ("scores", "looks")}
        promise = {"images": calibration.count, **stored}
    return {
        "recontrast": recontrast.__version__,
        "checkpoint": name,
        "trained_on": detector.category,
        "score": recipe.score,
        "threshold": threshold,
        "calibration": promise,
        "tile": None if recipe.tile is None else {"size": recipe.tile, "overlap": detector.overlap},
        "maps": None if maps == "none" else describe_maps(maps, detector.max_map_value, recipe),
        "overlay_range": colours,
        "unread": unread,
    }
