"""Recipes: everything that decides a training run and its evaluation, as one frozen typed value.

The numbers are those of the paper (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602, Appendix A) and of
the scripts in its public code; each recipe names the script that it restates.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

# Encoder BatchNorm of `recontrast_mvtec.py`: "chosen empirically" by its authors, by category.
MVTEC_BN_EVAL = ("toothbrush", "leather", "grid", "tile", "wood", "screw")
MVTEC_BN_TRAIN = ("carpet", "bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "transistor", "zipper")


@dataclass(frozen=True)
class Recipe:
    """One training run: data preparation, model, optimisers, alpha ramp, map and score."""

    name: str = "mvtec"
    backbone: str = "wide_resnet50_2.tv_in1k"  # torchvision's first weights, the ones that the paper starts from
    weights: str | None = None  # as `recontrast.ReContrast` takes them; None: by name, through the hub
    steps: int = 2000
    batch: int = 16
    size: int | tuple[int, int] = 256  # pixels, a square or (height, width)
    crop: int | tuple[int, int] | None = None  # pixels, centre crop after resizing
    encoder_bn: Literal["auto", "train", "eval"] = "auto"  # auto: by category, see `encoder_bn_for`
    bn_train_categories: tuple[str, ...] = MVTEC_BN_TRAIN
    bn_eval_categories: tuple[str, ...] = MVTEC_BN_EVAL
    decoder_lr: float = 2e-3  # bottleneck and decoder
    encoder_lr: float = 1e-5
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    alpha_start: float = -3.0
    alpha_end: float = 1.0
    ramp: float = 0.1  # share of the steps over which alpha rises
    factor: float = 0.0  # gradient of the easy points
    activation: Literal["relu", "gelu"] = "relu"
    partial_norm: bool = False
    blur: Literal["reflect", "zero5"] | None = "reflect"
    reduce: Literal["sum", "mean"] = "sum"
    score: Literal["max", "mean"] | float = (
        "max"  # of an image: "max", "mean", or the mean of this top share of its points
    )
    mask_rule: Literal["any", "half"] = "any"
    seed: int = 111
    drop_last: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    channels_last: bool | None = None  # None: as is faster on the device
    graph: bool = False  # steps replayed as a CUDA graph; elsewhere they are not
    log_every: int = 20  # steps; the loss is read from the device only then
    checkpoint_every: int = 250  # steps

    def __post_init__(self) -> None:
        """Check every field; whole numbers given for real ones and lists given for tuples are converted."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(value)
            if field.name in _REAL and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if field.name == "betas" and isinstance(value, tuple) and all(type(v) is int for v in value):
                value = tuple(float(v) for v in value)
            holds, wanted = _WANTED[field.name]
            if not holds(value):
                raise ValueError(f"recipe {self.name!r}: {field.name} must be {wanted}, got {value!r}")
            object.__setattr__(self, field.name, value)
        if self.crop is not None and any(c > s for c, s in zip(pair(self.crop), pair(self.size), strict=True)):
            raise ValueError(
                f"recipe {self.name!r}: crop must not be larger than size {self.size!r}, got {self.crop!r}"
            )
        if both := set(self.bn_train_categories) & set(self.bn_eval_categories):
            raise ValueError(
                f"recipe {self.name!r}: bn_eval_categories must hold no category of bn_train_categories, "
                f"got {sorted(both)} in both"
            )

    @property
    def out(self) -> tuple[int, int]:
        """Height and width, in pixels, of the images that the model sees and of the maps that it gives."""
        return pair(self.size if self.crop is None else self.crop)

    def encoder_bn_for(self, category: str) -> Literal["train", "eval"]:
        """BatchNorm mode of the trained encoder for ``category``.

        With ``encoder_bn="auto"`` as the paper chose it for its own categories, and ``"eval"`` for any other: one
        class in a batch says little about the statistics of another.
        """
        if self.encoder_bn != "auto":
            return self.encoder_bn
        return "train" if category in self.bn_train_categories else "eval"

    def replace(self, **changes: Any) -> "Recipe":
        """A copy with ``changes``, checked."""
        _refuse_unknown(changes, self.name)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values that JSON can hold."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """The inverse of `to_dict`; absent fields take their defaults, unknown ones are refused."""
        if not isinstance(values, Mapping):
            raise ValueError(f"recipe: wanted a mapping of field names to values, got {type(values).__name__}")
        _refuse_unknown(values, str(values.get("name", "mvtec")))
        return cls(**values)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a size that may be one number."""
    return (size, size) if isinstance(size, int) else size


