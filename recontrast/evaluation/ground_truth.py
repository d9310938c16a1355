"""Ground-truth masks at the size and crop of a recipe."""

import numpy as np
from numpy.typing import NDArray

from recontrast.data.datasets import Sample
from recontrast.data.images import read_mask
from recontrast.data.masks import MaskNotes, note_mask
from recontrast.recipes.recipe import Recipe


def read_ground_truth(sample: Sample, recipe: Recipe, notes: MaskNotes | None = None) -> NDArray[np.bool_]:
    """Read the mask of a defective image at the size of its map; of a part, those of all its views together.

    Args:
        sample: Sample with a mask.
        recipe: Recipe, for size, crop, map size and mask rule. With ``tile``, the mask keeps its original size.
        notes: Collects notes on unusual masks. None warns of the first of each kind.

    Returns:
        Mask (H, W), bool, True where the image is defective.

    Raises:
        ValueError: If there is no mask, or the mask cannot be read or differs from the image in size.
    """
    if sample.mask is None:
        raise ValueError(f"{sample.path}: wanted an image with a mask, got one without")
    size = None if recipe.tile is not None else recipe.size
    mask = read_mask(sample.mask, size=size, crop=recipe.crop, rule=recipe.mask_rule, image=sample.path, notes=notes)
    for view in sample.views:
        if view.mask is not None and view.mask != sample.mask:
            mask |= read_mask(
                view.mask, size=size, crop=recipe.crop, rule=recipe.mask_rule, image=view.path, notes=notes
            )
    if recipe.map_size is not None:  # nearest neighbours, as F.interpolate takes them
        rows, columns = (np.arange(new) * old // new for new, old in zip(recipe.map_out, mask.shape, strict=True))
        mask = mask[np.ix_(rows, columns)]
    if not mask.any():
        note_mask("empty", sample.mask, notes)
    return mask
