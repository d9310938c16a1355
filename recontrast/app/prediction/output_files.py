"""Output files of a prediction: scores, regions, maps and overlays. Each file is complete or missing."""

import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from recontrast.data import heatmaps, images, large_maps
from recontrast.data.atomic import replace_file, replace_files
from recontrast.data.csv_table import Rounded, format_table
from recontrast.data.image_files import describe_image_error
from recontrast.data.json_text import parse_json
from recontrast.data.own_files import LARGEST_LIST
from recontrast.data.regular_file import read_bytes
from recontrast.data.unfinished import list_unfinished, mark_unfinished, name_mark, remove_files
from recontrast.data.views import show_view
from recontrast.data.window import to_levels
from recontrast.inference.decisions import REGION_COLUMNS, Decision
from recontrast.inference.detector import map_extent
from recontrast.recipes.recipe import Recipe

COMMAND = "predict"  # in the name of the mark of unfinished results
SCALE = "maps/scale.json"
TABLES = ("scores.csv", "scores.json", "regions.csv")
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
    error: str | None = None  # why its map, its overlay or its regions are missing although it has a score


@dataclass(frozen=True)
class Failure:
    """Image that could not be scored, and why, in one sentence."""

    path: str
    error: str


def result_path(out: Path, folder: str, name: Path, suffix: str) -> Path:
    """Return the path of a result file of the image ``name``."""
    return out / folder / name.with_name(name.name + suffix)


def save_overlays(
    load_map: Callable[[int], np.ndarray], sources: Sequence[tuple[Path, Path]], recipe: Recipe,
    colours: tuple[float, float], out: Path, errors: tuple[type[BaseException], ...] = (),
) -> dict[int, str]:  # fmt: skip
    """Write the heat maps laid over the original images.

    Args:
        load_map: Function that returns a map by its index.
        sources: Path and result name of each image.
        recipe: Recipe of the detector, which defines the part of an image that the map covers.
        colours: Map values of the coldest and the hottest colour.
        out: Folder for the results.
        errors: Types of errors that concern one image. Its overlay is then missing, and the others are written.

    Returns:
        One sentence for each overlay that could not be written, by index.
    """
    low, high = colours

    def save(index: int) -> None:
        path, name = sources[index]
        with images.reserve_memory(path):
            image = to_levels(
                images.read_image(show_view(path, recipe.image_views), bits=recipe.bits, window=recipe.window)
            )
            image = large_maps.reduce_blocks(image, large_maps.find_reduction(image.shape[:2]), "mean")
        top, left, height, width = map_extent(image.shape[:2], recipe)
        heat = np.zeros(image.shape[:2], np.float32)
        scaled = (load_map(index) - low) / max(high - low, 1e-12)
        heat[top : top + height, left : left + width] = heatmaps.resize_map(scaled, (height, width))
        heatmaps.save_png(result_path(out, "overlays", name, ".png"), large_maps.draw_overlay(image, heat))

    failed: dict[int, str] = {}
    threads = 1 if recipe.tile is not None else min(4, os.cpu_count() or 1)  # each holds a full-size image
    with ThreadPoolExecutor(threads) as pool:
        for index, future in enumerate([pool.submit(save, index) for index in range(len(sources))]):
            try:
                future.result()
            except errors as error:
                failed[index] = describe_image_error(str(sources[index][0]), error)
    return failed


def describe_maps(maps: str, top: float, recipe: Recipe) -> dict[str, Any]:
    """Return what a reader of the map files needs: format, size, range and scale."""
    size = "as the image" if recipe.tile is not None else list(recipe.map_out)
    description: dict[str, Any] = {"format": maps, "size": size, "range": [0.0, top]}
    if maps == "tiff16":
        description["scale"] = top / 65535  # anomaly value = stored integer x scale
    return description


def save_scale(out: Path, maps: str, top: float, recipe: Recipe, listing: Mapping[str, Any]) -> None:
    """Write ``maps/scale.json``, the description of map files where no scores.json has it.

    Args:
        out: Folder for the results.
        maps: Format of the maps.
        top: Largest map value.
        recipe: Recipe of the detector.
        listing: Further content: where the map files are listed.
    """
    description = {**describe_maps(maps, top, recipe), **listing}
    with replace_file(out / SCALE) as file:
        file.write((json.dumps(description, indent=1) + "\n").encode())


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
    values |= {"map": prediction.map, "overlay": prediction.overlay, "error": prediction.error}
    always = () if has_score else ("score", "p_value")
    return {key: value for key, value in values.items() if value is not None or key in always}


def save_scores(
    out: Path, predictions: Sequence[Prediction | Failure], description: dict[str, Any], earlier: Collection[str] = (),
    remove: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write ``scores.csv``, ``scores.json`` and, with decisions, ``regions.csv``, all at once.

    Files of an earlier run that this run does not write are removed, so that every file belongs to the scores beside
    it.

    Args:
        out: Folder for the results, locked by the caller.
        predictions: Predictions in order. Each image that could not be scored has a line as well, with its error.
        description: Further content of scores.json; "threshold" and "calibration" determine the columns.
        earlier: Files of an earlier run, see `list_earlier_results`.
        remove: Names of other files in ``out`` to remove at the same moment.
    """
    flags, decided = description["threshold"] is not None, description["calibration"] is not None
    columns = [*(["flagged"] if flags else []), *(["p_value", "decision", "regions"] if decided else [])]
    failed = any(prediction.error is not None for prediction in predictions)  # only then is there a column of errors
    lines: list[list[Any]] = [["path", "score", *columns, *(["error"] if failed else [])]]
    regions: list[list[Any]] = [["path", "region", *REGION_COLUMNS]]
    scored = [prediction for prediction in predictions if isinstance(prediction, Prediction)]
    for prediction in predictions:
        if isinstance(prediction, Failure):
            lines.append([prediction.path, *[None] * (1 + len(columns)), prediction.error])
            continue
        line: list[Any] = [prediction.path, Rounded(prediction.score)]
        line += [_to_cell(prediction.flagged)] if flags else []
        if (decision := prediction.decision) is not None:
            line += [Rounded(decision.p_value), decision.label]
            line.append(None if decision.defect is None else len(decision.regions or ()))
            for number, region in enumerate(decision.regions or (), 1):
                regions.append([prediction.path, number, *region.to_dict().values()])
        lines.append([*line, *([prediction.error] if failed else [])])
    written = {name for prediction in scored for name in (prediction.map, prediction.overlay) if name is not None}
    if stale := set(earlier) - written - {"regions.csv"}:
        if list_unfinished(out, COMMAND) is None:
            begin(out, earlier)
        remove_files(out, stale)
    removed = [name_mark(COMMAND), *(["regions.csv"] if "regions.csv" in earlier and not decided else []), *remove]
    with replace_files(out, remove=removed) as staging:
        (staging / "scores.csv").write_bytes(format_table(lines))
        if decided:
            (staging / "regions.csv").write_bytes(format_table(regions))
        content = {**description, "images": [to_json_row(prediction) for prediction in scored]}
        (staging / "scores.json").write_bytes((json.dumps(content, indent=1) + "\n").encode())


def _to_cell(flag: bool | None) -> int | None:
    return None if flag is None else int(flag)


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
        images = parse_json(read_bytes(out / "scores.json", "a list of results", LARGEST_LIST))["images"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return images if isinstance(images, list) and all(isinstance(image, dict) for image in images) else None
