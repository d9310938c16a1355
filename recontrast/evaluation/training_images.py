"""Find test images that are training images, while they are evaluated."""

import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data.datasets import Sample
from recontrast.data.fingerprint import compute_fingerprint, compute_tiled_fingerprint
from recontrast.data.listing import DataWarning
from recontrast.data.near_copies import describe_trained, match_known, sketch_image, sketch_views
from recontrast.data.sources import Images


class TrainingImageChecks:
    """Compares images with the fingerprints and sketches of training images when they are read.

    Args:
        trained: Fingerprints of the training images, see `recontrast.data.fingerprint.read_fingerprints`.
        sketches: Sketches of the training images, see `recontrast.data.near_copies`, (n, 1024) float32; None if they
            are unknown.

    Attributes:
        matches: Paths of the images that are training images.
        sketched: Sketches of the other images, by path; empty if those of the training images are unknown.
    """

    def __init__(self, trained: Collection[str], sketches: NDArray[np.float32] | None = None) -> None:
        self.trained, self.sketches = trained, sketches
        self.matches: dict[Path, None] = {}
        self.sketched: dict[Path, NDArray[np.float32]] = {}

    def wrap(self, images: Sequence[Images], groups: Sequence[Sequence[Sample]], views: int = 1) -> list[Images]:
        """Return sources with the same images, which are compared when they are read.

        Args:
            images: Sources of images at network input size.
            groups: Samples of each source.
            views: Number of images of each sample, the views of a part.

        Returns:
            The sources themselves if there are no fingerprints.
        """
        if not self.trained:
            return list(images)
        return [_CheckedImages(self, source, group, views) for source, group in zip(images, groups, strict=True)]

    def compare(self, path: Path, views: NDArray[np.uint8], tiles: Images | None = None) -> None:
        """Compare an image or a part with those of training.

        Args:
            path: Path of the image.
            views: Views of the part (views, H, W, 3), uint8, at the size at which training reads them; an image is a
                part with one view.
            tiles: Tiles that training cuts them into; None for a detector of whole images.
        """
        if not self.trained:
            return
        fingerprint = compute_fingerprint(views) if tiles is None else compute_tiled_fingerprint(tiles)
        if fingerprint in self.trained:
            self.matches[path] = None
        elif self.sketches is not None:
            self.sketched[path] = sketch_views(list(map(sketch_image, views)))

    def warn(self, count: int, noun: str) -> None:
        """Warn of test images that were trained on, also saved again: their scores are too low.

        Args:
            count: Number of test images.
            noun: What is counted, see `recontrast.recipes.recipe.Recipe.noun`.
        """
        if self.matches:
            first = ", ".join(map(str, list(self.matches)[:5])) + (" ..." if len(self.matches) > 5 else "")
            warnings.warn(
                f"{len(self.matches)} of {count} test {noun}s were trained on, so that the metrics do not hold for new "
                f"{noun}s: {first}", DataWarning, stacklevel=3,
            )  # fmt: skip
        if self.sketched and self.sketches is not None:
            paths = list(self.sketched)
            near = match_known(np.stack(list(self.sketched.values())), self.sketches)
            text = describe_trained([paths[index] for index, _ in near], count, noun)
            if text is not None:
                warnings.warn(f"test: {text}", DataWarning, stacklevel=3)


class _CheckedImages:
    def __init__(self, checks: TrainingImageChecks, images: Images, samples: Sequence[Sample], views: int) -> None:
        self.checks, self.images, self.samples, self.views = checks, images, samples, views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> NDArray[np.uint8]:
        pixels = self.images[index]
        positions = np.arange(len(self))[index]
        for start in range(0, len(pixels), self.views):  # all views of a part are read together
            sample = self.samples[positions[start] // self.views]
            self.checks.compare(sample.path, pixels[start : start + self.views])
        return pixels
