"""Where an image is anomalous, as a recipe sees the image."""

import numpy as np
from numpy.typing import NDArray

from recontrast.data.datasets import Sample
from recontrast.data.images import read_mask
from recontrast.recipes.recipe import Recipe


def read_ground_truth(sample: Sample, recipe: Recipe) -> NDArray[np.bool_]:
    """The mask of an anomalous image as ``recipe`` sees it.

    Args:
        sample: with its mask.
        recipe: for size and crop, or with ``tile`` for the image's own size, and for the mask rule.

    Returns:
        (H, W), True where the image is anomalous.

    Raises:
        ValueError: there is no mask, it cannot be read, or its size is not that of the image.
    """
    if sample.mask is None:
        raise ValueError(f"{sample.path}: wanted an image with a mask, got one without")
    size = None if recipe.tile is not None else recipe.size
    return read_mask(sample.mask, size=size, crop=recipe.crop, rule=recipe.mask_rule, image=sample.path)
