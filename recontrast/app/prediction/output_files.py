"""Output files of a prediction: scores, regions, maps and overlays. Each file is complete or missing."""

import csv
import io
import json
import math
import os
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from recontrast.data import heatmaps, images, large_maps
from recontrast.data.atomic import replace_files
from recontrast.data.unfinished import list_unfinished, mark_unfinished, name_mark, remove_files
from recontrast.inference.decisions import REGION_COLUMNS, Decision
from recontrast.inference.detector import map_extent
from recontrast.recipes.recipe import Recipe

COMMAND = "predict"  # in the name of the mark of unfinished results
SUFFIX = {"tiff16": ".tiff", "tiff32": ".tiff", "npy": ".npy"}


@dataclass(frozen=True)
class Prediction:
    """Scores and decision of one image. Paths of its map and overlay are relative to the output folder, or None."""

    path: str
    score: float  # NaN if the map is not finite
    flagged: bool | None  # None without a threshold or a score
    map: str | None
    overlay: str | None
    decision: Decision | None = None  # None without a calibration


class MapStore:
    """Maps kept in a temporary file until their colour range is known; they may differ in size."""

    def __init__(self, file: Any, out: Path) -> None:
        """Store maps in ``file``, a temporary file below ``out``."""
        self.file, self.out = file, out
        self.entries: list[tuple[int, tuple[int, ...]]] = []
        self._end = 0

    def append(self, anomaly: np.ndarray) -> None:
        """Append one map, (H, W)."""
        try:
            self.file.write(np.ascontiguousarray(anomaly, np.float32).data)
            self.file.flush()
        except OSError as error:
            raise OSError(f"cannot write below {self.out}: {error.strerror or error}") from error
        self.entries.append((self._end, anomaly.shape))
        self._end += 4 * anomaly.size

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return one map as a memory map; IndexError after the last."""
        start, shape = self.entries[index]
        return np.memmap(self.file, np.float32, "r", start, shape)


def result_path(out: Path, folder: str, name: Path, suffix: str) -> Path:
    """Return the path of a result file of the image ``name``."""
    return out / folder / name.with_name(name.name + suffix)


def save_overlays(
    stored: Any, sources: Sequence[tuple[Path, Path]], recipe: Recipe, colours: tuple[float, float], out: Path
) -> None:
    """Write the heat maps laid over the original images.

    Args:
        stored: Maps by index.
        sources: Path and result name of each image.
        recipe: Recipe of the detector, which defines the part of an image that the map covers.
        colours: Map values of the coldest and the hottest colour.
        out: Folder for the results.
    """
    low, high = colours

    def save(index: int) -> None:
        path, name = sources[index]
        with images.reserve_memory(path):
            image = images.read_image(path, bits=recipe.bits)
            image = large_maps.reduce_blocks(image, large_maps.find_reduction(image.shape[:2]), "mean")
        top, left, height, width = map_extent(image.shape[:2], recipe)
        heat = np.zeros(image.shape[:2], np.float32)
        scaled = (stored[index] - low) / max(high - low, 1e-12)
        heat[top : top + height, left : left + width] = heatmaps.resize_map(scaled, (height, width))
        heatmaps.save_png(result_path(out, "overlays", name, ".png"), large_maps.draw_overlay(image, heat))

    threads = 1 if recipe.tile is not None else min(4, os.cpu_count() or 1)  # each holds a full-size image
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(save, index) for index in range(len(sources))]:
            future.result()


def describe_maps(maps: str, top: float, recipe: Recipe) -> dict[str, Any]:
    """Return what a reader of the map files needs: format, size, range and scale."""
    size = "as the image" if recipe.tile is not None else list(recipe.out)
    description: dict[str, Any] = {"format": maps, "size": size, "range": [0.0, top]}
    if maps == "tiff16":
        description["scale"] = top / 65535  # anomaly value = stored integer x scale
    return description


def save_map(path: Path, anomaly: np.ndarray, kind: str, top: float, recipe: Recipe) -> None:
    """Write one map, as a tiled TIFF for detectors of tiles. See `recontrast.data.heatmaps.save_map`."""
    (heatmaps.save_map if recipe.tile is None else large_maps.save_map)(path, anomaly, kind, top)


def to_json_row(prediction: Prediction) -> dict[str, Any]:
    """Return the entry of one image in scores.json; score and p-value of an undecided image are null."""
    has_score = math.isfinite(prediction.score)  # JSON has no NaN
    values: dict[str, Any] = {"path": prediction.path}
    values |= {"score": float(f"{prediction.score:.9g}") if has_score else None, "flagged": prediction.flagged}
    if (decision := prediction.decision) is not None:
        values |= {"p_value": decision.p_value if has_score else None, "decision": decision.label}
        values["regions"] = None if decision.regions is None else [region.to_dict() for region in decision.regions]
    values |= {"map": prediction.map, "overlay": prediction.overlay}
    always = () if has_score else ("score", "p_value")
    return {key: value for key, value in values.items() if value is not None or key in always}


def save_scores(
    out: Path, predictions: Sequence[Prediction], description: dict[str, Any], earlier: Collection[str] = ()
) -> None:
    """Write ``scores.csv``, ``scores.json`` and, with decisions, ``regions.csv``, all at once.

    Files of an earlier run that this run does not write are removed, so that every file belongs to the scores beside
    it.

    Args:
        out: Folder for the results, locked by the caller.
        predictions: Predictions in order.
        description: Further content of scores.json; "threshold" and "calibration" determine the columns.
        earlier: Files of an earlier run, see `list_earlier_results`.
    """
    flags, decided = description["threshold"] is not None, description["calibration"] is not None
    lines = [
        ["path", "score", *(["flagged"] if flags else []), *(["p_value", "decision", "regions"] if decided else [])]
    ]
    regions: list[list[Any]] = [["path", "region", *REGION_COLUMNS]]
    for prediction in predictions:
        line = [prediction.path, f"{prediction.score:.9g}", *([_to_cell(prediction.flagged)] if flags else [])]
        if (decision := prediction.decision) is not None:
            line += [f"{decision.p_value:.9g}", decision.label]
            line.append("" if decision.defect is None else str(len(decision.regions or ())))
            for number, region in enumerate(decision.regions or (), 1):
                regions.append([prediction.path, number, *region.to_dict().values()])
        lines.append(line)
    written = {name for prediction in predictions for name in (prediction.map, prediction.overlay) if name is not None}
    if stale := set(earlier) - written - {"regions.csv"}:
        if list_unfinished(out, COMMAND) is None:
            begin(out, earlier)
        remove_files(out, stale)
    removed = [name_mark(COMMAND), *(["regions.csv"] if "regions.csv" in earlier else [])]
    with replace_files(out, remove=removed) as staging:
        _save_csv(staging / "scores.csv", lines)
        if decided:
            _save_csv(staging / "regions.csv", regions)
        content = {**description, "images": [to_json_row(prediction) for prediction in predictions]}
        (staging / "scores.json").write_bytes((json.dumps(content, indent=1) + "\n").encode())


def _to_cell(flag: bool | None) -> str:
    return "" if flag is None else str(int(flag))


def begin(out: Path, files: Collection[str]) -> None:
    """Mark the results as unfinished, and remove the tables of an earlier run.

    Args:
        out: Folder for the results.
        files: Files that this run may write, and those of an earlier one.
    """
    is_ours = _read_earlier_images(out) is not None
    tables = ["scores.csv", "scores.json", *(["regions.csv"] if "regions.csv" in files else [])] if is_ours else []
    mark_unfinished(out, COMMAND, files, tables)


def list_earlier_results(out: Path) -> set[str]:
    """List the maps, overlays and regions of earlier runs, finished or not, relative to their folder.

    Args:
        out: Folder of the results.

    Returns:
        The files; an empty set if no earlier run wrote to the folder.
    """
    listed = list_unfinished(out, COMMAND) or set()
    images = _read_earlier_images(out) or []
    names = [image[key] for image in images for key in ("map", "overlay") if key in image]
    if any("decision" in image for image in images):
        names.append("regions.csv")
    listed |= {name for name in names if isinstance(name, str)}
    return {name for name in listed if PurePosixPath(name).parts[:1] in (("maps",), ("overlays",), ("regions.csv",))}


def _read_earlier_images(out: Path) -> list[dict[str, Any]] | None:
    """Return the images listed in the scores.json of a finished run; None if there is none, or another tool's."""
    try:
        images = json.loads((out / "scores.json").read_bytes())["images"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return images if isinstance(images, list) and all(isinstance(image, dict) for image in images) else None


def _save_csv(path: Path, lines: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    path.write_bytes(text.getvalue().encode(errors="surrogateescape"))
