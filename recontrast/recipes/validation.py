"""Rules for the fields of a `Recipe`: which values are valid."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from recontrast.data.roi import EACH, decode_mask
from recontrast.data.views import PAGES, is_pattern
from recontrast.data.window import AUTO, is_window
from recontrast.recipes.describe import describe_value

# Function that returns whether a value is valid, and a description of valid values for error messages.
FieldRule = tuple[Callable[[Any], bool], str]


def _is_integer(value: Any) -> bool:
    """Return whether ``value`` is an integer of at most 63 bits; a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _integer(minimum: int) -> FieldRule:
    """Return the rule for integers of at least ``minimum``."""
    return lambda v: _is_integer(v) and v >= minimum, f"a whole number of at least {minimum}"


def _float(is_valid: Callable[[float], bool], wanted: str) -> FieldRule:
    """Return the rule for finite floats that fulfil a condition."""
    return lambda v: isinstance(v, float) and math.isfinite(v) and is_valid(v), wanted


def _one_of(*choices: Any) -> FieldRule:
    """Return the rule for a fixed set of values."""
    return lambda v: any(v is c or (isinstance(v, str) and v == c) for c in choices), "one of " + ", ".join(
        map(repr, choices)
    )


def _is_size(value: Any) -> bool:
    """Return whether ``value`` is a positive integer or a pair of them."""
    if isinstance(value, tuple):
        return len(value) == 2 and all(_is_integer(v) and v >= 1 for v in value)
    return _is_integer(value) and value >= 1


def _is_names(value: Any) -> bool:
    """Return whether ``value`` is a tuple of strings."""
    return isinstance(value, tuple) and all(isinstance(v, str) for v in value)


def _is_view_names(value: Any) -> bool:
    """Return whether ``value`` is an empty tuple, or one of at least two different names."""
    return _is_names(value) and (not value or (len(value) > 1 and all(value) and len(set(value)) == len(value)))


def _is_levels(value: Any) -> bool:
    """Return whether ``value`` is None, a number of levels, or ascending numbers of levels, from 1 to 16."""
    numbers = value if isinstance(value, tuple) else (value,)
    return value is None or (
        len(numbers) > 0
        and all(_is_integer(v) and 1 <= v <= 16 for v in numbers)
        and list(numbers) == sorted(set(numbers))
    )


def _is_shots(value: Any) -> bool:
    """Return whether ``value`` is None, a number of images, or numbers by class."""
    if isinstance(value, Mapping):
        return len(value) > 0 and all(name and _is_integer(v) and v >= 1 for name, v in value.items())
    return value is None or (_is_integer(value) and value >= 1)


def _is_layers(value: Any) -> bool:
    """Return whether ``value`` is None, or non-empty groups of ascending block numbers, from 0 to 1023."""
    if value is None:
        return True
    if not isinstance(value, tuple) or not value or not all(isinstance(group, tuple) and group for group in value):
        return False
    blocks = [block for group in value for block in group]
    return all(_is_integer(v) and 0 <= v < 1024 for v in blocks) and blocks == sorted(set(blocks))


def _is_options(value: Any) -> bool:
    """Return whether ``value`` maps up to 64 names to plain values or tuples of them."""
    return isinstance(value, Mapping) and len(value) <= 64 and all(
        isinstance(name, str) and name.isidentifier() and all(map(_is_plain, v if isinstance(v, tuple) else (v,)))
        for name, v in value.items()
    )  # fmt: skip


def _is_roi(value: Any) -> bool:
    """Return whether ``value`` is None, "each", or an encoded mask."""
    if value is None or (isinstance(value, str) and value == EACH):
        return True
    try:
        return isinstance(value, str) and decode_mask(value) is not None
    except ValueError:
        return False


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | bool) or _is_integer(value)


_SIZE: FieldRule = (_is_size, "a whole number of pixels or a pair (height, width)")
_NAMES: FieldRule = (_is_names, "a list of category names")
_FLAG: FieldRule = (lambda v: isinstance(v, bool), "true or false")
_RATE = _float(lambda v: v >= 0, "a number of at least 0")
_FINITE = _float(lambda v: True, "a number")
_SHARE = _float(lambda v: 0 <= v <= 1, "a share from 0 to 1")
_POSITIVE_SHARE = _float(lambda v: 0 < v <= 1, "a share above 0 and up to 1")

