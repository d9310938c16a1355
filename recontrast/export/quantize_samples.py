"""Images, or tiles of them, from which the ranges of a quantised network are measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data.image_files import ImageFiles
from recontrast.data.tiles import TileMasks, Tiles
from recontrast.data.views import group_paths
from recontrast.inference.rois import Rois
from recontrast.recipes.recipe import Recipe


@dataclass(frozen=True)
class Samples:
    """Inputs of a graph.

    Attributes:
        images: Images or tiles (N, H, W, 3), uint8, or float32 in [0, 1] with a window.
        masks: Whether each pixel of a tile is in the region of interest, (N, H, W) bool; None for a graph without this
            input.
    """

    images: NDArray[Any]
    masks: NDArray[np.bool_] | None = None

    def every(self, step: int) -> "Samples":
        """Return every ``step``-th sample."""
        return Samples(self.images[::step], None if self.masks is None else self.masks[::step])


def read_evenly(paths: Sequence[Path], recipe: Recipe, most: int) -> Samples:
    """Read images, evenly spaced in a list, resized but not cropped, or tiles of them with a pixel inside.

    Args:
        paths: Image files, or the views of parts.
        recipe: Recipe, for the size and the bits of the images, their tiles and their region of interest.
        most: Largest number of samples.

    Returns:
        The samples.

    Raises:
        ValueError: If an image cannot be read, or has another aspect ratio than the region of interest of its tiles, or
            no tile of any image has a pixel inside.
    """
    views = recipe.image_views
    paths = group_paths(paths, views)
    files = ImageFiles([paths[index] for index in _space_evenly(len(paths), most)])
    if recipe.tile is None:
        images = files.resized(recipe.size, None, recipe.bits, recipe.window, views)
        samples = Samples(np.asarray(images[_space_evenly(len(images), most)]))
    else:
        samples = _read_tiles(files, recipe, most)
    if files.errors:
        raise ValueError(next(iter(files.errors.values())))
    if not len(samples.images):
        raise ValueError("--images: wanted images with a pixel in the region of interest, got none")
    return samples


def _read_tiles(files: ImageFiles, recipe: Recipe, most: int) -> Samples:
    """Read tiles of each file, up to the first one that cannot be read."""
    tile, views = recipe.out[0], recipe.image_views
    count = max(most // (len(files) * (1 if views is None else len(views))), 1)  # of each image
    stride, rois = recipe.stride or tile, None if recipe.roi is None else Rois(recipe)
    images, masks = [np.zeros((0, tile, tile, 3))], [np.zeros((0, tile, tile), bool)]
    for index in range(len(files)):
        pixels = files.read(index, bits=recipe.bits, window=recipe.window, views=views)
        if pixels is None:
            break
        for view in pixels[None] if views is None else pixels:
            tiles = Tiles(view, tile, stride)
            chosen: NDArray[np.int64] = np.arange(len(tiles))
            if rois is not None:
                inside = TileMasks(rois.read(index, view.shape[:2], str(files.paths[index])), tile, stride)
                chosen = inside.list_inside()
            chosen = chosen[_space_evenly(len(chosen), count)]
            images.append(tiles[chosen])
            if rois is not None and len(chosen):
                masks.append(inside[chosen])
    found = [part for part in images if len(part)]
    return Samples(np.concatenate(found or images), None if rois is None else np.concatenate(masks))


def _space_evenly(count: int, most: int) -> NDArray[np.int64]:
    """Return at most so many positions, evenly spaced."""
    number = min(most, count)
    return np.arange(number) * count // max(number, 1)
