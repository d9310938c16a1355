"""Watched folder: each image that appears is scored once, and its row is appended to the tables.

Every scored image is first written to a journal, from which the tables follow: a call that goes on after a stop writes
the tables anew from it, so that nothing is lost or repeated, wherever the earlier call ended.
"""

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import recontrast
from recontrast.app.prediction.journal import Journal, describe_identity, read_stamp
from recontrast.app.prediction.output_files import SCALE, SUFFIX, Prediction, result_path, save_map, save_scale
from recontrast.calibration.conformal import Calibration
from recontrast.data import heatmaps, images
from recontrast.data.atomic import replace_files
from recontrast.data.csv_table import Rounded, format_table
from recontrast.data.image_files import IMAGE_ERRORS, ImageFiles, describe_image_error
from recontrast.data.listing import classify_entry, is_image, is_system_folder, natural_sort_key
from recontrast.data.locks import lock_folder
from recontrast.data.own_files import check_replaceable
from recontrast.data.regular_file import open_to_change
from recontrast.inference.decisions import REGION_COLUMNS, decide
from recontrast.inference.detector import Detector, run_checked
from recontrast.inference.drawing import draw_overlay

LINES = "watch.jsonl"
SETTLE_FACTOR = 10  # an image that cannot be read is tried again until it is this many times older than a complete one

Stamp = list[int]


@dataclass(frozen=True)
class WatchOptions:
    """Options of `watch`.

    Attributes:
        maps: ``"tiff16"``, ``"tiff32"``, ``"npy"`` or ``"none"``, as in `recontrast.app.prediction.predict.predict`.
        overlays: Whether to write heat maps laid over the images.
        settle: Seconds for which a file must not change to count as complete.
        poll: Seconds between two looks at the folder.
        batch: Largest number of images per batch.
        workers: Number of threads that decode images; None: a few for each CPU.
    """

    maps: str = "none"
    overlays: bool = False
    settle: float = 1.0
    poll: float = 0.5
    batch: int = 8
    workers: int | None = None


class Watcher:
    """The folder that is watched: which of its images are complete, and not scored yet.

    Args:
        folder: Folder to watch, with its subfolders.
        excluded: Folder below it that is left out, such as that of the results.
        settle: Seconds for which a file must not change to count as complete.
    """

    def __init__(self, folder: Path, excluded: Path, settle: float) -> None:
        self.folder, self._excluded, self._settle = folder, os.path.realpath(excluded), settle
        self._seen: dict[str, tuple[Stamp, float]] = {}  # path -> stamp, and when it was first seen

    def find_complete(self, scored: Mapping[str, Stamp | None]) -> list[tuple[str, Stamp, float]]:
        """Return the images that have not changed for a while and differ from the scored ones.

        Args:
            scored: Stamp of each scored image, by path.

        Returns:
            Path, stamp and age in seconds of each, in natural order.
        """
        now, former = time.monotonic(), self._seen
        self._seen = {}
        complete = []
        for path in self._list_images():
            stamp = read_stamp(path)
            if stamp is None or scored.get(path) == stamp:
                continue
            first = former[path][1] if path in former and former[path][0] == stamp else now
            self._seen[path] = (stamp, first)
            if now - first >= self._settle:
                complete.append((path, stamp, now - first))
        return sorted(complete, key=lambda one: natural_sort_key(one[0]))

    def _list_images(self) -> Iterator[str]:
        """List the images in the folder and below it; a folder that disappears or cannot be read is passed over."""
        waiting, visited = [str(self.folder)], set()
        while waiting:
            try:
                folder = waiting.pop()
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in visited or os.path.realpath(folder) == self._excluded:
                    continue
                visited.add((status.st_dev, status.st_ino))  # a link to a parent folder would loop for ever
                with os.scandir(folder) as entries:
                    for entry in entries:
                        is_folder, is_file = classify_entry(entry)
                        if is_folder and not is_system_folder(entry.name):
                            waiting.append(entry.path)
                        elif is_file and is_image(entry.name):
                            yield entry.path
            except OSError:
                continue


