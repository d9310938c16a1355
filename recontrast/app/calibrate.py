"""``recontrast calibrate``: a threshold with a promise, from good images that the detector was not trained on."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from recontrast.app.console import Steps, complain
from recontrast.app.options import Batch, CheckpointFile, Device, Precision, Views, checkpoint_file, inference, writable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from recontrast.data.inputs import Inputs
    from recontrast.engine.calibrate import Calibration
    from recontrast.engine.checkpoint import Checkpoint
    from recontrast.engine.detector import Scored, Torch
    from recontrast.engine.looks import Change
    from recontrast.engine.uniformity import Departure


def calibrate(
    checkpoint: CheckpointFile,
    good: Annotated[
        list[Path] | None,
        typer.Option(
            help="Good images that were not trained on, or a folder of them; several: --good A --good B. "
            "Left out: --check alone, by the calibration that is there."
        ),
    ] = None,
    false_alarm_rate: Annotated[
        float, typer.Option(help="Promised share of good images called defects; at least 1/(n + 1) of n images.")
    ] = 0.01,
    pixel_rate: Annotated[float, typer.Option(help="Share of a good image's map that may be flagged.")] = 0.01,
    check: Annotated[
        list[Path] | None,
        typer.Option(
            help="Other good images, or a folder: do they still look like these? Several: --check A --check B."
        ),
    ] = None,
    views: Views = None,
    precision: Precision = None,
    batch: Batch = 16,
    device: Device = None,
) -> None:
    """Set the threshold that keeps a promised false-alarm rate, and save it in the checkpoint."""
    if batch < 1:
        raise ValueError(f"--batch: wanted at least 1 image, got {batch}")
    if not good and not check:
        raise ValueError("--good: wanted good images to calibrate with (or --check alone, to compare), got none")
    from recontrast.data.files import list_images
    from recontrast.engine import checkpoint as checkpoints
    from recontrast.engine.calibrate import allowed, digest, statement
    from recontrast.engine.detector import Torch

    file = checkpoint_file(checkpoint)
    if good and file.is_file():  # else that it is missing is what to say
        writable(file.parent, "CHECKPOINT")
    known, new = list_images(good or []), list_images(check or [])
    if shared := {os.path.realpath(path) for path in known} & {os.path.realpath(path) for path in new}:
        raise ValueError(f"--check: wanted other images than those of --good, got {len(shared)} of them again")
    if good:
        allowed(len(known), false_alarm_rate)  # before a model is built
    how = inference(device, views, precision)
    stored = checkpoints.load(file, mapped=True)
    for option, paths in (("--good", known), ("--check", new)):
        _refuse_trained(option, paths, stored)
    unread: list[str] = []
    detector = Torch(file, device, inference=how, calibrated=not good)
    found = detector.calibration
    if good:
        with Steps("calibrate") as shown:
            found, unread = _calibrated(
                detector, known, batch, shown, rate=false_alarm_rate, pixel_rate=pixel_rate,
                source=", ".join(map(str, good)), weights=digest(stored.model, stored.recipe),
            )  # fmt: skip
        if not how.scores_alike(stored.recipe):
            recipe = detector.recipe
            found = replace(found, views=recipe.views, precision=recipe.precision)
        checkpoints.calibrated(file, found)
        for line in statement(found):
            typer.echo(line)
        before = 0 if stored.calibration is None else stored.calibration.count
        typer.echo(f"calibration: {file}" + f", replaces one from {before} images" * (before > found.count))
        if found.views is not None:
            typer.echo(f"it decides with --views {found.views} --precision {found.precision} alone: predict and "
                       "evaluate take them too")  # fmt: skip
    if found is None:
        raise ValueError(
            detector.lost or f"{file}: wanted a calibration to compare with, got none: --good DIR makes one"
        )
    if new:
        unread += _compare(detector, found, new, batch)
    for text in unread:
        complain(text)
    if unread:
        raise typer.Exit(2)


def _compare(detector: "Torch", known: "Calibration", paths: "Sequence[Path]", batch: int) -> list[str]:
    """Say whether other good images are like those of a calibration; a sentence for each file that cannot be read."""
    from recontrast.engine.looks import change
    from recontrast.engine.uniformity import departure

    scores, looks, unread = _scores(detector, paths, batch)
    found: list[Change | Departure] = [departure(known, scores)]
    if known.looks:  # older calibrations have none
        found.append(change(np.asarray(known.looks), looks))
    for seen in found:
        if seen.far:
            complain(f"warning: {seen.sentence()}")
        else:
            typer.echo(seen.sentence())
    return unread


def _refuse_trained(option: str, paths: "Sequence[Path]", stored: "Checkpoint") -> None:
    """A detector scores the images of its training lower than any others; of older checkpoints they are unknown."""
    from recontrast.data.inputs import Inputs
    from recontrast.data.tiles import Tiles
    from recontrast.engine.batches import fingerprint, fingerprints

    recipe, trained = stored.recipe, fingerprints(stored.images)
    if not trained:
        return
    files = Inputs(paths)

    def seen(place: int) -> bool:
        if recipe.tile is None:
            pixels = files.read(place, recipe.size, recipe.crop)
            return pixels is not None and fingerprint(pixels) in trained
        pixels = files.read(place)
        if pixels is None:  # said when it is to be scored
            return False
        tiles = Tiles(pixels, recipe.tile, recipe.stride or recipe.tile)
        return fingerprint(tiles[range(len(tiles))]) in trained

    with ThreadPoolExecutor(1 if recipe.tile is not None else None) as pool:  # whole images may be large
        found = [files.paths[place] for place, was in enumerate(pool.map(seen, range(len(files)))) if was]
    if found:
        raise ValueError(
            f"{option}: wanted good images that were not trained on, got {len(found)} of {len(files)} that were "
            f"(first: {found[0]})"
        )


def _calibrated(
    detector: "Torch", paths: "Sequence[Path]", batch: int, shown: Steps, **options: Any
) -> "tuple[Calibration, list[str]]":
    """The calibration by all images that can be read, and a sentence for each other file."""
    from recontrast.data.inputs import Inputs
    from recontrast.engine.calibrate import from_maps

    unread: list[str] = []
    with ThreadPoolExecutor() as pool:
        while True:  # again where files could not be read: how many there are decides what is kept
            files = Inputs(paths, pool)

            def run(files: "Inputs" = files) -> "Iterator[Scored]":
                done = 0
                for maps, scores in detector.run(files, batch):
                    yield maps, scores
                    done += len(scores)
                    shown(done, len(files))

            found = from_maps(run(), len(files), **options)
            seen = _looks(detector, files)  # may find that a file cannot be read any more
            if not files.unread:
                return replace(found, looks=tuple(map(tuple, seen.tolist()))), unread
            unread += [files.unread[place] for place in sorted(files.unread)]
            paths = [path for place, path in enumerate(files.paths) if place not in files.unread]
            if not paths:
                raise ValueError(f"none of {len(unread)} images could be read: {unread[0]}")


def _looks(detector: "Torch", files: "Inputs") -> "NDArray[np.float64]":
    """Of each file, read once more, in the size of the recipe."""
    from recontrast.engine.looks import looks

    return looks(files.resized(detector.recipe.size, detector.recipe.crop))


def _scores(
    detector: "Torch", paths: "Sequence[Path]", batch: int
) -> "tuple[list[float], NDArray[np.float64], list[str]]":
    """Scores and looks of all images that can be read, and a sentence for each other file."""
    from recontrast.data.inputs import Inputs

    with ThreadPoolExecutor() as pool:
        files = Inputs(paths, pool)
        scores = [score for _, some in detector.run(files, batch) for score in some.tolist()]
        seen = _looks(detector, files)
    kept = [place for place in range(len(scores)) if place not in files.unread]
    return [scores[place] for place in kept], seen[kept], [files.unread[place] for place in sorted(files.unread)]
