"""Files in; scores, decisions, anomaly maps and heat-map overlays out."""

import csv
import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import recontrast
from recontrast.data import images, pictures
from recontrast.data.atomic import replacing
from recontrast.engine import checkpoint as checkpoints
from recontrast.engine.device import choose
from recontrast.engine.infer import highest, infer
from recontrast.engine.recipes import Recipe, pair

Maps = Literal["tiff16", "tiff32", "npy", "none"]
SUFFIX = {"tiff16": ".tiff", "tiff32": ".tiff", "npy": ".npy"}


@dataclass(frozen=True)
class Prediction:
    """One image; the paths of its results are relative to the output folder, None where they were not asked for."""

    path: str
    score: float
    flagged: bool | None  # None without a threshold
    map: str | None
    overlay: str | None


@dataclass(frozen=True)
class Report:
    """All predictions, and for each file that could not be read one sentence that names it."""

    predictions: list[Prediction]
    unread: list[str]


def predict(
    checkpoint: Path,
    inputs: Sequence[Path],
    out: Path,
    *,
    maps: Maps = "none",
    overlays: bool = True,
    threshold: float | None = None,
    device: str | None = None,
    batch: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Score images and write ``scores.csv``, ``scores.json``, ``maps/`` and ``overlays/`` below ``out``.

    A file that cannot be read is left out and reported; every file that is written is whole.

    Args:
        checkpoint: what training wrote.
        inputs: image files, or folders that are searched for images to the bottom.
        out: folder for the results.
        maps: ``"tiff16"`` (uint16 over the range that scores.json states), ``"tiff32"`` or ``"npy"`` (float32), or
            ``"none"``; in the size of the model's input.
        overlays: write heat maps over the images as PNG, in the size of the original. All share one range of
            colours, which scores.json states: from the median to the largest map value of this run, or, where a
            threshold on the maximum is given, with the threshold in the middle.
        threshold: flag images whose score is at least this.
        device: torch device; None: the GPU where there is one.
        batch: images at once.
        on_progress: called with the number of images done and of all.

    Returns:
        What was written, and what could not be read.

    Raises:
        ValueError: a wrong option, nothing to read, or nothing that could be read.
        OSError: an input does not exist, or a result cannot be written.
    """
    if maps not in (*SUFFIX, "none"):
        raise ValueError(f"predict: maps: wanted tiff16, tiff32, npy or none, got {maps!r}")
    if batch < 1:
        raise ValueError(f"predict: batch: wanted at least 1 image, got {batch}")
    pool = ThreadPoolExecutor()
    files = _Files(images.list_images(inputs), pool)
    names = result_names(files.paths)
    model, recipe, about = checkpoints.load_model(checkpoint, choose(device))
    files.recipe = recipe
    top = highest(model, recipe)
    kept: list[int] = []  # places of the files that could be read
    scores: list[float] = []
    out.mkdir(parents=True, exist_ok=True)
    with pool, tempfile.TemporaryFile(dir=out) as waiting:  # maps wait here, not in memory, until their range is known
        place = 0
        for found, score in infer(model, files, recipe, batch=batch):
            for anomaly, value in zip(found.cpu().numpy(), score.tolist(), strict=True):
                if place not in files.unread:
                    kept.append(place)
                    scores.append(value)
                    if maps != "none":
                        pictures.save_map(_below(out, "maps", names[place], SUFFIX[maps]), anomaly, maps, top)
                    if overlays:
                        _append(waiting, anomaly, out)
                place += 1
            if on_progress is not None:
                on_progress(place, len(files))
        unread = [files.unread[place] for place in sorted(files.unread)]  # threads note them in any order
        if not kept:
            raise ValueError(f"none of {len(files)} images could be read: {unread[0]}")
        colours = None
        if overlays:
            stored = np.memmap(waiting, np.float32, "r", shape=(len(kept), *recipe.out))
            colours = _range(stored, threshold if recipe.score == "max" else None)
            _save_overlays(stored, [(files.paths[i], names[i]) for i in kept], recipe, colours, out)
    predictions = [
        Prediction(
            str(files.paths[i]),
            score,
            None if threshold is None else score >= threshold,
            None if maps == "none" else _below(Path(), "maps", names[i], SUFFIX[maps]).as_posix(),
            _below(Path(), "overlays", names[i], ".png").as_posix() if overlays else None,
        )
        for i, score in zip(kept, scores, strict=True)
    ]
    _save_scores(out, predictions, {
        "recontrast": recontrast.__version__,
        "checkpoint": str(checkpoint),
        "trained_on": about.category,
        "score": recipe.score,
        "threshold": threshold,
        "maps": None if maps == "none" else describe(maps, top, recipe),
        "overlay_range": colours,
        "unread": unread,
    })  # fmt: skip
    return Report(predictions, unread)


def result_names(paths: Sequence[Path]) -> list[Path]:
    """Where results go below the output folder: no two in one place.

    Folders below the one that all files share are kept, and so is a file's suffix where the names differ in nothing
    else (``a.png``, ``a.jpg``).
    """
    full = [Path(os.path.abspath(path)) for path in paths]
    shared = os.path.commonpath([path.parent for path in full])
    relative = [path.relative_to(shared) for path in full]
    count = Counter(path.with_suffix("") for path in relative)
    names = [path if count[path.with_suffix("")] > 1 else path.with_suffix("") for path in relative]
    return names if len(set(names)) == len(names) else relative


class _Files:
    """Image files, read when they are indexed; a bad one is noted, and black in place of what it should show."""

    recipe: Recipe

    def __init__(self, paths: Sequence[Path], pool: ThreadPoolExecutor) -> None:
        unique = {os.path.abspath(path): path for path in reversed(paths)}  # a file that is named twice is one
        self.paths = list(reversed(unique.values()))
        self.unread: dict[int, str] = {}
        self.pool = pool

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.stack(list(self.pool.map(self._read, index)))

    def _read(self, place: int) -> np.ndarray:
        try:
            return images.read_image(self.paths[place], size=self.recipe.size, crop=self.recipe.crop)
        except OSError as error:
            self.unread[place] = f"{self.paths[place]}: {error.strerror or error}"
        except ValueError as error:
            self.unread[place] = str(error)
        return np.zeros((*self.recipe.out, 3), np.uint8)


def _below(out: Path, folder: str, name: Path, suffix: str) -> Path:
    return out / folder / name.with_name(name.name + suffix)


def _append(waiting: Any, anomaly: np.ndarray, out: Path) -> None:
    try:
        waiting.write(np.ascontiguousarray(anomaly, np.float32).data)
        waiting.flush()
    except OSError as error:
        raise OSError(f"cannot write below {out}: {error.strerror or error}") from error


def _range(stored: np.ndarray, threshold: float | None) -> tuple[float, float]:
    """Map values of the coldest and of the hottest colour."""
    low = float(np.median([np.median(anomaly) for anomaly in stored]))
    if threshold is not None and threshold > low:
        return low, 2 * threshold - low
    return low, max(float(anomaly.max()) for anomaly in stored)


def _save_overlays(
    stored: np.ndarray, sources: Sequence[tuple[Path, Path]], recipe: Recipe, colours: tuple[float, float], out: Path
) -> None:
    low, high = colours

    def save(place: int) -> None:
        path, name = sources[place]
        image = images.read_image(path)
        top, left, height, width = covered(image.shape[:2], recipe)
        heat = np.zeros(image.shape[:2], np.float32)
        warm = pictures.stretch((stored[place] - low) / max(high - low, 1e-12), (height, width))
        heat[top : top + height, left : left + width] = warm
        pictures.save_png(_below(out, "overlays", name, ".png"), pictures.overlay(image, heat))

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # few: each holds an image in full size
        for done in [pool.submit(save, place) for place in range(len(sources))]:
            done.result()


def covered(shape: Sequence[int], recipe: Recipe) -> tuple[int, int, int, int]:
    """The part of an original image of ``shape`` (H, W) that the map stands for: top, left, height, width."""
    found = []
    for length, resized, seen in zip(shape, pair(recipe.size), recipe.out, strict=True):
        start = round(round((resized - seen) / 2) * length / resized)
        found.append((start, min(max(round(seen * length / resized), 1), length - start)))
    (top, height), (left, width) = found
    return top, left, height, width


def describe(maps: str, top: float, recipe: Recipe) -> dict[str, Any]:
    """What a reader of the map files must know."""
    about: dict[str, Any] = {"format": maps, "size": list(recipe.out), "range": [0.0, top]}
    if maps == "tiff16":
        about["scale"] = top / 65535  # anomaly value = stored integer x scale
    return about


def _save_scores(out: Path, predictions: Sequence[Prediction], about: dict[str, Any]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    flags = about["threshold"] is not None
    writer.writerow(["path", "score", *(["flagged"] if flags else [])])
    for found in predictions:
        writer.writerow([found.path, f"{found.score:.9g}", *([int(bool(found.flagged))] if flags else [])])
    with replacing(out / "scores.csv") as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))
    rows = []
    for found in predictions:
        row = {"path": found.path, "score": float(f"{found.score:.9g}"), "flagged": found.flagged}
        row |= {"map": found.map, "overlay": found.overlay}
        rows.append({key: value for key, value in row.items() if value is not None})
    with replacing(out / "scores.json") as file:
        file.write((json.dumps({**about, "images": rows}, indent=1) + "\n").encode())
