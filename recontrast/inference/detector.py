"""The detector in a checkpoint, and the function that opens the detector in a file."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recontrast import checkpoint as checkpoints
from recontrast.data.image_files import ImageFiles
from recontrast.data.roi import RoiFolder, RoiList
from recontrast.inference.exported_detector import PROGRAMS, ExportedDetector
from recontrast.inference.finite import is_finite
from recontrast.inference.options import InferenceOptions
from recontrast.inference.protocol import Detector, MapsAndScores
from recontrast.inference.rois import RegionOfInterest, apply_roi, describe_other_roi, open_folder
from recontrast.lazy_import import LazyModule
from recontrast.recipes.recipe import Recipe, to_pair

if TYPE_CHECKING:
    import torch

    from recontrast.inference import infer, tiling
    from recontrast.runtime import device as devices
else:  # exported files run without PyTorch
    infer = LazyModule("recontrast.inference.infer")
    tiling = LazyModule("recontrast.inference.tiling")
    devices = LazyModule("recontrast.runtime.device")


def run_checked(detector: Detector, files: ImageFiles, batch: int) -> Iterator[MapsAndScores]:
    """Run a detector, and replace the score of each map that is not finite by NaN, whatever the detector computed.

    The kernels do the same. Detectors of other origin, such as files exported by earlier versions, may ignore NaN.

    Args:
        detector: Detector that scores the images.
        files: Images to score.
        batch: Number of images per batch.

    Yields:
        Maps (N, H, W) and scores (N,), float32.
    """
    for maps, scores in detector.run(files, batch):
        finite = [is_finite(anomaly) for anomaly in maps]
        if not all(finite):
            scores = np.where(finite, scores, np.float32(np.nan))
        yield maps, scores
        del maps  # a map may be large, and should not stay in memory beside the next image


class CheckpointDetector(Detector):
    """Detector in a checkpoint. If it was trained on tiles, images are cut into tiles.

    See `Detector` for the other attributes.

    Attributes:
        model: Network in eval mode, on its device; BatchNorm is folded unless ``inference`` disables it.
        path: Path of the checkpoint.
        images: Description of the training images (`recontrast.data.fingerprint.describe_images`).
        inference: Inference options of the model.
    """

    def __init__(
        self,
        path: Path,
        device: "str | torch.device | None" = None,
        tile: int | None = None,
        overlap: int | None = None,
        inference: InferenceOptions | None = None,
        *,
        calibrated: bool = True,
        roi: RegionOfInterest | None = None,
    ) -> None:
        """Load the model.

        Args:
            path: Path of the checkpoint.
            device: Device of the model; None selects the GPU if there is one.
            tile: Side of a tile in pixels, 0 for whole resized images, None for the value used in training.
            overlap: Pixels shared by neighbouring tiles; None is a quarter of the tile.
            inference: Inference options; None runs the model as it was trained, with BatchNorm folded. Options that
                change the scores make the stored calibration invalid.
            calibrated: Whether to use the stored calibration. False ignores it, for a detector that is about to be
                calibrated again.
            roi: Region of interest that replaces that of the checkpoint, or a folder with a mask for each image, see
                `recontrast.inference.rois.resolve_roi`. Another region than the stored one makes the stored
                calibration invalid.

        Raises:
            ValueError: If tiles are requested from a model of whole images or vice versa, ``tile`` or ``overlap`` is
                invalid, or the file is not a checkpoint.
            OSError: If the checkpoint cannot be read.
        """
        self.path = Path(path)
        self.inference = options = inference or InferenceOptions()
        model, trained, state = checkpoints.load_model(path, device, calibrated=calibrated)
        recipe, folder = apply_roi(options.apply_to(trained), roi)
        self.roi_folder: RoiFolder | RoiList | None = folder  # masks of images that each have their own
        self.recipe, self.overlap = tiling.resolve_tiling(model, recipe, tile, overlap, f"{path}")
        self.category, self.images = state.category, state.images
        self.calibration = self.calibration_note = None
        if state.calibration is not None:
            mismatch = (
                options.describe_mismatch(trained, state.calibration)
                or self._describe_other_tiles(recipe)
                or describe_other_roi(trained, recipe)
            )
            if mismatch is None:
                self.calibration = state.calibration
            else:
                self.calibration_note = f"{path}: {mismatch}"
        devices.trim_memory()
        self.model = options.build_network(model, self.recipe, trained, keep=False)
        self.max_map_value = infer.max_map_value(self.model, self.recipe)
        del model
        devices.trim_memory()

    def __repr__(self) -> str:
        calibration = self.calibration
        decides = "no calibration" if calibration is None else f"false-alarm rate {calibration.rate:g}"
        size = " x ".join(map(str, self.recipe.out)) + (" px tiles" if self.recipe.tile else " px")
        return f"CheckpointDetector({str(self.path)!r}: {self.category}, {self.recipe.backbone}, {size}, {decides})"

    def _describe_other_tiles(self, recipe: Recipe) -> str | None:
        """Explain why a calibration for the tiles of ``recipe`` is invalid for this detector; None if it is valid."""
        tile, overlap = recipe.out[0], tiling.resolve_overlap(recipe.out[0])
        if self.recipe == recipe and self.overlap in (None, overlap):
            return None
        return (
            f"its calibration is for tiles of {tile} px that share {overlap} px, not for tiles of "
            f"{self.recipe.out[0]} px that share {self.overlap} px: no decisions are made"
        )

    def run(self, files: ImageFiles, batch: int) -> Iterator[MapsAndScores]:
        """Compute maps and scores, see `Detector.run`.

        The next batch is decoded while the network runs. Images that are cut into tiles are read one at a time.

        Args:
            files: Images to score.
            batch: Number of images, or of tiles, per batch.

        Yields:
            Maps (N, H, W) and scores (N,), float32.
        """
        rois = open_folder(self.recipe, self.roi_folder, files.paths)
        if self.overlap is not None:
            yield from tiling.infer_tiled(self.model, files, self.recipe, self.overlap, batch, rois)
            return
        if rois is not None and files.check_shape is None:
            files.check_shape = rois.check
        recipe = self.recipe
        images = files.resized(recipe.size, recipe.crop, recipe.bits, recipe.window, recipe.image_views)
        for maps, scores in infer.infer(self.model, images, self.recipe, batch=batch, rois=rois):
            yield maps.cpu().numpy(), scores.cpu().numpy()


# File suffix -> function that opens such a file; every other suffix is opened as a checkpoint.
OPENERS: dict[str, Callable[[Path, Any], Detector]] = dict.fromkeys(PROGRAMS, ExportedDetector)


def is_exported(path: Path) -> bool:
    """Return whether a path is that of an exported file, by its suffix.

    Args:
        path: Path of a detector.

    Returns:
        False for a checkpoint, or the folder of a run.
    """
    return path.suffix.lower() in PROGRAMS


def open_detector(
    path: Path,
    device: "str | torch.device | None" = None,
    tile: int | None = None,
    overlap: int | None = None,
    inference: InferenceOptions | None = None,
    roi: RegionOfInterest | None = None,
) -> Detector:
    """Open the detector in a file.

    Args:
        path: Path of a checkpoint or of an exported file; the suffix decides which.
        device: Device of the model; None selects the GPU if there is one.
        tile: Side of a tile in pixels, see `CheckpointDetector`; only for checkpoints.
        overlap: Pixels shared by neighbouring tiles, see `CheckpointDetector`; only for checkpoints.
        inference: Inference options, see `CheckpointDetector`; only for checkpoints.
        roi: Region of interest, see `CheckpointDetector`; only for checkpoints, and exported files of tiles with one.

    Returns:
        The detector.

    Raises:
        ValueError: If the file is damaged or not a detector, or an option does not apply to it.
        OSError: If the file does not exist or cannot be read.
    """
    if (opener := OPENERS.get(path.suffix.lower())) is None:
        return CheckpointDetector(path, device, tile, overlap, inference, roi=roi)
    if tile or overlap is not None:
        raise ValueError(f"{path}: wanted a checkpoint where tile or overlap is given, got a file of another kind")
    if inference not in (None, InferenceOptions()):
        raise ValueError(f"{path}: wanted a checkpoint where views, precision, layout, folding or compiling is given, "
                         "got an exported file, in which they are fixed")  # fmt: skip
    if roi is None:
        return opener(path, device)
    if opener is not ExportedDetector:
        raise ValueError(f"{path}: roi: wanted none for a file of this kind, in which the region of interest is fixed")
    return ExportedDetector(path, device, roi=roi)


def map_extent(shape: Sequence[int], recipe: Recipe) -> tuple[int, int, int, int]:
    """Compute the part of an original image that its map covers.

    Args:
        shape: Height and width of the image in pixels.
        recipe: Recipe of the detector, for ``size`` and ``crop``, or ``tile``.

    Returns:
        Top, left, height and width in pixels.
    """
    if recipe.tile is not None:
        return 0, 0, shape[0], shape[1]
    spans = []
    for length, resized, cropped in zip(shape, to_pair(recipe.size), recipe.out, strict=True):
        start = round(round((resized - cropped) / 2) * length / resized)
        spans.append((start, min(max(round(cropped * length / resized), 1), length - start)))
    (top, height), (left, width) = spans
    return top, left, height, width
