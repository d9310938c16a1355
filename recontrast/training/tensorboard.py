"""Scalars and images for TensorBoard, beside the log of JSON lines; the package is an optional extra."""

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from recontrast.data.datasets import Sample
from recontrast.data.images import read_image
from recontrast.data.tiles import Tiles
from recontrast.inference.infer import infer
from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe

FOLDER = "tensorboard"  # below that of the run


class TensorBoardLogger:
    """Event files in a folder.

    Args:
        folder: made if need be.
        keep: step from which a run is resumed: what a former process wrote after it is not shown.

    Raises:
        ImportError: the package tensorboard is not installed; the sentence says how to get it.
    """

    def __init__(self, folder: str | Path, *, keep: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "tensorboard: wanted the package, which is not installed: pip install 'recontrast[tensorboard]'"
            ) from error
        self.writer = SummaryWriter(str(folder), purge_step=keep + 1 if keep else None)

    def log(self, step: int, loss: float, rate: float, alpha: float) -> None:
        """One line of the log, as `train` hands it to ``on_log``."""
        for name, value in (("loss", loss), ("images per second", rate), ("alpha", alpha)):
            self.writer.add_scalar(f"train/{name}", value, step)

    def images(self, step: int, model: ReContrast, samples: Sequence[Sample], recipe: Recipe, count: int = 8) -> None:
        """Images beside their anomaly maps in grey, white being the largest value of all shown.

        Args:
            step: of the model.
            model: in any mode, which it keeps.
            samples: test images of each category in turn are shown, or training images where there are none.
            recipe: for size, crop and map.
            count: how many images.
        """
        chosen = _alternating([s for s in samples if s.split == "test"] or list(samples))[:count]
        images = np.stack([_shown(sample, recipe) for sample in chosen])
        maps = np.concatenate([part.cpu().numpy() for part, _ in infer(model, images, recipe, batch=count)])
        grey = (255 * maps.clip(0) / max(float(maps.max()), 1e-12)).astype(np.uint8)
        for sample, pixels, shown in zip(chosen, images, grey, strict=True):
            both = np.concatenate([pixels, np.repeat(shown[..., None], 3, axis=2)], axis=1)
            name = f"{sample.category}/{sample.split}/{sample.defect}/{sample.path.stem}"
            self.writer.add_image(name, both, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is held back."""
        self.writer.close()


def _shown(sample: Sample, recipe: Recipe) -> np.ndarray:
    """What the network sees of an image, (H, W, 3) uint8: all of it, or the tile in the middle."""
    if recipe.tile is None:
        return read_image(sample.path, size=recipe.size, crop=recipe.crop)
    tiles = Tiles(read_image(sample.path), recipe.tile, recipe.tile)
    return tiles[[len(tiles) // 2]][0]


def _alternating(samples: Sequence[Sample]) -> list[Sample]:
    """One sample of each kind of defect of each category, then the second of each, and so on."""
    kinds: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        kinds.setdefault((sample.category, sample.defect), []).append(sample)
    return [sample for row in zip_longest(*kinds.values()) for sample in row if sample is not None]
