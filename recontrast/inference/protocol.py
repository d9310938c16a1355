"""The protocol that all detectors follow."""

from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from recontrast.calibration.conformal import Calibration
from recontrast.data.image_files import ImageFiles
from recontrast.inference.prediction import Predictions, predict
from recontrast.recipes.recipe import Recipe

MapsAndScores = tuple[NDArray[np.float32], NDArray[np.float32]]  # maps (N, H, W), scores (N,)


class Detector(Protocol):
    """Interface of everything that scores image files: a checkpoint, an exported file, or a class of your own.

    To add a detector, subclass this class, set the attributes and implement `run`; `predict` is inherited. A class that
    does not inherit from this one must define every attribute and both methods. To open the detector from files, add
    their suffix to `OPENERS`, with a function that takes a path and a device. To write the output files of
    ``recontrast predict``, pass an instance to `recontrast.app.prediction.predict.predict`.

    `run` gets its images from `recontrast.data.image_files.ImageFiles`: `ImageFiles.resized` for a network with a fixed
    input size, `ImageFiles.read` for original images. It must yield exactly one map and one score for each file, in the
    order of the files. `ImageFiles` records files that cannot be read in its ``errors``. For such a file, yield the
    result of a black image; the caller drops it. Different batches may have maps of different sizes. A map covers the
    part of the image that `map_extent` returns.

    Attributes:
        recipe: Recipe that the detector was trained with. Its ``size``, ``crop`` and ``tile`` determine the part of an
            image that a map covers, its ``score`` how a map becomes a score.
        calibration: Calibration of the scores that `run` yields, or None: images are then scored but not called good
            or defective. It must not come from other views, another precision or other tiles.
        calibration_note: Sentence that explains why ``calibration`` is None although the file holds a calibration;
            otherwise None, the default.
        category: Name of the category that the detector was trained on.
        max_map_value: Largest value that a map can have. Maps are stored as integers relative to it.
        overlap: Pixels shared by neighbouring tiles. None, the default, if images are not cut into tiles.
    """

    recipe: Recipe
    calibration: Calibration | None
    category: str
    max_map_value: float
    calibration_note: str | None = None
    overlap: int | None = None

    def run(self, files: ImageFiles, batch: int) -> Iterator[MapsAndScores]:
        """Compute the maps and scores of all files, in the order of the files.

        Args:
            files: Images to score.
            batch: Number of images per batch.

        Returns:
            Iterator over maps (N, H, W) and scores (N,), float32, batch after batch.
        """

    def predict(
        self, images: Any, *, false_alarm_rate: float | None = None, batch: int = 16,
        errors: Literal["raise", "keep"] = "raise",
    ) -> Predictions:  # fmt: skip
        """Score images, and call each good or a defect if the detector is calibrated.

        Args:
            images: One image or several: paths, folders, PIL images or arrays; see
                `recontrast.inference.prediction.list_given`.
            false_alarm_rate: Promised share of good images called defects. None: the rate of the calibration.
            batch: Number of images per forward pass.
            errors: "raise" stops at an image that cannot be read; "keep" gives it a prediction with an ``error``.

        Returns:
            One `recontrast.inference.prediction.Prediction` for each image, in the order of the images.

        Raises:
            ValueError: If an image is of another type or cannot be read, or the calibration is missing or too small for
                the rate.
            FileNotFoundError: If a path does not exist.
        """
        return predict(self, images, false_alarm_rate=false_alarm_rate, batch=batch, errors=errors)