# Architecture -> recipe fields that only this one or some architectures have.
_STEP_FIELDS = ("optimiser", "schedule", "warmup", "lr_end", "clip", "sampling")
_RULE_FIELDS = ("rule", "fraction_start", "fraction_end", "exponent_start", "exponent_end")
ARCHITECTURE_FIELDS: dict[str, tuple[str, ...]] = {
    "recontrast": (*_RULE_FIELDS, *_STEP_FIELDS, "decoder", "levels", "layers"),
    "patchcore": ("levels", "layers", "bank_share", "bank_neighbours", "bank_embedding"),
    "padim": ("levels", "layers", "gaussian_features"),
    "ensemble": ("layers", "bank_share", "gaussian_features", "small_size"),
    "uniad": (*_STEP_FIELDS, "levels", "layers", "jitter"),
    "dinomaly": (*_RULE_FIELDS, *_STEP_FIELDS, "layers", "bottleneck_dropout", "recentre"),
    "inp_former": (*_RULE_FIELDS, *_STEP_FIELDS, "layers", "prototypes", "coherence"),
}
ONE_PASS = {"patchcore", "padim", "ensemble"}  # architectures that are fitted in one pass
OWN_OPTIONS: dict[str, Mapping[str, Any]] = {}  # architecture of a user -> its options and their defaults
SHARED_FIELDS = frozenset(name for names in ARCHITECTURE_FIELDS.values() for name in names)  # that not all have
_OWN_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)


def to_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width of ``size``, which is a pair or one number for a square."""
    return (size, size) if isinstance(size, int) else size


def is_own_name(value: Any) -> bool:
    """Return whether a value is the name of an architecture of a user: ``MODULE:NAME``, as Python writes both."""
    return isinstance(value, str) and len(value) <= 200 and _OWN_NAME.fullmatch(value) is not None


def check_options(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the options of an architecture, and complete them by its defaults.

    Args:
        name: Name of the architecture.
        given: Options by name.

    Returns:
        All options. Those of an architecture that is not imported stay as they are.

    Raises:
        ValueError: If the architecture has no such option, or a value is not of the type of its default.
    """
    if is_own_name(name) and name not in OWN_OPTIONS:
        return dict(given)
    defaults = OWN_OPTIONS.get(name, {})
    options = dict(defaults)
    for key, value in given.items():
        if key not in defaults:
            wanted = f"options among {', '.join(defaults)}" if defaults else f"none for architecture {name!r}"
            raise ValueError(f"options: wanted {wanted}, got {describe_value(key)}")
        kind = type(defaults[key])
        if kind is float and _is_integer(value):
            value = float(value)
        if type(value) is not kind and defaults[key] is not None:
            raise ValueError(f"options: {key}: wanted a value such as {defaults[key]!r}, got {describe_value(value)}")
        options[key] = value
    return options