class WatchResults:
    """Results of a watched folder: the journal and the tables that follow from it.

    Args:
        out: Folder of the results, locked by the caller.
        folder: Folder that is watched.
        detector: The detector.
        calibration: Calibration for decisions, or None.
        identity: What determines the results, see `recontrast.app.prediction.journal.describe_identity`.
        options: Options of the call.

    Attributes:
        scored: Stamp of each scored image, by path.

    Raises:
        ValueError: If the folder holds the results of another detector or of other options.
        OSError: If the tables cannot be written.
    """

    def __init__(
        self, out: Path, folder: Path, detector: Detector, calibration: Calibration | None,
        identity: Mapping[str, Any], options: WatchOptions,
    ) -> None:  # fmt: skip
        self.out, self.folder, self.detector, self.calibration = out, folder, detector, calibration
        self.options = options
        self._journal = Journal(out, identity, with_maps=False, lines=LINES, keep_all=True)
        if not self._journal.has_identity:
            raise ValueError(
                f"--out: wanted a folder that was begun with this detector and these options, got {out}, which was "
                "begun with others: choose another folder"
            )
        self.scored: dict[str, Stamp | None] = dict(self._journal.stamps)
        self._journal.begin()  # before the tables, which a later call takes for those of others without it
        self._write_tables()
        if options.maps != "none":
            save_scale(out, options.maps, detector.max_map_value, detector.recipe, {"listed_in": LINES})
        self._tables = {name: open_to_change(out / name, "a table", append=True) for name in self._name_tables()}

    def add(self, prediction: Prediction, stamp: Stamp) -> None:
        """Append an image to the journal, and then to the tables.

        Args:
            prediction: Its prediction; NaN as score and an error for an image that cannot be read.
            stamp: Stamp of the file that was scored.
        """
        self._journal.append(prediction, None, stamp)
        self.scored[prediction.path] = stamp
        for name, rows in self._format_rows(prediction).items():
            table: BinaryIO = self._tables[name]
            table.write(format_table(rows))  # whole rows at once
            table.flush()

    def close(self) -> None:
        """Close all files."""
        self._journal.close()
        for table in self._tables.values():
            table.close()

    def predict(self, path: str, anomaly: np.ndarray, score: float, shape: tuple[int, int]) -> Prediction:
        """Decide about an image, and write its map and overlay.

        Args:
            path: Path of the image.
            anomaly: Its map, (h, w).
            score: Its score.
            shape: Height and width of the image.

        Returns:
            The prediction.
        """
        calibration, recipe = self.calibration, self.detector.recipe
        decision = None if calibration is None else decide(calibration, anomaly, score, shape, recipe)
        name = Path(os.path.relpath(path, self.folder))
        prediction = Prediction(path, score, None, None, None, decision)
        try:
            if self.options.maps != "none":
                target = result_path(Path(), "maps", name, SUFFIX[self.options.maps])
                save_map(self.out / target, anomaly, self.options.maps, self.detector.max_map_value, recipe)
                prediction = replace(prediction, map=target.as_posix())
            if self.options.overlays:
                target = result_path(Path(), "overlays", name, ".png")
                heatmaps.save_png(self.out / target, draw_overlay(Path(path), anomaly, recipe, calibration))
                prediction = replace(prediction, overlay=target.as_posix())
        except IMAGE_ERRORS as error:
            prediction = replace(prediction, error=describe_image_error(path, error))
        return prediction

    def _name_tables(self) -> list[str]:
        return ["scores.csv", *(["regions.csv"] if self.calibration is not None else [])]

    def _write_tables(self) -> None:
        """Write the tables anew from the journal."""
        decided = ["p_value", "decision", "regions"] if self.calibration is not None else []
        tables: dict[str, list[list[Any]]] = {"scores.csv": [["path", "score", *decided, "error"]]}
        tables["regions.csv"] = [["path", "region", *REGION_COLUMNS]]
        for entry in self._journal.all_entries:
            for name, rows in self._format_rows(entry.prediction).items():
                tables[name] += rows
        self._journal.all_entries.clear()
        with replace_files(self.out) as staging:
            for name in self._name_tables():
                (staging / name).write_bytes(format_table(tables[name]))

    def _format_rows(self, prediction: Prediction) -> dict[str, list[list[Any]]]:
        """Return the rows of an image by table."""
        score = None if math.isnan(prediction.score) and prediction.error else Rounded(prediction.score)
        if self.calibration is None:
            return {"scores.csv": [[prediction.path, score, prediction.error]]}
        decision = prediction.decision
        if decision is None:
            return {"scores.csv": [[prediction.path, score, None, None, None, prediction.error]], "regions.csv": []}
        count = None if decision.defect is None else len(decision.regions or ())
        row = [prediction.path, score, Rounded(decision.p_value), decision.label, count, prediction.error]
        regions = enumerate(decision.regions or (), 1)
        return {
            "scores.csv": [row],
            "regions.csv": [[prediction.path, number, *region.to_dict().values()] for number, region in regions],
        }


