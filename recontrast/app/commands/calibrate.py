"""``recontrast calibrate``: set the threshold from good images that the detector was not trained on."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recontrast.app.console import print_data, print_error, print_line, print_promise, print_warning
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
    from collections.abc import Mapping, Sequence

    from recontrast.app.calibrate_job import CalibrationTarget
    from recontrast.calibration.appearance_drift import AppearanceDrift
    from recontrast.calibration.conformal import Calibration
    from recontrast.calibration.score_drift import ScoreDrift
    from recontrast.data.datasets import Sample
    from recontrast.inference.detector import Detector


def calibrate(  # 11 options
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
    bad: Annotated[
        list[Path] | None,
        path_option(help="Images with defects or folders of them: says how many are found. May be repeated."),
    ] = None,
    all_good: AllGood = False,
    roi: Annotated[
        Path | None,
        path_option(help="Folder with a mask for each image, for a detector that was trained with such masks."),
    ] = None,
    views: Views = None,
    precision: Precision = None,
    batch: Batch = 16,
    device: Device = None,
) -> None:
    """Set the threshold that keeps a promised false-alarm rate, and save it in the checkpoint or exported file."""
    if batch < 1:
        raise ValueError(f"--batch: wanted at least 1 image, got {batch}")
    if not good and not check and not bad:
        raise ValueError("--good: wanted good images to calibrate with (or --check alone, to compare), got none")
    from recontrast.app.calibrate_job import open_target
    from recontrast.calibration.conformal import check_rates
    from recontrast.data.locks import lock_checkpoint

    check_rates(false_alarm_rate, pixel_rate)
    inference = build_inference_options(device, views, precision)
    file = resolve_checkpoint(checkpoint)
    if good and file.is_file():  # a missing file has its own message
        check_writable(file.parent, "DETECTOR")
        context.with_resource(lock_checkpoint(file))
    target = open_target(file, device, inference, roi)
    images = _list_images(target, good or [], check or [], bad or [], all_good)
    images, noun = _select_new(images, target, false_alarm_rate), target.recipe.noun
    detector, errors = target.open(calibrated=not good), images.errors
    calibration = detector.calibration
    if images.good:
        calibration, unread = _calibrate(
            target, detector, images.good, false_alarm_rate=false_alarm_rate, pixel_rate=pixel_rate,
            source=", ".join(map(str, good or [])), batch=batch,
        )  # fmt: skip
        errors += unread
        former_count = 0 if target.calibration is None else target.calibration.count
        target.store(calibration)
        _print_calibration(file, calibration, former_count, noun)
    if calibration is None:
        raise ValueError(
            detector.calibration_note
            or f"{file}: wanted a calibration to compare with, got none: create one with --good DIR"
        )
    if images.checks:
        errors += _compare(detector, calibration, images.checks, batch)
    if images.bad:
        errors += _count_found(detector, calibration, images.bad, batch)
    for text in errors:
        print_error(text)
    if errors:
        raise typer.Exit(2)


@dataclass(frozen=True)
class _Images:
    """The images, or parts with several views, that the options give.

    Attributes:
        good: Samples of ``--good``.
        checks: Samples of ``--check``.
        bad: Paths of ``--bad``.
        errors: One sentence for each part without one of its views, which is left out.
    """

    good: "list[Sample]"
    checks: "list[Sample]"
    bad: list[Path]
    errors: list[str]


def _list_images(
    target: "CalibrationTarget", good: list[Path], check: list[Path], bad: list[Path], all_good: bool
) -> _Images:
    """List and print the images that the options give."""
    from recontrast.data.class_folders import list_good_samples
    from recontrast.data.listing import list_images
    from recontrast.data.part_samples import join_part_samples
    from recontrast.data.views import group_paths

    views, errors = target.recipe.image_views, list[str]()
    given, checks = (list_good_samples(folders, all_good, target.recipe.views_from) for folders in (good, check))
    bad_paths = list_images(bad)
    _check_different({"--good": [s.path for s in given], "--check": [s.path for s in checks], "--bad": bad_paths})
    given, checks = (join_part_samples(samples, views, errors) for samples in (given, checks))
    if good and not given:
        raise ValueError(errors[0])
    bad_paths = group_paths(bad_paths, views)
    _print_files({"--good": [s.path for s in given], "--check": [s.path for s in checks], "--bad": bad_paths})
    return _Images(given, checks, bad_paths, errors)


def _select_new(images: _Images, target: "CalibrationTarget", rate: float) -> _Images:
    """Return the images without copies; raise ValueError if some were trained on, or are too few for the rate."""
    from recontrast.calibration.conformal import allowed_false_alarms
    from recontrast.data.groups import count_groups
    from recontrast.inference.calibrate import select_new_samples

    if images.good:
        allowed_false_alarms(count_groups(images.good), rate, target.recipe.noun)  # before any image is read
    good = select_new_samples("--good", images.good, target)
    if good:
        allowed_false_alarms(count_groups(good), rate, target.recipe.noun)  # again, without copies
    return replace(images, good=good, checks=select_new_samples("--check", images.checks, target))


def _check_different(files: "Mapping[str, Sequence[Path]]") -> None:
    """Raise ValueError if an image of another option is one of ``--good`` as well."""
    real = {option: {os.path.realpath(path) for path in paths} for option, paths in files.items()}
    for option in ("--check", "--bad"):
        if shared := real["--good"] & real[option]:
            raise ValueError(f"{option}: wanted other images than those of --good, got {len(shared)} of them again")


def _print_files(files: "Mapping[str, Sequence[Path]]") -> None:
    """Print which images each option gives."""
    from recontrast.data.class_folders import describe_files

    for option, paths in files.items():
        print_data(describe_files(option, paths))


def _calibrate(
    target: "CalibrationTarget", detector: "Detector", samples: "Sequence[Sample]", **options: Any
) -> "tuple[Calibration, list[str]]":
    """Calibrate with a progress bar; ``options`` are those of `recontrast.app.calibrate_job.calibrate_detector`."""
    from recontrast.app.calibrate_job import calibrate_detector

    with ProgressBar("calibrate") as progress:
        return calibrate_detector(target, detector, samples, on_progress=progress, **options)


def _print_calibration(file: Path, calibration: "Calibration", former_count: int, noun: str) -> None:
    """Print what the calibration promises, where it is stored, and what it needs."""
    print_promise(calibration, noun)
    replaced = f", replaces one from {former_count} {noun}s" if former_count > calibration.count else ""
    print_line(f"calibration: {file}{replaced}")
    if calibration.views is not None:
        options = f"--views {calibration.views} --precision {calibration.precision}"
        print_line(f"it is valid for {options} only: pass them to predict and evaluate as well")


def _count_found(detector: "Detector", calibration: "Calibration", paths: "Sequence[Path]", batch: int) -> list[str]:
    """Print how many images with defects the threshold finds; return one message per unreadable file."""
    from recontrast.inference.calibrate import score_files

    scores, _, errors = score_files(detector, paths, batch)
    if scores:
        found = int(calibration.is_defect(scores).sum())
        print_line(
            f"{found} of {len(scores)} {detector.recipe.noun}s with defects found ({100 * found / len(scores):.1f} %)"
        )
    return errors


def _compare(detector: "Detector", calibration: "Calibration", samples: "Sequence[Sample]", batch: int) -> list[str]:
    """Print whether other good images are like the calibration images; return one message per unreadable file."""
    import numpy as np

    from recontrast.calibration.appearance_drift import measure_appearance_drift
    from recontrast.calibration.score_drift import measure_score_drift
    from recontrast.data.groups import number_samples
    from recontrast.inference.calibrate import score_files

    scores, appearance, errors = score_files(detector, [sample.path for sample in samples], batch)
    groups = number_samples(samples) if len(scores) == len(samples) else None  # without the files that cannot be read
    drifts: list[AppearanceDrift | ScoreDrift] = [measure_score_drift(calibration, scores, groups)]
    if calibration.appearance:  # older calibrations have none
        drifts.append(measure_appearance_drift(np.asarray(calibration.appearance), appearance))
    for drift in drifts:
        if drift.is_significant:
            print_warning(drift.describe(detector.recipe.noun))
        else:
            print_line(drift.describe(detector.recipe.noun))
    return errors