FIELD_RULES: dict[str, FieldRule] = {
    "name": (lambda v: isinstance(v, str) and bool(v), "a name"),
    "architecture": (
        lambda v: isinstance(v, str) and (v in ARCHITECTURE_FIELDS or is_own_name(v)),
        f"one of {', '.join(map(repr, ARCHITECTURE_FIELDS))}, or an architecture of your own as 'MODULE:NAME'",
    ),
    "options": (_is_options, "options by name, with texts, numbers, true, false, none or lists of them"),
    "backbone": (lambda v: isinstance(v, str) and bool(v), "the name of a timm model"),
    "weights": (lambda v: v is None or (isinstance(v, str) and bool(v)), 'none, a file, "package" or "random"'),
    "steps": _integer(1),
    "batch": _integer(1),
    "size": _SIZE,
    "crop": (lambda v: v is None or _is_size(v), f"none, {_SIZE[1]}"),
    "tile": (lambda v: v is None or (_is_integer(v) and v >= 1), "none or a whole number of pixels"),
    "stride": (lambda v: v is None or (_is_integer(v) and v >= 1), "none or a whole number of pixels"),
    "encoder_bn": _one_of("auto", "train", "eval"),
    "bn_train_categories": _NAMES,
    "bn_eval_categories": _NAMES,
    "decoder_lr": _RATE,
    "encoder_lr": _RATE,
    "weight_decay": _RATE,
    "betas": (
        lambda v: isinstance(v, tuple) and len(v) == 2 and all(isinstance(b, float) and 0 <= b < 1 for b in v),
        "two numbers of at least 0 and below 1",
    ),
    "eps": _float(lambda v: v > 0, "a number above 0"),
    "alpha_start": _FINITE,
    "alpha_end": _FINITE,
    "ramp": _SHARE,
    "factor": _float(lambda v: v >= 0, "a number of at least 0"),
    "activation": _one_of("relu", "gelu"),
    "partial_norm": _FLAG,
    "blur": _one_of("reflect", "zero5", None),
    "reduce": _one_of("sum", "mean"),
    "score": (
        lambda v: v in ("max", "mean", "model") if isinstance(v, str) else isinstance(v, float) and 0 < v <= 1,
        '"max", "mean", "model" or a share above 0 and up to 1',
    ),
    "levels": (_is_levels, "none, a whole number from 1 to 16 or an ascending list of them"),
    "layers": (_is_layers, "none or groups of blocks, such as [[2, 3], [4, 5]], whose numbers ascend"),
    "decoder": _one_of("auto", "resnet", "mirror"),
    "rule": _one_of("deviation", "hardest", "power", "none"),
    "fraction_start": _POSITIVE_SHARE,
    "fraction_end": _POSITIVE_SHARE,
    "exponent_start": _RATE,
    "exponent_end": _RATE,
    "optimiser": _one_of("adamw", "adam", "sgd", "stableadamw"),
    "schedule": _one_of("drop", "cosine", "linear", "cosine_from_zero"),
    "warmup": _float(lambda v: 0 <= v < 1, "a share of at least 0 and below 1"),
    "lr_end": _SHARE,
    "clip": (lambda v: v is None or (isinstance(v, float) and 0 < v < math.inf), "none or a number above 0"),
    "bank_share": _POSITIVE_SHARE,
    "bank_neighbours": _integer(1),
    "bank_embedding": _one_of("average", "unfold"),
    "gaussian_features": _integer(1),
    "small_size": _SIZE,
    "jitter": _RATE,
    "sampling": _one_of("images", "classes"),
    "shots": (_is_shots, "none, a whole number of at least 1 or numbers by class"),
    "augment": _one_of("none", "rotations", "flips", "inp_former"),
    "bottleneck_dropout": _float(lambda v: 0 <= v < 1, "a share of at least 0 and below 1"),
    "recentre": _FLAG,
    "prototypes": _integer(1),
    "coherence": _RATE,
    "fused_norm": _FLAG,
    "cudnn_benchmark": _FLAG,
    "map_size": (lambda v: v is None or _is_size(v), f"none, {_SIZE[1]}"),
    "roi": (_is_roi, "none, 'each' or a mask as recontrast.data.roi.encode_mask writes it (--roi takes files)"),
    "window": (
        lambda v: v is None or v == AUTO or is_window(v),
        "none, 'auto' or two numbers [LOW, HIGH], the lower one first",
    ),
    "views_from": (
        lambda v: v is None or (isinstance(v, str) and (v == PAGES or is_pattern(v))),
        "none, 'pages' or a regular expression with one pair of parentheses around the name of the view",
    ),
    "view_names": (_is_view_names, "no views, or at least two different names"),
    "view_map": _one_of("max", "mean"),
    "bits": (lambda v: v is None or (_is_integer(v) and 8 <= v <= 16), "none or a whole number from 8 to 16"),
    "mask_rule": _one_of("any", "half"),
    "amsgrad": _FLAG,
    "lr_drop": _float(lambda v: v > 0, "a number above 0"),
    "lr_drop_at": _SHARE,
    "wipe_every": (lambda v: v is None or (_is_integer(v) and v >= 1), "none or a whole number of at least 1"),
    "rest": _integer(0),
    "loss": _one_of("global", "point"),
    "mining": _FLAG,
    "stop_gradient": _FLAG,
    "train_encoder": _FLAG,
    "pairs": _one_of("cross", "self"),
    "views": _one_of("both", "trained", "frozen"),
    "holdout": _float(lambda v: 0 <= v < 1, "a share of at least 0 and below 1"),
    "seed": (lambda v: _is_integer(v) and 0 <= v < 2**63, "a whole number from 0 to 2**63 - 1"),
    "drop_last": _FLAG,
    "precision": _one_of("float32", "bfloat16"),
    "tf32": _FLAG,
    "channels_last": (lambda v: v is None or isinstance(v, bool), "true, false or none"),
    "compile": _FLAG,
    "graph": _FLAG,
    "log_every": _integer(1),
    "checkpoint_every": _integer(1),
}
# Fields of type float; integers are converted.
FLOAT_FIELDS = (
    "decoder_lr",
    "encoder_lr",
    "weight_decay",
    "eps",
    "alpha_start",
    "alpha_end",
    "ramp",
    "factor",
    "score",
    "lr_drop",
    "lr_drop_at",
    "holdout",
    "fraction_start",
    "fraction_end",
    "exponent_start",
    "exponent_end",
    "warmup",
    "lr_end",
    "clip",
    "bank_share",
    "jitter",
    "bottleneck_dropout",
    "coherence",
)
