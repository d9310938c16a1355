"""What a prediction leaves on the disk: scores, regions, maps and overlays, each file whole or not at all."""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from recontrast.data import heatmaps, images, large_maps
from recontrast.data.atomic import replace_file
from recontrast.inference.decisions import REGION_COLUMNS, Decision
from recontrast.inference.detector import map_extent
from recontrast.recipes.recipe import Recipe

SUFFIX = {"tiff16": ".tiff", "tiff32": ".tiff", "npy": ".npy"}


@dataclass(frozen=True)
class Prediction:
    """One image; the paths of its results are relative to the output folder, None where they were not asked for."""

    path: str
    score: float
    flagged: bool | None  # None without a threshold
    map: str | None
    overlay: str | None
    decision: Decision | None = None  # None without a calibration


class Waiting:
    """Maps on the disk until the range of their colours is known; they may differ in size."""

    def __init__(self, file: Any, out: Path) -> None:
        """``file`` is temporary and lies below ``out``."""
        self.file, self.out = file, out
        self.places: list[tuple[int, tuple[int, ...]]] = []
        self._end = 0

    def append(self, anomaly: np.ndarray) -> None:
        """Keep one map, (H, W)."""
        try:
            self.file.write(np.ascontiguousarray(anomaly, np.float32).data)
            self.file.flush()
        except OSError as error:
            raise OSError(f"cannot write below {self.out}: {error.strerror or error}") from error
        self.places.append((self._end, anomaly.shape))
        self._end += 4 * anomaly.size

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> np.ndarray:
        """One map, as a memory map; IndexError after the last, so that a loop ends."""
        start, shape = self.places[place]
        return np.memmap(self.file, np.float32, "r", start, shape)


def below(out: Path, folder: str, name: Path, suffix: str) -> Path:
    """Where a result of ``name`` goes."""
    return out / folder / name.with_name(name.name + suffix)


def save_overlays(
    stored: Any, sources: Sequence[tuple[Path, Path]], recipe: Recipe, colours: tuple[float, float], out: Path
) -> None:
    """Write heat maps over the originals.

    Args:
        stored: maps by place.
        sources: path and result name of each.
        recipe: says which part of an image the map stands for.
        colours: as `recontrast.data.heatmaps.colour_range` gives it.
        out: folder for the results.
    """
    low, high = colours

    def save(place: int) -> None:
        path, name = sources[place]
        image = images.read_image(path)
        image = large_maps.reduce_blocks(image, large_maps.find_reduction(image.shape[:2]), "mean")
        top, left, height, width = map_extent(image.shape[:2], recipe)
        heat = np.zeros(image.shape[:2], np.float32)
        warm = (stored[place] - low) / max(high - low, 1e-12)
        heat[top : top + height, left : left + width] = heatmaps.resize_map(warm, (height, width))
        heatmaps.save_png(below(out, "overlays", name, ".png"), large_maps.draw_overlay(image, heat))

    few = 1 if recipe.tile is not None else min(4, os.cpu_count() or 1)  # each holds an image in full size
    with ThreadPoolExecutor(few) as pool:
        for done in [pool.submit(save, place) for place in range(len(sources))]:
            done.result()


def describe(maps: str, top: float, recipe: Recipe) -> dict[str, Any]:
    """What a reader of the map files must know."""
    size = "as the image" if recipe.tile is not None else list(recipe.out)
    about: dict[str, Any] = {"format": maps, "size": size, "range": [0.0, top]}
    if maps == "tiff16":
        about["scale"] = top / 65535  # anomaly value = stored integer x scale
    return about


def save_map(path: Path, anomaly: np.ndarray, kind: str, top: float, recipe: Recipe) -> None:
    """Write one map; those of whole images at their own scale as tiles. Arguments as `pictures.save_map` takes them."""
    (heatmaps.save_map if recipe.tile is None else large_maps.save_map)(path, anomaly, kind, top)


def row(found: Prediction) -> dict[str, Any]:
    """One image as scores.json holds it."""
    values: dict[str, Any] = {"path": found.path, "score": float(f"{found.score:.9g}"), "flagged": found.flagged}
    if (made := found.decision) is not None:
        values |= {"p_value": made.p_value, "decision": made.label}
        values["regions"] = None if made.regions is None else [region.to_dict() for region in made.regions]
    values |= {"map": found.map, "overlay": found.overlay}
    return {key: value for key, value in values.items() if value is not None}


def save_scores(out: Path, predictions: Sequence[Prediction], about: dict[str, Any]) -> None:
    """Write ``scores.csv``, ``scores.json`` and, where there are decisions, ``regions.csv``.

    Maps, overlays and regions of a finished former run that this one does not write are removed at the end: no file
    stands beside scores that it does not belong to.

    Args:
        out: folder for the results.
        predictions: in order.
        about: what else scores.json says; "threshold" and "calibration" decide the columns.
    """
    flags, decided = about["threshold"] is not None, about["calibration"] is not None
    lines = [
        ["path", "score", *(["flagged"] if flags else []), *(["p_value", "decision", "regions"] if decided else [])]
    ]
    regions: list[list[Any]] = [["path", "region", *REGION_COLUMNS]]
    for found in predictions:
        line = [found.path, f"{found.score:.9g}", *([str(int(bool(found.flagged)))] if flags else [])]
        if (made := found.decision) is not None:
            line += [f"{made.p_value:.9g}", made.label, str(len(made.regions or ()))]
            for number, region in enumerate(made.regions or (), 1):
                regions.append([found.path, number, *region.to_dict().values()])
        lines.append(line)
    stale = _of_former(out / "scores.json") - {name for found in predictions for name in (found.map, found.overlay)}
    _save_csv(out / "scores.csv", lines)
    if decided:
        stale -= {"regions.csv"}
        _save_csv(out / "regions.csv", regions)
    with replace_file(out / "scores.json") as file:
        file.write((json.dumps({**about, "images": [row(found) for found in predictions]}, indent=1) + "\n").encode())
    for old in stale:
        with suppress(OSError, ValueError):  # it is gone, or was never a file
            (out / old).unlink()
        for folder in (out / old).parents[: len(Path(old).parents) - 1]:
            with suppress(OSError, ValueError):  # there is more in it
                folder.rmdir()


def _of_former(scores: Path) -> set[str]:
    """Files that a finished former run says it wrote, relative to the folder; nothing else is ever removed."""
    try:
        images = json.loads(scores.read_bytes())["images"]
        names = [image[key] for image in images for key in ("map", "overlay") if key in image]
        parts = {name: PurePosixPath(name).parts for name in names}
        decided = any("decision" in image for image in images)
    except (OSError, ValueError, KeyError, TypeError):  # none, or not ours
        return set()
    ours = {name for name, path in parts.items() if path[:1] in (("maps",), ("overlays",)) and ".." not in path}
    return ours | ({"regions.csv"} if decided else set())


def _save_csv(path: Path, lines: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    with replace_file(path) as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))