def differences(one: Recipe, other: Recipe, ignore: tuple[str, ...] = ()) -> list[str]:
    """One text for each field in which two recipes differ: ``"batch: 16 and 8"``."""
    a, b = one.to_dict(), other.to_dict()
    return [f"{key}: {a[key]!r} and {b[key]!r}" for key in a if key not in ignore and a[key] != b[key]]


def _refuse_unknown(values: Mapping[str, Any], name: str) -> None:
    known = [field.name for field in fields(Recipe)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"recipe {name!r}: there is no field {key!r}{hint}; fields are {', '.join(known)}")


# ---- what each field may hold ------------------------------------------------

Rule = tuple[Callable[[Any], bool], str]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(least: int) -> Rule:
    return lambda v: _is_whole(v) and v >= least, f"a whole number of at least {least}"


def _real(holds: Callable[[float], bool], wanted: str) -> Rule:
    return lambda v: isinstance(v, float) and math.isfinite(v) and holds(v), wanted


def _one_of(*choices: Any) -> Rule:
    return lambda v: any(v is c or (isinstance(v, str) and v == c) for c in choices), "one of " + ", ".join(
        map(repr, choices)
    )


def _is_extent(value: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) == 2 and all(_is_whole(v) and v >= 1 for v in value)
    return _is_whole(value) and value >= 1


def _is_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(v, str) for v in value)


_EXTENT: Rule = (_is_extent, "a whole number of pixels or a pair (height, width)")
_NAMES: Rule = (_is_names, "a list of category names")
_FLAG: Rule = (lambda v: isinstance(v, bool), "true or false")
_RATE = _real(lambda v: v >= 0, "a number of at least 0")
_ANY = _real(lambda v: True, "a number")

_WANTED: dict[str, Rule] = {
    "name": (lambda v: isinstance(v, str) and bool(v), "a name"),
    "backbone": (lambda v: isinstance(v, str) and bool(v), "the name of a timm model"),
    "weights": (lambda v: v is None or (isinstance(v, str) and bool(v)), 'none, a file, "package" or "random"'),
    "steps": _whole(1),
    "batch": _whole(1),
    "size": _EXTENT,
    "crop": (lambda v: v is None or _is_extent(v), f"none, {_EXTENT[1]}"),
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
    "eps": _real(lambda v: v > 0, "a number above 0"),
    "alpha_start": _ANY,
    "alpha_end": _ANY,
    "ramp": _real(lambda v: 0 <= v <= 1, "a share from 0 to 1"),
    "factor": _real(lambda v: v >= 0, "a number of at least 0"),
    "activation": _one_of("relu", "gelu"),
    "partial_norm": _FLAG,
    "blur": _one_of("reflect", "zero5", None),
    "reduce": _one_of("sum", "mean"),
    "score": (
        lambda v: v in ("max", "mean") if isinstance(v, str) else isinstance(v, float) and 0 < v <= 1,
        '"max", "mean" or a share above 0 and up to 1',
    ),
    "mask_rule": _one_of("any", "half"),
    "seed": (lambda v: _is_whole(v) and 0 <= v < 2**63, "a whole number from 0 to 2**63 - 1"),
    "drop_last": _FLAG,
    "precision": _one_of("float32", "bfloat16"),
    "channels_last": (lambda v: v is None or isinstance(v, bool), "true, false or none"),
    "graph": _FLAG,
    "log_every": _whole(1),
    "checkpoint_every": _whole(1),
}
_REAL = (
    "decoder_lr",
    "encoder_lr",
    "weight_decay",
    "eps",
    "alpha_start",
    "alpha_end",
    "ramp",
    "factor",
    "score",
)

RECIPES: dict[str, Recipe] = {
    "mvtec": Recipe(name="mvtec"),  # recontrast_mvtec.py
}
