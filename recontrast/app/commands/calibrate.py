"""``recontrast calibrate``: a threshold with a promise, from good images that the detector was not trained on."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from recontrast.app.console import ProgressBar, print_error
from recontrast.app.options import (
    Batch,
    CheckpointFile,
    Device,
    Precision,
    Views,
    build_inference_options,
    check_writable,
    resolve_checkpoint,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from recontrast.calibration.appearance_drift import AppearanceDrift
    from recontrast.calibration.conformal import Calibration
    from recontrast.calibration.score_drift import ScoreDrift
    from recontrast.inference.detector import CheckpointDetector


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
    from recontrast import checkpoint as checkpoints
    from recontrast.app.calibrate_job import calibrate_detector
    from recontrast.calibration.conformal import allowed_false_alarms, describe_promise
    from recontrast.data.listing import list_images
    from recontrast.inference.calibrate import refuse_training_images
    from recontrast.inference.detector import CheckpointDetector

    file = resolve_checkpoint(checkpoint)
    if good and file.is_file():  # else that it is missing is what to say
        check_writable(file.parent, "CHECKPOINT")
    known, new = list_images(good or []), list_images(check or [])
    if shared := {os.path.realpath(path) for path in known} & {os.path.realpath(path) for path in new}:
        raise ValueError(f"--check: wanted other images than those of --good, got {len(shared)} of them again")
    if good:
        allowed_false_alarms(len(known), false_alarm_rate)  # before a model is built
    how = build_inference_options(device, views, precision)
    stored = checkpoints.load(file, mapped=True)
    for option, paths in (("--good", known), ("--check", new)):
        refuse_training_images(option, paths, stored)
    unread: list[str] = []
    detector = CheckpointDetector(file, device, inference=how, calibrated=not good)
    found = detector.calibration
    if good:
        with ProgressBar("calibrate") as shown:
            found, unread = calibrate_detector(
                detector, stored, known, false_alarm_rate=false_alarm_rate, pixel_rate=pixel_rate,
                source=", ".join(map(str, good)), inference=how, batch=batch, on_progress=shown,
            )  # fmt: skip
        checkpoints.write_calibration(file, found)
        for line in describe_promise(found):
            typer.echo(line)
        before = 0 if stored.calibration is None else stored.calibration.count
        typer.echo(f"calibration: {file}" + f", replaces one from {before} images" * (before > found.count))
        if found.views is not None:
            typer.echo(f"it decides with --views {found.views} --precision {found.precision} alone: predict and "
                       "evaluate take them too")  # fmt: skip
    if found is None:
        raise ValueError(
            detector.calibration_note or f"{file}: wanted a calibration to compare with, got none: --good DIR makes one"
        )
    if new:
        unread += _compare(detector, found, new, batch)
    for text in unread:
        print_error(text)
    if unread:
        raise typer.Exit(2)


def _compare(detector: "CheckpointDetector", known: "Calibration", paths: "Sequence[Path]", batch: int) -> list[str]:
    """Say whether other good images are like those of a calibration; a sentence for each file that cannot be read."""
    from recontrast.calibration.appearance_drift import measure_appearance_drift
    from recontrast.calibration.score_drift import measure_score_drift
    from recontrast.inference.calibrate import score_files

    scores, looks, unread = score_files(detector, paths, batch)
    found: list[AppearanceDrift | ScoreDrift] = [measure_score_drift(known, scores)]
    if known.appearance:  # older calibrations have none
        found.append(measure_appearance_drift(np.asarray(known.appearance), looks))
    for seen in found:
        if seen.is_significant:
            print_error(f"warning: {seen.describe()}")
        else:
            typer.echo(seen.describe())
    return unread
