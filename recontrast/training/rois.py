"""Regions of interest of training images: their tiles and augmented copies have the same."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recontrast.data.augment import VIEWS, change_view
from recontrast.data.datasets import Sample
from recontrast.data.images import image_size
from recontrast.data.roi import EACH
from recontrast.data.sources import FileImages, Images
from recontrast.data.tiles import TileMasks
from recontrast.data.views import show_view
from recontrast.inference.rois import Rois, open_rois
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import copy_to_device


class TrainingRois:
    """Masks of the training images, in the order of `recontrast.data.augment.augment_images`.

    Args:
        recipe: Recipe with ``roi``.
        samples: Samples of the images; empty if the images were given decoded.
        images: Decoded images, before they are augmented.
        device: Device of the masks.

    Attributes:
        inside: Positions in ``images`` of those with a pixel inside, ascending; tiles may have none.

    Raises:
        ValueError: If a mask does not fit its image, or cannot be read.
    """

    def __init__(self, recipe: Recipe, samples: Sequence[Sample], images: Images, device: torch.device) -> None:
        self.device, self.views = device, VIEWS[recipe.augment]
        rois = open_rois(recipe, samples) if samples else Rois(recipe)
        if rois is None:
            raise ValueError("roi: wanted a recipe with a region of interest, got one without")
        self.inside = np.arange(len(images))
        self._shared: NDArray[np.bool_] | Tensor | None = None
        self._packed: list[NDArray[np.uint8]] = []  # one mask for each image, packed to bits
        self._shape = recipe.map_out
        if recipe.tile is not None:
            self._read_tiles(recipe, rois, samples, images)
        elif recipe.roi == EACH:
            self._packed = [np.packbits(rois[[position]][0]) for position in range(len(samples))]
        elif len(self.views) == 1:
            self._shared = torch.from_numpy(rois[0].copy()).to(device)
        else:
            self._shared = rois[0]

    def _read_tiles(self, recipe: Recipe, rois: Rois, samples: Sequence[Sample], images: Images) -> None:
        """Cut the masks as the images were cut, and find the tiles with a pixel inside."""
        if not isinstance(images, FileImages) or recipe.tile is None:
            raise ValueError("roi: wanted image files to cut into tiles, got images that are decoded already")
        for position, sample in enumerate(samples):
            shape = image_size(show_view(sample.path, recipe.image_views))
            tiles = TileMasks(
                rois.read(position, shape, str(sample.path)), recipe.tile, recipe.stride or recipe.tile
            )  # fmt: skip
            packed = [np.packbits(tiles[[number]][0]) for number in range(len(tiles))]
            self._packed += packed * max(len(recipe.view_names), 1)
        empty = np.zeros_like(self._packed[0])
        self.inside = np.flatnonzero([not np.array_equal(packed, empty) for packed in self._packed])
        self._packed = [self._packed[position] for position in self.inside]

    @property
    def is_shared(self) -> bool:
        """Whether all images and copies have one mask, which is always the same tensor."""
        return isinstance(self._shared, Tensor)

    def __getitem__(self, index: Any) -> Tensor:
        """Return masks at positions among the images of ``inside`` and their copies.

        Args:
            index: Positions, (n,).

        Returns:
            Masks (n, H, W) of the maps, or (1, H, W) for a shared one, bool, on the device.
        """
        if isinstance(self._shared, Tensor):
            return self._shared
        index = np.asarray(index, np.int64)
        numbers, positions = np.divmod(index, len(self.inside))
        height, width = self._shape
        if self._shared is not None:
            masks = np.repeat(self._shared, len(index), axis=0)
        else:
            bits = np.stack([self._packed[position] for position in positions])
            masks = np.unpackbits(bits, axis=1, count=height * width).reshape(-1, height, width).view(bool)
        if len(self.views) > 1:
            pixels = np.repeat(masks[..., None].astype(np.uint8) * 255, 3, axis=-1)
            for number in np.unique(numbers).tolist():
                rows = np.flatnonzero(numbers == number)
                pixels[rows] = change_view(pixels[rows], self.views[number])
            masks = pixels[..., 0] >= 128  # pixels that are at least half inside
        return copy_to_device(torch.from_numpy(np.ascontiguousarray(masks)), self.device)
