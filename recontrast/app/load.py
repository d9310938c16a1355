"""Load a detector for prediction: a checkpoint, or an exported file, which needs no PyTorch."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from recontrast.data.listing import PathLike
from recontrast.inference.detector import Detector, open_detector
from recontrast.inference.options import InferenceOptions
from recontrast.inference.rois import RegionOfInterest

if TYPE_CHECKING:
    import torch

CHECKPOINT = "checkpoint.pt"


def load(
    path: PathLike,
    device: "str | torch.device | None" = None,
    *,
    tile: int | None = None,
    overlap: int | None = None,
    views: Literal["both", "trained", "frozen"] | None = None,
    precision: Literal["float32", "bfloat16"] | None = None,
    roi: RegionOfInterest | None = None,
) -> Detector:
    """Load a detector (ReContrast, Guo et al., https://arxiv.org/abs/2306.02602) for prediction.

    Args:
        path: A checkpoint, the folder of a run, or a file of ``recontrast export`` (.onnx, .xml, .pt2).
        device: "cpu", "cuda", "cuda:1", "mps". None takes the CUDA GPU if there is one.
        tile: Side of the tiles in pixels, for a detector trained on tiles. None: as trained.
        overlap: Pixels that neighboring tiles share. None: a quarter of the tile.
        views: "both", "trained" or "frozen": which pairs of features make up the map. None: as trained.
        precision: "float32" or "bfloat16". None: as trained.
        roi: Another region of interest: a mask image, a JSON file of rectangles and polygons, a folder with a mask for
            each image, or a mask (H, W) of bool. The calibration does not hold for it. Exported files take one only if
            they are of tiles with a region. None: as trained.

    Returns:
        The detector. Its ``predict`` takes images, see `recontrast.inference.prediction.predict`.

    Raises:
        ValueError: If this version cannot read a detector from the file, or an option does not fit the detector.
        FileNotFoundError: If there is no such file.

    Examples:
        >>> detector = recontrast.load("runs/mine")  # doctest: +SKIP
        >>> detector.predict("photos")[0].show()  # doctest: +SKIP
    """
    file = resolve_detector(path)
    return open_detector(file, device, tile, overlap, InferenceOptions(views=views, precision=precision), roi)


def resolve_detector(path: PathLike) -> Path:
    """Return the file of a detector: ``path`` itself, or checkpoint.pt in the folder of a run."""
    file = Path(path)
    if not file.is_dir():
        return file
    if not (file / CHECKPOINT).is_file():
        raise ValueError(
            f"{path}: wanted a checkpoint, an exported file or the folder of a run, got a folder without {CHECKPOINT}"
        )
    return file / CHECKPOINT