def watch(
    folder: Path, checkpoint: Path, detector: Detector, calibration: Calibration | None, out: Path,
    options: WatchOptions, *, is_stopped: Callable[[], bool], on_image: Callable[[Prediction], None],
    overwrite: bool = False,
) -> int:  # fmt: skip
    """Score each image that appears in a folder once, until the call is stopped.

    An image counts as complete when size and time of change have been the same for ``options.settle`` seconds; a file
    with new content under an old name is a new image. Its row is appended to ``scores.csv`` as a whole. A later call
    with the same folders goes on: images that came in between are scored, and no image twice.

    Args:
        folder: Folder to watch, with its subfolders.
        checkpoint: File of the detector, which must be the same in later calls.
        detector: The detector.
        calibration: Calibration for decisions, or None.
        out: Folder for ``scores.csv``, ``regions.csv`` (with decisions), ``maps/`` with ``scale.json``, ``overlays/``
            and the journal.
        options: Further options.
        is_stopped: Returns whether to stop; the images of the current batch are completed before.
        on_image: Called with each prediction.
        overwrite: Whether files in ``out`` that this package did not write may be replaced.

    Returns:
        Number of images that this call scored or could not read.

    Raises:
        ValueError: If ``out`` belongs to other results.
        OSError: If a result cannot be written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: wanted a folder to watch, got no such folder")
    names = ["scores.csv", "regions.csv", LINES, *([SCALE] if options.maps != "none" else [])]
    if (out / "scores.csv").exists() and not (out / LINES).exists():
        raise ValueError(f"--out: wanted a new folder, or one of an earlier watch, got other results: {out}")
    check_replaceable(out, names, overwrite=overwrite)
    identity = describe_identity(checkpoint, {
        "recontrast": recontrast.__version__, "folder": os.path.abspath(folder), "maps": options.maps,
        "overlays": options.overlays, "rate": None if calibration is None else calibration.rate,
    })  # fmt: skip
    done = 0
    with lock_folder(out), ThreadPoolExecutor(options.workers) as pool:
        results = WatchResults(out, folder, detector, calibration, identity, options)
        watcher = Watcher(folder, out, options.settle)
        try:
            while not is_stopped():
                begin = time.monotonic()
                complete = watcher.find_complete(results.scored)
                for start in range(0, len(complete), options.batch):
                    if is_stopped():
                        break
                    for prediction in _score(complete[start : start + options.batch], results, pool):
                        on_image(prediction)
                        done += 1
                # A folder of very many files is looked at less often.
                pause = max(options.poll, 4 * (time.monotonic() - begin)) if not complete else options.poll
                end = time.monotonic() + pause
                while not is_stopped() and (left := end - time.monotonic()) > 0:
                    time.sleep(min(left, 0.1))
        finally:
            results.close()
    return done


def _score(
    complete: list[tuple[str, Stamp, float]], results: WatchResults, pool: ThreadPoolExecutor
) -> Iterator[Prediction]:
    """Score some images, and append them to the results; one that changes meanwhile is left for later."""
    files = ImageFiles([Path(path) for path, _, _ in complete], pool)
    position = 0
    for maps, scores in run_checked(results.detector, files, results.options.batch):
        for anomaly, score in zip(maps, scores.tolist(), strict=True):
            path, stamp, age = complete[position]
            error, position = files.errors.get(position), position + 1
            try:
                shape = images.image_size(path) if error is None else (0, 0)
            except IMAGE_ERRORS as failure:
                error = describe_image_error(path, failure)
            if read_stamp(path) != stamp:
                continue  # changed, or gone, while it was read
            if error is None:
                prediction = results.predict(path, anomaly, score, shape)
            elif age < SETTLE_FACTOR * results.options.settle:
                continue  # perhaps its writer has only paused
            else:
                prediction = Prediction(path, math.nan, None, None, None, error=error)
            results.add(prediction, stamp)
            yield prediction
