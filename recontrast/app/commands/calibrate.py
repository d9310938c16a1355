"""``recontrast calibrate``: set the threshold from good images that the detector was not trained on."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recontrast.app.console import print_data, print_error, print_line
from recontrast.app.options import (
    AllGood,
    Batch,
    DetectorFile,
    Device,
    Precision,
    Views,
    build_inference_options,
    check_writable,
    path_option,
    resolve_checkpoint,
)
from recontrast.app.progress_bar import ProgressBar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from recontrast.calibration.appearance_drift import AppearanceDrift
    from recontrast.calibration.conformal import Calibration
    from recontrast.calibration.score_drift import ScoreDrift
    from recontrast.inference.detector import Detector


def calibrate(  # 10 options and their checks; `calibrate_job` does the work
    context: typer.Context,
    checkpoint: DetectorFile,
    good: Annotated[
        list[Path] | None,
        path_option(
            help="Good images that were not trained on, or a folder of them; several: --good A --good B. "
            "Not needed for --check alone."
        ),
    ] = None,
    false_alarm_rate: Annotated[
        float, typer.Option(help="Promised share of good images called defects; at least 1/(n + 1) for n images.")
    ] = 0.01,
    pixel_rate: Annotated[float, typer.Option(help="Promised share of a good image's map that is flagged.")] = 0.01,
    check: Annotated[
        list[Path] | None,
        path_option(
            help="Other good images or a folder, compared with the calibration images; several: --check A --check B."
        ),
    ] = None,
    all_good: AllGood = False,
    views: Views = None,
    precision: Precision = None,
    batch: Batch = 16,
    device: Device = None,
) -> None:
    """Set the threshold that keeps a promised false-alarm rate, and save it in the checkpoint or exported file."""
    if batch < 1:
        raise ValueError(f"--batch: wanted at least 1 image, got {batch}")
    if not good and not check:
        raise ValueError("--good: wanted good images to calibrate with (or --check alone, to compare), got none")
    from recontrast.app.calibrate_job import calibrate_detector, open_target
    from recontrast.calibration.conformal import allowed_false_alarms, check_rates
    from recontrast.data.class_folders import describe_files, list_good_images
    from recontrast.data.locks import lock_checkpoint
    from recontrast.inference.calibrate import select_new_images

    check_rates(false_alarm_rate, pixel_rate)
    inference = build_inference_options(device, views, precision)
    file = resolve_checkpoint(checkpoint)
    if good and file.is_file():  # a missing file has its own message
        check_writable(file.parent, "DETECTOR")
        context.with_resource(lock_checkpoint(file))
    good_paths, check_paths = (list_good_images(folders or [], all_good) for folders in (good, check))
    if shared := {os.path.realpath(path) for path in good_paths} & {os.path.realpath(path) for path in check_paths}:
        raise ValueError(f"--check: wanted other images than those of --good, got {len(shared)} of them again")
    if good:
        allowed_false_alarms(len(good_paths), false_alarm_rate)  # checked before the model is built
    target = open_target(file, device, inference)
    print_data([*describe_files("--good", good_paths), *describe_files("--check", check_paths)])
    good_paths = select_new_images("--good", good_paths, target)
    if good:
        allowed_false_alarms(len(good_paths), false_alarm_rate)  # again, without copies
    check_paths = select_new_images("--check", check_paths, target)
    errors: list[str] = []
    detector = target.open(calibrated=not good)
    calibration = detector.calibration
    if good:
        with ProgressBar("calibrate") as progress:
            calibration, errors = calibrate_detector(
                target, detector, good_paths, false_alarm_rate=false_alarm_rate, pixel_rate=pixel_rate,
                source=", ".join(map(str, good)), batch=batch, on_progress=progress,
            )  # fmt: skip
        former_count = 0 if target.calibration is None else target.calibration.count
        target.store(calibration)
        _print_calibration(file, calibration, former_count)
    if calibration is None:
        raise ValueError(
            detector.calibration_note
            or f"{file}: wanted a calibration to compare with, got none: create one with --good DIR"
        )
    if check_paths:
        errors += _compare(detector, calibration, check_paths, batch)
    for text in errors:
        print_error(text)
    if errors:
        raise typer.Exit(2)


def _print_calibration(file: Path, calibration: "Calibration", former_count: int) -> None:
    """Print what the calibration promises, where it is stored, and what it needs."""
    from recontrast.calibration.conformal import describe_promise

    for line in describe_promise(calibration):
        print_line(line)
    replaced = f", replaces one from {former_count} images" if former_count > calibration.count else ""
    print_line(f"calibration: {file}{replaced}")
    if calibration.views is not None:
        options = f"--views {calibration.views} --precision {calibration.precision}"
        print_line(f"it is valid for {options} only: pass them to predict and evaluate as well")


def _compare(detector: "Detector", calibration: "Calibration", paths: "Sequence[Path]", batch: int) -> list[str]:
    """Print whether other good images are like the calibration images; return one message per unreadable file."""
    import numpy as np

    from recontrast.calibration.appearance_drift import measure_appearance_drift
    from recontrast.calibration.score_drift import measure_score_drift
    from recontrast.inference.calibrate import score_files

    scores, appearance, errors = score_files(detector, paths, batch)
    drifts: list[AppearanceDrift | ScoreDrift] = [measure_score_drift(calibration, scores)]
    if calibration.appearance:  # older calibrations have none
        drifts.append(measure_appearance_drift(np.asarray(calibration.appearance), appearance))
    for drift in drifts:
        if drift.is_significant:
            print_error(f"warning: {drift.describe()}")
        else:
            print_line(drift.describe())
    return errors
