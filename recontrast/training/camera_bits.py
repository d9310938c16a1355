"""Fix the bits of the camera or the window before training, so that a detector always scales samples in one way."""

from collections.abc import Sequence
from typing import Any

from recontrast.data.bit_depth import detect_bits, has_deep
from recontrast.data.in_memory import read_given
from recontrast.data.notices import warn_once
from recontrast.data.window import AUTO, find_window, name_item
from recontrast.recipes.recipe import Recipe

_LOST = "rounded to 256 levels"
_HINT = "--window auto keeps all levels but those of the lowest and highest 0.1% of the samples"


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
    if recipe.bits is not None or recipe.window is not None or not items:
        return recipe
    bits = detect_bits(items)
    if bits is None:
        if has_deep(items):
            text = f"has 16-bit samples: they are {_LOST}, here and in other files; {_HINT}"
            warn_once("16 bits", name_item(items[0], 0), text)
        return recipe
    text = f"has 16-bit samples of {bits} bits, like all {len(items)} images: they are scaled by {bits} bits"
    warn_once(
        f"camera {bits}", name_item(items[0], 0),
        f"{text} in training, evaluation and prediction (recipe field bits), and {_LOST}; {_HINT}",
    )  # fmt: skip
    return recipe.replace(bits=bits)


def fix_window(recipe: Recipe, items: Sequence[Any]) -> Recipe:
    """Set the window of a recipe that asks for one from the images.

    Args:
        recipe: Recipe of the run.
        items: Good images: files, PIL images or arrays.

    Returns:
        The recipe with the window; the recipe itself unless its window is "auto".

    Raises:
        OSError: If a file does not exist or cannot be opened.
        ValueError: If an image cannot be decoded or has 8 bits, or all images have one value.
    """
    if recipe.window != AUTO or not items:
        return recipe
    return recipe.replace(window=find_window(items, read_given))
