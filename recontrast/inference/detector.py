"""What scores images: one small face for a checkpoint, an exported file, tiles, or workers elsewhere.

To add a detector, write a class with the attributes and the one method of `Detector`, and either enter its file's
suffix in `OPENERS` (a function of path and device) or hand an instance to the command line's prediction.

``run`` reads what it needs from `recontrast.data.image_files.ImageFiles`, in order and none left out:
`ImageFiles.resized` for a fixed input, `ImageFiles.read` for the original. What cannot be read is noted there, and
still gets a map and a score (of a black image), which the caller drops. Maps may change in size from batch to batch,
and stand for the part of the image that `map_extent` says. A detector whose scores differ from those that were
calibrated (other views, other scale) must have ``calibration`` None, and may say why there is none in an attribute
``calibration_note``, a sentence.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from recontrast import checkpoint as checkpoints
from recontrast.calibration.conformal import Calibration
from recontrast.data.image_files import ImageFiles
from recontrast.inference import tiling
from recontrast.inference.exported_detector import KINDS, ExportedDetector
from recontrast.inference.infer import infer, max_map_value
from recontrast.inference.options import InferenceOptions
from recontrast.recipes.recipe import Recipe, to_pair
from recontrast.runtime.device import trim_memory

MapsAndScores = tuple[NDArray[np.float32], NDArray[np.float32]]  # maps (n, H, W), scores (n,)


class Detector(Protocol):
    """Whatever gives maps and scores of image files."""

    @property
    def recipe(self) -> Recipe:
        """How it was trained, and how map and score are formed."""

    @property
    def calibration(self) -> Calibration | None:
        """Of exactly these scores; None: there are no decisions."""

    @property
    def category(self) -> str:
        """What it was trained on."""

    @property
    def top(self) -> float:
        """The largest value that a map can have."""

    def run(self, files: ImageFiles, batch: int) -> Iterator[MapsAndScores]:
        """Maps and scores of all files in their order.

        Args:
            files: the images.
            batch: images at once.

        Returns:
            Maps (n, H, W) and scores (n,), float32, batch after batch.
        """


class CheckpointDetector:
    """The detector in a checkpoint of ours; one that was trained on tiles sees images in tiles."""

    def __init__(
        self,
        path: Path,
        device: str | torch.device | None = None,
        tile: int | None = None,
        overlap: int | None = None,
        inference: InferenceOptions | None = None,
        *,
        calibrated: bool = True,
    ) -> None:
        """Read it.

        Args:
            path: the checkpoint.
            device: None: the GPU where there is one.
            tile: pixels; 0: whole images, resized; None: as it was trained.
            overlap: pixels that neighbouring tiles share; None: a quarter of the tile.
            inference: how the model is run, None: as trained, and folded; scores not calibrated decide nothing.
            calibrated: False: whatever calibration there is is left out, where a new one is to be made.

        Raises:
            ValueError: it was trained at the other scale, tile or overlap do not do, or the checkpoint is none.
            OSError: the checkpoint cannot be read.
        """
        inference = inference or InferenceOptions()
        model, stored, about = checkpoints.load_model(path, device, calibrated=calibrated)
        trained = inference.recipe(stored)
        self.recipe, self.overlap = tiling.resolve_tiling(model, trained, tile, overlap, f"{path}")
        self.category = about.category
        alike = self.recipe == trained and self.overlap in (None, tiling.resolve_overlap(trained.out[0]))
        found = inference.calibration(stored, about.calibration)
        self.calibration = found if alike else None  # of these scores, or of none
        self.calibration_note = None
        if about.calibration is not None and self.calibration is None:
            self.calibration_note = (
                f"{path}: {inference.calibration_note(stored, about.calibration) or self._other_tiles(trained)}"
            )
        trim_memory()
        self.model = inference.network(model, self.recipe, stored, keep=False)
        self.top = max_map_value(self.model, self.recipe)
        del model
        trim_memory()

    def _other_tiles(self, trained: Recipe) -> str:
        """Why scores are not those that were calibrated."""
        tile, shared = trained.out[0], tiling.resolve_overlap(trained.out[0])
        return (
            f"its calibration is of tiles of {tile} px that share {shared}: nothing is decided by scores of tiles of "
            f"{self.recipe.out[0]} px that share {self.overlap}"
        )

    def run(self, files: ImageFiles, batch: int) -> Iterator[MapsAndScores]:
        """See `Detector`; the next batch is decoded while the network runs, tiled images are read one by one.

        Args:
            files: the images.
            batch: images, or tiles, at once.

        Yields:
            Maps (n, H, W) and scores (n,), float32.
        """
        if self.overlap is not None:
            yield from tiling.infer_tiled(self.model, files, self.recipe, self.overlap, batch)
            return
        for maps, scores in infer(self.model, files.resized(self.recipe.size, self.recipe.crop), self.recipe,
                                  batch=batch):  # fmt: skip
            yield maps.cpu().numpy(), scores.cpu().numpy()


# Files of other kinds, by suffix; whatever is not listed is taken for a checkpoint.
OPENERS: dict[str, Callable[[Path, Any], Detector]] = dict.fromkeys(KINDS, ExportedDetector)


def open_detector(
    path: Path,
    device: str | torch.device | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    inference: InferenceOptions | None = None,
) -> Detector:
    """The detector in a file.

    Args:
        path: a checkpoint, or an exported file by its suffix.
        device: None: the GPU where there is one.
        tile: as in `CheckpointDetector`; of a checkpoint alone, as the two below.
        overlap: as in `CheckpointDetector`.
        inference: as in `CheckpointDetector`.

    Returns:
        What gives maps and scores.

    Raises:
        ValueError, OSError: there is none, in one sentence.
    """
    if (opener := OPENERS.get(path.suffix.lower())) is None:
        return CheckpointDetector(path, device, tile, overlap, inference)
    if tile or overlap is not None:
        raise ValueError(f"{path}: wanted a checkpoint where tile or overlap is given, got a file of another kind")
    if inference not in (None, InferenceOptions()):
        raise ValueError(f"{path}: wanted a checkpoint where views, precision, layout, folding or compiling is given, "
                         "got a file of another kind, in which they are settled")  # fmt: skip
    return opener(path, device)


def map_extent(shape: Sequence[int], recipe: Recipe) -> tuple[int, int, int, int]:
    """The part of an original image that the map stands for.

    Args:
        shape: height and width of the image, pixels.
        recipe: of the detector: its size and crop, or tile.

    Returns:
        Top, left, height and width, pixels.
    """
    if recipe.tile is not None:
        return 0, 0, shape[0], shape[1]
    found = []
    for length, resized, seen in zip(shape, to_pair(recipe.size), recipe.out, strict=True):
        start = round(round((resized - seen) / 2) * length / resized)
        found.append((start, min(max(round(seen * length / resized), 1), length - start)))
    (top, height), (left, width) = found
    return top, left, height, width
