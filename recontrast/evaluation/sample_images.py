"""Images of samples at the size of a recipe. An image that cannot be read is black, and named."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample
from recontrast.data.image_files import describe_image_error, read_parts
from recontrast.data.images import read_image
from recontrast.data.sources import Images
from recontrast.data.system import count_cpus
from recontrast.data.window import pixel_dtype
from recontrast.recipes.recipe import Recipe

READ_ERRORS = (OSError, ValueError)  # of one image or mask


class SampleImages:
    """Images of samples, decoded when they are indexed.

    Args:
        samples: Samples with the paths of the images.
        recipe: Recipe, for size and crop.
        workers: Number of threads that decode; None for one per CPU.
        unread: Receives one sentence for each image that cannot be read, by position; the image is black. None
            raises the error instead.

    The views of a part are images in sequence.
    """

    def __init__(
        self, samples: Sequence[Sample], recipe: Recipe, workers: int | None, unread: dict[int, str] | None = None
    ) -> None:
        self.samples, self.recipe, self.workers, self.unread = samples, recipe, workers, unread

    def __len__(self) -> int:
        views = self.recipe.image_views
        return len(self.samples) * (1 if views is None else len(views))

    def __getitem__(self, index: Any) -> NDArray[np.uint8]:
        """Decode the images at the integers in ``index``.

        Returns:
            Images (N, H, W, 3), uint8.
        """
        recipe = self.recipe
        if recipe.image_views is not None:
            with ThreadPoolExecutor(self.workers or count_cpus()) as pool:
                return read_parts(self._read, index, len(recipe.image_views), pool.map)
        if self.unread is None:
            samples = [self.samples[i] for i in index]
            return ImageCache(
                samples, recipe.size, recipe.crop, bits=recipe.bits, window=recipe.window, workers=self.workers
            )[:]
        with ThreadPoolExecutor(self.workers or count_cpus()) as pool:
            return np.stack(list(pool.map(self._read, index)))

    def find_unread(self) -> dict[int, str]:
        """Read all images one after the other, and keep none.

        Returns:
            One sentence for each image that cannot be read, by position.
        """
        images = SampleImages(self.samples, self.recipe, self.workers, {})
        with ThreadPoolExecutor(self.workers or count_cpus()) as pool:
            for _ in pool.map(lambda position: images._read(position).size, range(len(self.samples))):
                pass
        return images.unread or {}

    def _read(self, position: int) -> NDArray[np.uint8]:
        """Read one image, (H, W, 3), or the views of a part; black if it cannot be read."""
        recipe, path = self.recipe, self.samples[position].path
        views = recipe.image_views
        reading: dict[str, Any] = {"size": recipe.size, "crop": recipe.crop, "bits": recipe.bits}
        reading["window"] = recipe.window
        try:
            return read_image(path, **reading) if views is None else views.read(path, **reading)
        except READ_ERRORS as error:
            if self.unread is None:
                raise
            self.unread[position] = describe_image_error(str(path), error, views)
            shape = (*recipe.out, 3) if views is None else (len(views), *recipe.out, 3)
            return np.zeros(shape, pixel_dtype(recipe.window))


def open_images(
    samples: Sequence[Sample],
    recipe: Recipe,
    workers: int | None = None,
    cache_dir: str | Path | None = None,
    unread: dict[int, str] | None = None,
) -> Images:
    """Open the images of samples, with or without a cache.

    Args:
        samples: Samples with the paths of the images.
        recipe: Recipe, for size and crop.
        workers: Number of threads that decode; None for one per CPU.
        cache_dir: Folder for decoded images; None decodes them when they are indexed. If an image cannot be read,
            there is no cache.
        unread: As in `SampleImages`.

    Returns:
        The images.

    Raises:
        ValueError: If an image cannot be decoded and ``unread`` is None.
        OSError: If the cache cannot be written, or an image cannot be read and ``unread`` is None.
    """
    images = SampleImages(samples, recipe, workers, unread)
    if cache_dir is None:
        return images
    try:
        return ImageCache(
            samples, recipe.size, recipe.crop, cache_dir, bits=recipe.bits, window=recipe.window, workers=workers,
            views=recipe.image_views,
        )  # fmt: skip
    except READ_ERRORS:
        if unread is None or not images.find_unread():
            raise
        return images
