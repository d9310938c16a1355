"""Maps and scores of image files at their original scale, one file at a time; without PyTorch."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data.image_files import ImageFiles, describe_image_error
from recontrast.data.images import read_image
from recontrast.data.listing import PathLike
from recontrast.data.memory import trim_memory
from recontrast.data.window import pixel_dtype
from recontrast.inference.blend import MapAndScore
from recontrast.inference.part_maps import join_views
from recontrast.inference.rois import Rois
from recontrast.recipes.recipe import Recipe

# Image (H, W, 3), uint8 or float32, and its mask (H, W), bool, or None -> its map (H, W) and its score.
ScoreImage = Callable[[NDArray[Any], NDArray[np.bool_] | None], MapAndScore]
# Position -> image, or the views (views, H, W, 3) of a part, and its mask or None; None if the file cannot be read.
ReadImage = Callable[[int], tuple[NDArray[Any], NDArray[np.bool_] | None] | None]


def score_files(
    score_image: ScoreImage, files: ImageFiles, recipe: Recipe, rois: Rois | None = None
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Compute maps and scores of the files of a prediction.

    Args:
        score_image: Function that computes the map and the score of an image.
        files: Image files, which keep the errors. A black tile takes the place of a file that cannot be read.
        recipe: Recipe with ``tile``.
        rois: Regions of interest of the files; None: that of the recipe.

    Yields:
        Map (1, H, W) and score (1,), float32.
    """
    rois = Rois(recipe) if rois is None and recipe.roi is not None else rois

    def read(index: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None] | None:
        trim_memory()  # returns the memory of the image before to the system
        pixels, inside = files.read(index, bits=recipe.bits, window=recipe.window, views=recipe.image_views), None
        if pixels is None:
            return None
        if rois is not None:
            try:
                inside = rois.read(index, pixels.shape[-3:-1], str(files.paths[index]))
            except (OSError, ValueError) as error:
                files.errors[index] = describe_image_error(str(files.paths[index]), error)
                inside = np.ones(pixels.shape[-3:-1], bool)
        trim_memory()  # the same for the memory of decoding
        return pixels, inside

    yield from _score_one_by_one(score_image, read, len(files), recipe)
    trim_memory()


def score_paths(
    score_image: ScoreImage,
    paths: Sequence[PathLike],
    recipe: Recipe,
    *,
    unread: dict[int, str] | None = None,
    on_image: Callable[[Path, NDArray[Any]], object] | None = None,
    rois: Rois | None = None,
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Compute maps and scores of the files of an evaluation or a calibration.

    Args:
        score_image: Function that computes the map and the score of an image.
        paths: Image files.
        recipe: Recipe with ``tile``.
        unread: Receives one sentence for each image that cannot be read, by position; a black tile takes its place.
            None raises the error instead.
        on_image: Called with the path and the pixels of each image that can be read, (H, W, 3), or the views of a part,
            (views, H, W, 3), before it is scored.
        rois: Regions of interest of the files; None: that of the recipe.

    Yields:
        Map (1, H, W) and score (1,), float32.

    Raises:
        ValueError: If an image cannot be decoded and ``unread`` is None.
        OSError: If an image file cannot be read and ``unread`` is None.
    """
    rois = Rois(recipe) if rois is None and recipe.roi is not None else rois

    def read(position: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None] | None:
        try:
            path, scale = Path(paths[position]), dict[str, Any](bits=recipe.bits, window=recipe.window)
            views = recipe.image_views
            pixels = read_image(path, **scale) if views is None else views.read(path, **scale)
            inside = None if rois is None else rois.read(position, pixels.shape[-3:-1], str(path))
        except (OSError, ValueError) as error:
            if unread is None:
                raise
            unread[position] = describe_image_error(str(paths[position]), error, recipe.image_views)
            return None
        if on_image is not None:
            on_image(Path(paths[position]), pixels)
        return pixels, inside

    yield from _score_one_by_one(score_image, read, len(paths), recipe)


def _score_one_by_one(
    score_image: ScoreImage, read: ReadImage, count: int, recipe: Recipe
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Read and score ``count`` images; a black tile takes the place of those that cannot be read."""

    def score(position: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        image = read(position)
        views = recipe.image_views
        if image is None:
            shape = recipe.out if views is None else (len(views), *recipe.out)
            image = np.zeros((*shape, 3), pixel_dtype(recipe.window)), np.ones(recipe.out, bool)
        pixels, inside = image
        if views is None:
            anomaly, value = score_image(pixels, inside)
        else:
            anomaly, value = join_views((score_image(view, inside) for view in pixels), recipe, inside)
        return anomaly[None], np.array([value], np.float32)

    for position in range(count):
        yield score(position)  # a separate function, so that no image stays in memory while the next is read
