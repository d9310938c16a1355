"""Combinations of recipe fields that are not allowed."""

from dataclasses import fields
from typing import TYPE_CHECKING

from recontrast.data.roi import EACH
from recontrast.recipes.describe import describe_value
from recontrast.recipes.validation import ARCHITECTURE_FIELDS, SHARED_FIELDS, is_own_name, to_pair

if TYPE_CHECKING:
    from recontrast.recipes.recipe import Recipe


def list_contradictions(recipe: "Recipe") -> list[tuple[bool, str]]:
    """Return, for each combination of fields that is not allowed, whether it is present and its error message."""
    crop_exceeds = recipe.crop is not None and any(
        crop > size for crop, size in zip(to_pair(recipe.crop), to_pair(recipe.size), strict=True)
    )
    in_both = sorted(set(recipe.bn_train_categories) & set(recipe.bn_eval_categories))
    return [
        *_list_of_architecture(recipe),
        (crop_exceeds, f"crop: wanted at most size {recipe.size!r}, got {recipe.crop!r}"),
        (
            bool(in_both),
            f"bn_eval_categories: wanted no category of bn_train_categories, got {describe_value(in_both)} in both",
        ),
        (
            recipe.tile is not None and recipe.crop is not None,
            f"crop: wanted none if tile is given ({recipe.tile}), got {recipe.crop!r}",
        ),
        (
            recipe.tile is not None and recipe.map_size is not None,
            f"map_size: wanted none if tile is given ({recipe.tile}), got {recipe.map_size!r}",
        ),
        (
            recipe.stride is not None and recipe.stride > (recipe.tile or 0),
            f"stride: wanted at most tile ({recipe.tile}), got {recipe.stride}",
        ),
        (recipe.uses_mining and recipe.loss == "point", "mining: wanted false if loss is 'point', got true"),
        (
            recipe.pairs == "cross" and not recipe.train_encoder,
            "pairs: wanted 'self' if train_encoder is false, got 'cross' of two equal encoders",
        ),
        (
            recipe.pairs == "self" and recipe.views != "both",
            f"views: wanted 'both' if pairs is 'self', which has one target, got {recipe.views!r}",
        ),
        *_list_of_views(recipe),
        (None not in (recipe.window, recipe.bits), f"bits: wanted none if window is given, got {recipe.bits}"),
        (bool(recipe.roi) and recipe.score == "model", "score: wanted 'max', 'mean' or a share with roi, got 'model'"),
        (
            recipe.rest > (recipe.wipe_every or 0),
            f"rest: wanted at most wipe_every ({recipe.wipe_every}), got {recipe.rest}",
        ),
    ]


def _list_of_views(recipe: "Recipe") -> list[tuple[bool, str]]:
    """Return the same for fields that exclude several views of a part."""
    has_views = recipe.views_from is not None
    return [
        (
            has_views and recipe.roi == EACH,
            "roi: wanted one mask for all images with views_from, got one for each image",
        ),
        (
            bool(recipe.view_names) and not has_views,
            f"view_names: wanted none without views_from, got {describe_value(recipe.view_names)}",
        ),
    ]


def _list_of_architecture(recipe: "Recipe") -> list[tuple[bool, str]]:
    """Return the same for fields that the architecture or the mining rule does not have."""
    rule, architecture, unused = recipe.rule, recipe.architecture, _find_unused_field(recipe)
    return [
        (
            unused is not None,
            f"{unused}: wanted the default for architecture {architecture!r}, which does not "
            f"have it, got {describe_value(getattr(recipe, unused or 'name'))}",
        ),
        (
            recipe.score == "model" and architecture in ("recontrast", "dinomaly", "inp_former"),
            f"score: wanted 'max', 'mean' or a share for architecture {architecture!r}, got 'model'",
        ),
        (
            architecture != "recontrast" and not is_own_name(architecture) and recipe.views != "both",
            f"views: wanted 'both' for architecture {architecture!r}, which has one encoder, got {recipe.views!r}",
        ),
        (
            architecture in ("padim", "ensemble") and recipe.tile is not None,
            f"tile: wanted none for architecture {architecture!r}, which learns positions in the image, got "
            f"{recipe.tile}",
        ),
        (
            architecture == "ensemble"
            and any(small > side for small, side in zip(to_pair(recipe.small_size), recipe.out, strict=True)),
            f"small_size: wanted at most the size of the images, {' x '.join(map(str, recipe.out))} px, got "
            f"{recipe.small_size!r}",
        ),
        (
            architecture != "patchcore" and not is_own_name(architecture) and isinstance(recipe.levels, tuple),
            f"levels: wanted one number for architecture {architecture!r}, got {recipe.levels!r}",
        ),
        (
            recipe.layers is not None and _find_largest_level(recipe) > len(recipe.layers),
            f"levels: wanted at most {len(recipe.layers or ())}, the number of layers, got {recipe.levels!r}",
        ),
        (
            rule not in ("deviation", "none") and not recipe.mining,
            f"rule: wanted 'deviation' or 'none' if mining is false, got {rule!r}",
        ),
        (
            rule not in ("deviation", "none") and recipe.graph,
            f"graph: wanted false if rule is {rule!r}, whose parameter is a constant of the graph, got true",
        ),
        (
            recipe.optimiser == "stableadamw" and recipe.graph,
            "graph: wanted false if optimiser is 'stableadamw', whose step count is not on the device, got true",
        ),
    ]


def _find_largest_level(recipe: "Recipe") -> int:
    """Return the last level in use; 0 if it is not given."""
    return recipe.levels[-1] if isinstance(recipe.levels, tuple) else recipe.levels or 0


def _find_unused_field(recipe: "Recipe") -> str | None:
    """Return the first field that differs from its default although the architecture does not have it."""
    own = ARCHITECTURE_FIELDS.get(recipe.architecture)  # None: an architecture of a user that is not imported
    defaults = {field.name: field.default for field in fields(recipe) if field.name in SHARED_FIELDS}
    unused = [name for name, default in defaults.items() if getattr(recipe, name) != default]
    return None if own is None else next((name for name in unused if name not in own), None)
