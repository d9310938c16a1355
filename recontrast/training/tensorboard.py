"""Scalars and images of a training run for TensorBoard, an optional dependency."""

import math
import os
import tempfile
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from recontrast.data.datasets import Sample
from recontrast.data.images import read_image
from recontrast.data.names import escape_bytes
from recontrast.data.regular_file import is_regular, open_regular
from recontrast.data.tiles import Tiles
from recontrast.data.window import to_levels
from recontrast.inference.infer import infer
from recontrast.inference.rois import open_rois
from recontrast.models.network import Network
from recontrast.recipes.recipe import Recipe

FOLDER = "tensorboard"  # in the folder of the run
_RATE = "images per second"
_HEAD = 1 << 16  # bytes of a file by which it is recognised


def import_writer() -> Any:
    """Import PyTorch's class that writes event files.

    Returns:
        The class ``SummaryWriter``.

    Raises:
        ImportError: If the package tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "tensorboard: wanted the package tensorboard, got none installed: pip install tensorboard"
        ) from error
    return SummaryWriter


class TensorBoardLogger:
    """Writer of TensorBoard event files.

    Args:
        folder: Folder of the event files; it is created if necessary.
        keep: Step from which the run resumes; TensorBoard hides earlier events of later steps.

    Raises:
        ImportError: If the package tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, *, keep: int = 0) -> None:
        writer = import_writer()
        self._link: tempfile.TemporaryDirectory[str] | None = None
        path = str(folder)
        if path != escape_bytes(path):  # TensorBoard opens no file whose path is not UTF-8
            Path(folder).mkdir(parents=True, exist_ok=True)
            self._link = tempfile.TemporaryDirectory(prefix="recontrast-")
            path = os.path.join(self._link.name, FOLDER)
            os.symlink(os.path.abspath(folder), path)
        self.writer = writer(path, purge_step=keep + 1 if keep else None)

    def log(self, step: int, loss: float, rate: float, alpha: float) -> None:
        """Write the scalars of a log line.

        The arguments are those that `train` passes to ``on_log``.

        Args:
            step: Number of completed steps.
            loss: Mean loss since the last log line.
            rate: Images per second.
            alpha: Threshold of hard points, in standard deviations.
        """
        for name, value in (("loss", loss), (_RATE, rate), ("alpha", alpha)):
            if not math.isnan(value):  # an architecture that is fitted in one pass has no loss
                self.writer.add_scalar(f"train/{name}", value, step)

    def images(self, step: int, model: Network, samples: Sequence[Sample], recipe: Recipe, count: int = 8) -> None:
        """Write images next to their anomaly maps, in grey; white is the largest value of all these maps.

        Args:
            step: Number of completed steps of the model.
            model: Model in any mode; the mode is kept.
            samples: Samples from which test images of each category and defect in turn are selected, or training
                images if there are no test images.
            recipe: Recipe that sets the size, the crop and the map.
            count: Maximum number of images.
        """
        selected = _alternate_kinds([s for s in samples if s.split == "test"] or list(samples))[:count]
        inputs = [_read_input(sample, recipe) for sample in selected]  # all views of each part
        images = np.concatenate(inputs)
        if recipe.tile is not None:
            recipe = recipe.replace(roi=None)
        batches = infer(model, images, recipe, batch=len(images), rois=open_rois(recipe, selected))
        maps = np.concatenate([part.cpu().numpy() for part, _ in batches])
        grey_maps = (255 * maps.clip(0) / max(float(maps.max()), 1e-12)).astype(np.uint8)
        for sample, pixels, grey in zip(selected, inputs, grey_maps, strict=True):
            pair = np.concatenate([to_levels(pixels[0]), np.repeat(grey[..., None], 3, axis=2)], axis=1)
            name = f"{sample.category}/{sample.split}/{sample.defect}/{sample.path.stem}"
            self.writer.add_image(escape_bytes(name), pair, step, dataformats="HWC")

    def close(self) -> None:
        """Write buffered events and close the files."""
        self.writer.close()
        if self._link is not None:
            self._link.cleanup()


def list_own_events(folder: Path) -> list[Path]:
    """List the event files that runs of this package wrote, by their content.

    Args:
        folder: Folder of event files; it need not exist.

    Returns:
        Paths of the files with at least one log line of a run. Events of other programs are not among them.
    """
    own = []
    for path in sorted(folder.glob("events.out.tfevents.*")):
        if is_regular(path) and not path.is_symlink():
            with open_regular(path) as file:
                if _RATE.encode() in file.read(_HEAD):
                    own.append(path)
    return own


def _read_input(sample: Sample, recipe: Recipe) -> np.ndarray:
    """Return the network's input for an image, (1, H, W, 3) uint8: the resized image, or its middle tile.

    Of a part, it is that of all views, (views, H, W, 3).
    """
    reading: dict[str, Any] = {"bits": recipe.bits, "window": recipe.window}
    reading |= {"size": recipe.size, "crop": recipe.crop} if recipe.tile is None else {}
    views = recipe.image_views
    images = read_image(sample.path, **reading)[None] if views is None else views.read(sample.path, **reading)
    if recipe.tile is None:
        return images
    parts = [Tiles(image, recipe.tile, recipe.tile) for image in images]
    return np.concatenate([tiles[[len(tiles) // 2]] for tiles in parts])


def _alternate_kinds(samples: Sequence[Sample]) -> list[Sample]:
    """Order samples as the first one of each defect type of each category, then the second ones, and so on."""
    kinds: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        kinds.setdefault((sample.category, sample.defect), []).append(sample)
    return [sample for row in zip_longest(*kinds.values()) for sample in row if sample is not None]
