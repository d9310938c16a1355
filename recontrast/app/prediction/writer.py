"""Collection of the predictions of a run: maps are written as they come, overlays when their colour range is known."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from recontrast.app.prediction.journal import Entry, Journal
from recontrast.app.prediction.output_files import (
    SUFFIX,
    Failure,
    Prediction,
    begin,
    result_path,
    save_map,
    save_overlays,
)
from recontrast.calibration.conformal import Calibration
from recontrast.data import heatmaps, images, large_maps
from recontrast.data.image_files import IMAGE_ERRORS, ImageFiles, describe_image_error
from recontrast.inference.decisions import Decision, decide
from recontrast.inference.detector import Detector


class PredictionWriter:
    """Writer of the results of single images; an error about one image is stored, and the others go on.

    Args:
        out: Folder of the results.
        names: Path of the results of each image below the folders of the results, by path of the image.
        detector: Detector that scores the images.
        calibration: Calibration for decisions, or None.
        threshold: Images with at least this score are flagged. None flags none.
        maps: Format of the maps, or "none".
        overlays: Whether overlays are written.
        journal: Journal of the run.
        earlier: Files of earlier runs in the folder.

    Attributes:
        entries: Scored images, by path.
        failures: Images that could not be scored, by path.
    """

    def __init__(
        self, out: Path, names: dict[str, Path], detector: Detector, calibration: Calibration | None,
        threshold: float | None, maps: str, overlays: bool, journal: Journal, earlier: set[str],
    ) -> None:  # fmt: skip
        self.out, self.names, self.detector = out, names, detector
        self.calibration, self.threshold, self.maps, self.overlays = calibration, threshold, maps, overlays
        self.journal, self.earlier = journal, earlier
        self._has_begun = False
        self.entries: dict[str, Entry] = {}
        for path in names:  # an image has another name if others have joined it; one with an error is tried again
            entry = journal.entries.get(path)
            if entry is not None and (entry.prediction.map, entry.prediction.overlay) == self.name_results(path):
                self.entries[path] = entry
        self.failures: dict[str, Failure] = {}

    def add(self, files: ImageFiles, position: int, maps: np.ndarray, scores: np.ndarray) -> None:
        """Write the results of the next images.

        Args:
            files: Images of the run.
            position: Position of the first image in ``files``.
            maps: Maps (n, H, W).
            scores: Scores (n,).
        """
        for index, (anomaly, score) in enumerate(zip(maps, scores.tolist(), strict=True), position):
            path = str(files.paths[index])
            if index in files.errors:
                self.failures[path] = Failure(path, files.errors[index])
                continue
            if not self._has_begun:  # before the first file is written
                self._has_begun = True
                planned = {name for image in self.names for name in self.name_results(image) if name is not None}
                begin(self.out, self.earlier | planned)
            stored = None
            if self.overlays:
                stored = large_maps.reduce_blocks(anomaly, large_maps.find_reduction(anomaly.shape), "max")
            self.entries[path] = self.journal.append(self._predict_one(path, anomaly, score), stored)

    def write_overlays(self) -> tuple[float, float] | None:
        """Write the overlays of all images; return the map values of the coldest and the hottest colour."""
        if not self.overlays:
            return None
        recipe, middle = self.detector.recipe, self.threshold
        if middle is None and self.calibration is not None:
            middle = self.calibration.threshold
        usable = [entry for entry in self.entries.values() if math.isfinite(entry.prediction.score)]
        colours = (0.0, 1.0)
        if usable:
            colours = heatmaps.colour_range(
                [np.median(self.journal.load_map(entry)) for entry in usable],
                (float(self.journal.load_map(entry).max()) for entry in usable),
                middle if recipe.score == "max" else None,
            )
        paths = list(self.entries)
        errors = save_overlays(
            lambda index: self.journal.load_map(self.entries[paths[index]]),
            [(Path(path), self.names[path]) for path in paths], recipe, colours, self.out, IMAGE_ERRORS,
        )  # fmt: skip
        for index, error in errors.items():
            entry = self.entries[paths[index]]
            prediction = replace(_add_error(entry.prediction, error), overlay=None)
            self.entries[paths[index]] = replace(entry, prediction=prediction)
        return colours

    def name_results(self, path: str) -> tuple[str | None, str | None]:
        """Return the paths of the map and the overlay of an image, relative to the folder; None if not written."""
        name = self.names[path]
        map_name = result_path(Path(), "maps", name, SUFFIX[self.maps]).as_posix() if self.maps != "none" else None
        overlay_name = result_path(Path(), "overlays", name, ".png").as_posix() if self.overlays else None
        return map_name, overlay_name

    def _predict_one(self, path: str, anomaly: np.ndarray, score: float) -> Prediction:
        map_name, overlay_name = self.name_results(path)
        flagged = None if self.threshold is None or math.isnan(score) else score >= self.threshold
        prediction = Prediction(path, score, flagged, map_name, overlay_name)
        if map_name is not None:
            try:
                save_map(self.out / map_name, anomaly, self.maps, self.detector.max_map_value, self.detector.recipe)
            except IMAGE_ERRORS as error:
                prediction = replace(_add_error(prediction, describe_image_error(path, error)), map=None)
        if self.calibration is None:
            return prediction
        try:
            shape = images.image_size(path)
        except IMAGE_ERRORS as error:  # deleted or replaced after it was read: no regions in its pixels
            decision = decide(self.calibration, anomaly, score, anomaly.shape, self.detector.recipe)
            prediction = _add_error(prediction, describe_image_error(path, error))
            return replace(prediction, decision=Decision(decision.p_value, decision.defect, None))
        decision = decide(self.calibration, anomaly, score, shape, self.detector.recipe)
        return replace(prediction, decision=decision)


def _add_error(prediction: Prediction, error: str) -> Prediction:
    return replace(prediction, error=error if prediction.error is None else f"{prediction.error}; {error}")
