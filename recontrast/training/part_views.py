"""Find the views of parts before training, and join the samples of each part."""

from collections.abc import Mapping, Sequence

from recontrast.data.augment import count_views
from recontrast.data.dataset_sample import Sample
from recontrast.data.part_samples import join_part_samples
from recontrast.data.views import find_views
from recontrast.recipes.recipe import Recipe


def fix_views(
    recipe: Recipe, groups: Mapping[str, Sequence[Sample]]
) -> tuple[Recipe, dict[str, list[Sample]]]:  # fmt: skip
    """Set the names of the views of a recipe that leaves them open, and join the samples of the views of each part.

    Args:
        recipe: Recipe of the run.
        groups: Samples of all views by category, or of parts that are joined already.

    Returns:
        The recipe with the names of the views, and the samples of the parts; both as they are without ``views_from``.

    Raises:
        OSError: If a file of pages cannot be read.
        ValueError: If there are fewer than two views, a part lacks one, or a path has none.
    """
    if recipe.views_from is not None and not recipe.view_names:
        good = [s.path for group in groups.values() for s in group if s.split == "train" and not s.label]
        if good:  # without good images, training raises the error
            recipe = recipe.replace(view_names=find_views(recipe.views_from, good).names)
    return recipe, {name: join_part_samples(samples, recipe.image_views) for name, samples in groups.items()}


def count_trained_images(count: int, recipe: Recipe) -> int:
    """Return the number of images that the network learns from ``count`` images or parts: views, augmented copies."""
    return count * max(len(recipe.view_names), 1) * count_views(recipe.augment)


def describe_views(recipe: Recipe) -> str | None:
    """Describe the views of a part in a sentence; None for single images."""
    if recipe.image_views is None:
        return None
    names = recipe.image_views.describe()
    how = "largest value" if recipe.view_map == "max" else "mean"
    return f"views: {len(recipe.view_names)} images of each part ({names}), a map is the {how} of theirs"
