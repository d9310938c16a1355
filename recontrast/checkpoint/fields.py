"""Types and ranges of the fields of a checkpoint, checked before any of them is used."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from recontrast.calibration.conformal import Calibration
from recontrast.lazy_import import LazyModule
from recontrast.recipes.describe import describe_value
from recontrast.recipes.recipe import Recipe
from recontrast.recipes.validation import is_own_name

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

_MAX_OPTIMISERS = 16
_CONFIG_TYPES = {
    "backbone": str, "decoder": str, "activation": str, "partial_norm": bool, "pairs": str, "train_encoder": bool,
    "encoder_bn": str, "embedding": str, "dimension": int, "neighbours": int, "features": int, "seed": int,
    "width": int, "heads": int, "feedforward": int, "dropout": float, "jitter": float, "prototypes": int,
}  # fmt: skip
_CONFIG_NUMBERS = ("levels", "size", "small_size")  # a whole number, a list of up to 16, or none


def check_fields(content: Mapping[str, Any]) -> None:
    """Raise an error if a field of a checkpoint has the wrong type or is out of range.

    Args:
        content: Fields by name, as they are stored; see `recontrast.checkpoint.Checkpoint`. The recipe and the
            calibration are not checked.

    Raises:
        ValueError: If a field is invalid. The message names it.
    """
    for name, (is_valid, wanted) in _RULES.items():
        if not is_valid(content[name]):
            raise ValueError(f"{name}: wanted {wanted}, got {describe_value(content[name])}")
    recipe = content["recipe"]
    if isinstance(recipe, Mapping) and is_own_name(recipe.get("architecture")):
        return  # arguments of a class of the user
    for name, kind in _CONFIG_TYPES.items():
        value = content["model_config"].get(name)
        if value is not None and type(value) is not kind:
            raise ValueError(f"model_config: {name}: wanted a {kind.__name__}, got {describe_value(value)}")
    for name in _CONFIG_NUMBERS:
        value = content["model_config"].get(name, 1)
        numbers = value if isinstance(value, list | tuple) else [1 if value is None else value]
        if len(numbers) > 16 or not all(_is_whole(number, 1) for number in numbers):
            wanted = "a whole number of at least 1 or up to 16 of them"
            raise ValueError(f"model_config: {name}: wanted {wanted}, got {describe_value(value)}")
    for name in ("layers", "blocks"):
        if not _is_layers(value := content["model_config"].get(name)):
            wanted = "a whole number of at least 1 or groups of blocks"
            raise ValueError(f"model_config: {name}: wanted {wanted}, got {describe_value(value)}")


def parse_recipe(values: Any) -> Recipe:
    """Create a recipe from the values in a checkpoint or an exported file.

    Args:
        values: Stored values, of any type.

    Returns:
        The recipe.

    Raises:
        ValueError: If the values are not those of a recipe.
    """
    try:
        return Recipe.from_dict(values)
    except (TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"recipe: wanted valid values, got {describe_value(values)}") from error


def parse_calibration(values: Any) -> Calibration | None:
    """Create a calibration from the values in a checkpoint or an exported file.

    Args:
        values: Stored values, of any type; None if there is no calibration.

    Returns:
        The calibration, or None.

    Raises:
        ValueError: If the values are not those of a calibration.
    """
    if values is None:
        return None
    if isinstance(values, Mapping) and values.keys() >= {"scores", *_CALIBRATION_RULES} - _OPTIONAL:
        scores, looks = values["scores"], values.get("looks", [])
        if not _is_numbers(scores):
            raise ValueError(f"calibration: scores: wanted a list of numbers, got {describe_value(scores)}")
        # The lengths are compared first: a file can repeat one list so often that all of them fill the memory.
        if not isinstance(looks, list | tuple) or len(looks) not in (0, len(scores)) or any(
            not _is_numbers(numbers) or len(numbers) > 16 for numbers in looks
        ):  # fmt: skip
            raise ValueError(f"calibration: looks: wanted numbers for each score, got {describe_value(looks)}")
        for name, (is_valid, wanted) in _CALIBRATION_RULES.items():
            if name in values and not is_valid(values[name]):
                raise ValueError(f"calibration: {name}: wanted {wanted}, got {describe_value(values[name])}")
    try:
        return Calibration.from_dict(values)
    except (TypeError, AttributeError, LookupError, OverflowError, RecursionError) as error:
        raise ValueError(f"calibration: wanted valid values, got {describe_value(values)}") from error


def find_not_finite(weights: "Mapping[str, torch.Tensor]") -> str | None:
    """Return the name of the first tensor with a value that is NaN or infinite; None if all values are finite.

    Args:
        weights: Tensors by name, of any shape and dtype.
    """
    for name, value in weights.items():
        # A finite sum implies finite values, and is computed in a fraction of the time.
        if value.is_floating_point() and not value.sum().isfinite() and not value.isfinite().all():
            return name
    return None


def _is_whole(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < 2**63


def _is_layers(value: Any) -> bool:
    """Return whether a value is none, a number of layers, or up to 64 groups of up to 64 block indices."""
    if value is None or _is_whole(value, 1):
        return True
    return isinstance(value, list | tuple) and len(value) <= 64 and all(
        isinstance(group, list | tuple) and len(group) <= 64 and all(map(_is_whole, group)) for group in value
    )  # fmt: skip


def is_finite(value: Any) -> bool:
    """Return whether a value is a finite number; a bool is not."""
    return type(value) in (int, float) and abs(value) < 2**1023 and math.isfinite(value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(is_finite, value))


def _is_preprocessing(value: Any) -> bool:
    if not _is_mapping(value) or any(not _is_numbers(value.get(name)) for name in ("mean", "std")):
        return False
    pairs = [value.get(name) for name in ("size", "crop")]
    return (
        len(value["mean"]) == len(value["std"]) == 3
        and min(value["std"]) > 0
        and all(pair is None or _is_numbers(pair) for pair in pairs)
    )


def is_images(value: Any) -> bool:
    """Return whether a value is a description of images, see `recontrast.data.fingerprint.describe_images`."""
    return (
        _is_mapping(value)
        and _is_whole(value.get("count", 0))
        and _is_whole(value.get("observed", 0))
        and type(value.get("digest")) is str
        and type(value.get("each", "")) is str
        and isinstance(groups := value.get("groups", []), list)
        and all(type(name) is str for name in groups)
    )


def _is_mapping(value: Any) -> bool:
    """Return whether a value is a dictionary with names as keys."""
    return isinstance(value, dict) and all(type(key) is str for key in value)


def _is_weights(value: Any) -> bool:
    return _is_mapping(value) and all(isinstance(tensor, torch.Tensor) for tensor in value.values())


def _is_optimiser(value: Any) -> bool:
    """Return whether a value has the form of the ``state_dict`` of an optimiser."""
    if not _is_mapping(value) or value.keys() != {"state", "param_groups"} or not isinstance(value["state"], dict):
        return False
    states, groups = value["state"].values(), value["param_groups"]
    return all(
        _is_mapping(state) and all(isinstance(v, torch.Tensor) or is_finite(v) for v in state.values())
        for state in states
    ) and (
        isinstance(groups, list)
        and len(groups) <= _MAX_OPTIMISERS
        and all(_is_mapping(group) and isinstance(group.get("params"), list) for group in groups)
        and all(_is_scalar(v) or _is_numbers(v) for group in groups for v in group.values())
    )


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | bool | torch.Tensor) or is_finite(value)


def _is_rng(value: Any) -> bool:
    """Return whether a value holds the states of the random generators, or is empty."""
    if not _is_mapping(value):
        return False
    if not value:
        return True
    batches, states = value.get("batches"), [value.get("torch")]
    if not _is_mapping(batches) or not _is_whole(batches.get("place")):
        return False
    states += [batches.get("generator"), *(value[name] for name in ("cuda", "mps") if value.get(name) is not None)]
    return all(isinstance(state, torch.Tensor) and state.dtype == torch.uint8 and state.ndim == 1 for state in states)


# Field -> function that returns whether a value is valid, and a description of valid values.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_is_whole, "a whole number of at least 0"),
    "category": (lambda v: type(v) is str, "a name"),
    "model_config": (_is_mapping, "arguments by name"),
    "preprocessing": (_is_preprocessing, "the sizes, and mean and std of three channels"),
    "images": (is_images, "the count and the digest of the training images"),
    "model": (_is_weights, "tensors by name"),
    "optimisers": (
        lambda v: isinstance(v, list) and len(v) <= _MAX_OPTIMISERS and all(map(_is_optimiser, v)),
        "a list of optimiser states",
    ),
    "rng": (_is_rng, "the states of the random generators"),
    "version": (lambda v: type(v) is str, "a version"),
}
_CALIBRATION_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rate": (is_finite, "a number"),
    "threshold": (is_finite, "a number"),
    "pixel_threshold": (lambda v: v is None or is_finite(v), "a number or none"),
    "pixel_rate": (lambda v: is_finite(v) and 0 < v < 1, "a share above 0 and below 1"),
    "pixel_guarantee": (lambda v: type(v) is bool, "true or false"),
    "source": (lambda v: type(v) is str, "a text"),
    "weights": (lambda v: type(v) is str, "a digest"),
    "views": (lambda v: v in (None, "both", "trained", "frozen"), "both, trained or frozen"),
    "precision": (lambda v: v in (None, "float32", "bfloat16"), "float32 or bfloat16"),
    "image_count": (lambda v: v is None or _is_whole(v), "a number of images"),
}
_OPTIONAL = {"views", "precision", "image_count"}  # missing in older calibrations
