"""Calibration of a checkpoint on image files, for the command line and for `recontrast.calibrate`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from recontrast.calibration.conformal import Calibration
from recontrast.checkpoint import Checkpoint, digest
from recontrast.inference.calibrate import calibrate_files
from recontrast.inference.detector import CheckpointDetector
from recontrast.inference.options import InferenceOptions


def calibrate_detector(
    detector: CheckpointDetector,
    stored: Checkpoint,
    good: Sequence[Path],
    *,
    false_alarm_rate: float,
    pixel_rate: float,
    source: str,
    inference: InferenceOptions,
    batch: int,
    on_progress: Callable[[int, int], None],
) -> tuple[Calibration, list[str]]:
    """Score good images and set both thresholds; nothing is written.

    Args:
        detector: Detector, opened with ``inference``.
        stored: Checkpoint of the detector.
        good: Paths of good images that the detector was not trained on.
        false_alarm_rate: Promised share of good images called defects.
        pixel_rate: Promised share of a good image's map that is flagged.
        source: Description of where the images come from.
        inference: Inference options. If they change the scores, the calibration is valid only for them.
        batch: Number of images per forward pass.
        on_progress: Called with the number of finished images and of all images.

    Returns:
        The calibration, and one sentence for each file that could not be read.

    Raises:
        ValueError: If no image can be read, or the images are too few for the rate.
    """
    calibration, unread = calibrate_files(
        detector, good, batch, on_progress, rate=false_alarm_rate, pixel_rate=pixel_rate, source=source,
        weights=digest(stored.model, stored.recipe),
    )  # fmt: skip
    if not inference.has_same_scores(stored.recipe):
        calibration = replace(calibration, views=detector.recipe.views, precision=detector.recipe.precision)
    return calibration, unread
