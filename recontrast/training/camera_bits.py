"""Fix the bits of the camera before training, so that a detector always scales 16-bit samples in the same way."""

import os
from collections.abc import Sequence
from typing import Any

from recontrast.data.bit_depth import detect_bits
from recontrast.data.notices import warn_once
from recontrast.recipes.recipe import Recipe


def fix_bits(recipe: Recipe, items: Sequence[Any]) -> Recipe:
    """Set the bits of a recipe that leaves them open.

    Args:
        recipe: Recipe of the run.
        items: Training images: files, PIL images or arrays.

    Returns:
        The recipe with the bits of the camera; the recipe itself if they are given, or if the images have 8 bits or
        use all 16.

    Raises:
        OSError: If a file does not exist or cannot be opened.
        ValueError: If a file is not a complete image.
    """
    if recipe.bits is not None or not items:
        return recipe
    bits = detect_bits(items)
    if bits is None:
        return recipe
    text = f"has 16-bit samples of {bits} bits, like all {len(items)} images: they are scaled by {bits} bits"
    first = items[0] if isinstance(items[0], str | os.PathLike) else "image 0"
    warn_once(f"camera {bits}", first, f"{text} in training, evaluation and prediction (recipe field bits)")
    return recipe.replace(bits=bits)
