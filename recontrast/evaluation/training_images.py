"""Find test images that are training images, while they are evaluated."""

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data.datasets import Sample
from recontrast.data.fingerprint import compute_fingerprint
from recontrast.data.listing import DataWarning
from recontrast.data.sources import Images


class TrainingImageChecks:
    """Compares images with the fingerprints of training images when they are read.

    Args:
        trained: Fingerprints of the training images, see `recontrast.data.fingerprint.read_fingerprints`.

    Attributes:
        matches: Paths of the images that are training images.
    """

    def __init__(self, trained: Collection[str]) -> None:
        self.trained = trained
        self.matches: dict[Path, None] = {}

    def wrap(self, images: Sequence[Images], groups: Sequence[Sequence[Sample]]) -> list[Images]:
        """Return sources with the same images, which are compared when they are read.

        Args:
            images: Sources of images at network input size.
            groups: Samples of each source.

        Returns:
            The sources themselves if there are no fingerprints.
        """
        if not self.trained:
            return list(images)
        return [_CheckedImages(self, source, group) for source, group in zip(images, groups, strict=True)]

    def warn(self, count: int) -> None:
        """Warn of test images that were trained on: their scores are too low, so that the metrics promise too much.

        Args:
            count: Number of test images.
        """
        if self.matches:
            first = ", ".join(map(str, list(self.matches)[:5])) + (" ..." if len(self.matches) > 5 else "")
            warnings.warn(
                f"{len(self.matches)} of {count} test images were trained on, so that the metrics do not hold for new "
                f"images: {first}", DataWarning, stacklevel=3,
            )  # fmt: skip


class _CheckedImages:
    def __init__(self, checks: TrainingImageChecks, images: Images, samples: Sequence[Sample]) -> None:
        self.checks, self.images, self.samples = checks, images, samples

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> NDArray[np.uint8]:
        pixels = self.images[index]
        for position, image in zip(np.arange(len(self))[index], pixels, strict=True):
            if compute_fingerprint(image) in self.checks.trained:
                self.checks.matches[self.samples[position].path] = None
        return pixels
