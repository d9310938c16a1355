"""Calibration of a checkpoint or an exported file on images, for the command line and for `recontrast.calibrate`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from recontrast import checkpoint as checkpoints
from recontrast.calibration.conformal import Calibration
from recontrast.checkpoint import Checkpoint, digest
from recontrast.data.datasets import Sample
from recontrast.data.groups import number_samples
from recontrast.data.roi import EACH, RoiList
from recontrast.inference.calibrate import calibrate_files
from recontrast.inference.detector import CheckpointDetector, Detector, is_exported, open_detector
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.inference.options import InferenceOptions
from recontrast.recipes.recipe import Recipe


class CalibrationTarget(Protocol):
    """A file that holds a detector and its calibration."""

    @property
    def recipe(self) -> Recipe:
        """Recipe of the training."""

    @property
    def images(self) -> Mapping[str, Any]:
        """Description of the training images."""

    @property
    def calibration(self) -> Calibration | None:
        """Calibration in the file."""

    def open(self, *, calibrated: bool) -> Detector:
        """Return the detector in the file, with its calibration if ``calibrated``."""

    def finish(self, calibration: Calibration, detector: Detector) -> Calibration:
        """Return a calibration of the detector's scores with the options that it is valid for."""

    def weights(self) -> str:
        """Return the digest of the weights that a calibration belongs to."""

    def store(self, calibration: Calibration) -> None:
        """Store a calibration in the file."""


@dataclass(frozen=True)
class CheckpointTarget:
    """A checkpoint, see `CalibrationTarget`.

    Attributes:
        path: Path of the checkpoint.
        stored: Its content.
        device: Device of the model; None selects the GPU if there is one.
        inference: Inference options. If they change the scores, the calibration is valid only for them.
        rois: Folder with a mask for each image, for a detector that was trained with such masks.
    """

    path: Path
    stored: Checkpoint
    device: Any
    inference: InferenceOptions
    rois: Path | None = None

    @property
    def recipe(self) -> Recipe:
        """Recipe of the training."""
        return self.stored.recipe

    @property
    def images(self) -> Mapping[str, Any]:
        """Description of the training images."""
        return self.stored.images

    @property
    def calibration(self) -> Calibration | None:
        """Calibration in the file."""
        return self.stored.calibration

    def open(self, *, calibrated: bool) -> Detector:
        """Load the detector, with its calibration if ``calibrated``."""
        return CheckpointDetector(
            self.path, self.device, inference=self.inference, calibrated=calibrated, roi=self.rois
        )

    def finish(self, calibration: Calibration, detector: Detector) -> Calibration:
        """Return a calibration of the detector's scores with the options that it is valid for."""
        if self.inference.has_same_scores(self.recipe):
            return calibration
        return replace(calibration, views=detector.recipe.views, precision=detector.recipe.precision)

    def weights(self) -> str:
        """Return the digest of the weights."""
        return digest(self.stored.model, self.stored.recipe)

    def store(self, calibration: Calibration) -> None:
        """Store a calibration in the file."""
        checkpoints.write_calibration(self.path, calibration)


@dataclass(frozen=True)
class ExportedTarget:
    """An exported file, see `CalibrationTarget`. Its calibration is made from the file's own scores.

    Attributes:
        path: Path of the file.
        detector: Detector in the file.
    """

    path: Path
    detector: ExportedDetector

    @property
    def recipe(self) -> Recipe:
        """Recipe in the file."""
        return self.detector.stored_recipe

    @property
    def images(self) -> Mapping[str, Any]:
        """Description of the training images."""
        return self.detector.images

    @property
    def calibration(self) -> Calibration | None:
        """Calibration in the file."""
        return self.detector.calibration

    def open(self, *, calibrated: bool) -> Detector:
        """Return the detector; its scores do not depend on its calibration."""
        return self.detector

    def finish(self, calibration: Calibration, detector: Detector) -> Calibration:
        """Return the calibration: a file has no options that change its scores."""
        return calibration

    def weights(self) -> str:
        """Return the digest of the weights that were exported."""
        return str(self.detector.description.get("weights", ""))

    def store(self, calibration: Calibration) -> None:
        """Store a calibration in the file, and in the graph that makes its decisions."""
        from recontrast.export.store_calibration import store_calibration

        store_calibration(self.path, calibration)


def open_target(
    path: Path, device: Any = None, inference: InferenceOptions | None = None, rois: Path | None = None
) -> CalibrationTarget:
    """Open a file to be calibrated.

    Args:
        path: Path of a checkpoint or of an exported file.
        device: Device of the model; None selects the GPU if there is one.
        inference: Inference options, only for checkpoints.
        rois: Folder with a mask for each image, only for checkpoints of detectors that were trained with such masks.

    Returns:
        The file with its detector.

    Raises:
        ValueError: If the file is damaged or not a detector, or an option does not apply to it.
        OSError: If the file does not exist or cannot be read.
    """
    stored = None if is_exported(path) else checkpoints.load(path, mapped=True)
    if rois is not None and (stored is None or stored.recipe.roi != EACH or not rois.is_dir()):
        raise ValueError(f"--roi: wanted a folder of masks for a detector that was trained with one, got {rois}")
    if stored is None:
        detector = open_detector(path, device, inference=inference)
        if not isinstance(detector, ExportedDetector):  # another class in `OPENERS`
            raise ValueError(f"{path}: wanted a checkpoint or a file of recontrast export, got another detector")
        return ExportedTarget(path, detector)
    return CheckpointTarget(path, stored, device, inference or InferenceOptions(), rois)


def calibrate_detector(
    target: CalibrationTarget,
    detector: Detector,
    good: Sequence[Sample],
    *,
    false_alarm_rate: float,
    pixel_rate: float,
    source: str,
    batch: int,
    on_progress: Callable[[int, int], None],
) -> tuple[Calibration, list[str]]:
    """Score good images and set both thresholds; nothing is written.

    Args:
        target: File of the detector.
        detector: Detector, as `CalibrationTarget.open` returns it.
        good: Good images that the detector was not trained on. Those of one group count once.
        false_alarm_rate: Promised share of good images called defects.
        pixel_rate: Promised share of a good image's map that is flagged.
        source: Description of where the images come from.
        batch: Number of images per forward pass.
        on_progress: Called with the number of finished images and of all images.

    Returns:
        The calibration, and one sentence for each file that could not be read.

    Raises:
        ValueError: If no image can be read, or the images are too few for the rate.
    """
    groups = dict(zip([sample.path for sample in good], number_samples(good), strict=True))
    masks = {sample.path: sample.roi for sample in good if sample.roi is not None}
    if masks and isinstance(detector, CheckpointDetector) and detector.roi_folder is None:
        detector.roi_folder = RoiList(masks)
    calibration, unread = calibrate_files(
        detector, list(groups), batch, on_progress, groups, rate=false_alarm_rate, pixel_rate=pixel_rate, source=source,
        weights=target.weights(),
    )  # fmt: skip
    return target.finish(calibration, detector), unread
