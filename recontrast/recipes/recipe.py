"""Recipes: everything that decides a training run and its evaluation, as one frozen typed value.

The numbers are those of the paper (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602, Appendix A) and of
the scripts in its public code; each recipe names the script that it restates.
"""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from recontrast.recipes.validation import FIELD_RULES, FLOAT_FIELDS

# Encoder BatchNorm of `recontrast_mvtec.py` and `recontrast_visa.py`: "chosen empirically" by its authors, by category.
MVTEC_BN_EVAL = ("toothbrush", "leather", "grid", "tile", "wood", "screw")
MVTEC_BN_TRAIN = ("carpet", "bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "transistor", "zipper")
VISA_BN_EVAL = ("cashew", "pcb1")
VISA_BN_TRAIN = ("candle", "capsules", "chewinggum", "fryum", "macaroni1", "macaroni2", "pcb2", "pcb3", "pcb4",
                 "pipe_fryum")  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """One training run: data preparation, model, loss, optimisers, map and score.

    ``loss`` to ``pairs`` are the switches of the paper's ablation (Table 6), of one model and one loop; ``views`` is
    that of Table A6. RD4AD is ``train_encoder=False, pairs="self", mining=False``, with ``loss="point"`` as in its
    paper or ``"global"`` as in its code. Defaults are those of upstream's recontrast_mvtec.py.

    Attributes:
        name: that results and errors say.
        backbone: timm's name; the default has torchvision's first weights, the ones that the paper starts from.
        weights: as `recontrast.ReContrast` takes them; None: by name, through the hub.
        steps: of the optimisers.
        batch: images of a step, of all processes together.
        size: pixels, a square or (height, width).
        crop: pixels, centre crop after resizing, likewise; None: all.
        tile: pixels; images keep their own scale and are seen in tiles: ``size`` counts for nothing.
        stride: pixels from one training tile to the next; None: ``tile``, without overlap.
        encoder_bn: mode of the trained encoder's BatchNorm; "auto": by category, see `encoder_bn_for`.
        bn_train_categories, bn_eval_categories: those for which "auto" was chosen so by the authors.
        decoder_lr: learning rate of bottleneck and decoder.
        encoder_lr: learning rate of the trained encoder.
        weight_decay, betas, eps, amsgrad: of AdamW.
        alpha_start, alpha_end: of `recontrast.alpha_at`, standard deviations.
        ramp: share of the steps over which alpha rises, in [0, 1].
        factor: gradient of the easy points, at least 0.
        activation: of the decoder.
        partial_norm: `PartialNorm2d` in the encoders.
        blur, reduce: of `recontrast.AnomalyMap`.
        score: of an image: "max", "mean", or the mean of this top share of its points, in (0, 1].
        mask_rule: of `recontrast.data.images.read_mask`.
        seed: of weights, order and what is held out, from 0 to 2**63 - 1.
        drop_last: whether an epoch's last batch is left out where it is smaller.
        precision: of the convolutions; "bfloat16" by autocast.
        tf32: float32 convolutions in TF32 where the GPU has it: cuDNN's default, and so the reference's.
        channels_last: memory layout; None: as is faster on the device.
        compile: the model through torch.compile: half a minute and more at the start of training.
        graph: steps replayed as a CUDA graph; elsewhere they are not.
        log_every: steps; the loss is read from the device only then.
        checkpoint_every: steps.
        lr_drop: both learning rates are multiplied by it from ``lr_drop_at`` on.
        lr_drop_at: share of the steps, in [0, 1].
        wipe_every: steps after which the decoder's AdamW forgets its moments and its step count; None: never.
        rest: steps after each such wipe in which the encoder is not moved.
        loss: cosine of the whole map (paper), or mean over points (RD4AD's paper).
        mining: hard-normal mining: alpha and factor; of the global loss alone.
        stop_gradient: the target of a pair is a constant.
        train_encoder: False: the one encoder stays as pretrained, as in RD4AD.
        pairs: each encoder rebuilt from the other, or one from itself (L pairs).
        views: pairs of the anomaly map, by their target.
        holdout: share of the good training images that is kept back, to calibrate on, in [0, 1).

    Raises:
        ValueError: a field of another type or out of its range, or fields that exclude each other.
    """

    name: str = "mvtec"
    backbone: str = "wide_resnet50_2.tv_in1k"
    weights: str | None = None
    steps: int = 2000
    batch: int = 16
    size: int | tuple[int, int] = 256
    crop: int | tuple[int, int] | None = None
    tile: int | None = None
    stride: int | None = None
    encoder_bn: Literal["auto", "train", "eval"] = "auto"
    bn_train_categories: tuple[str, ...] = MVTEC_BN_TRAIN
    bn_eval_categories: tuple[str, ...] = MVTEC_BN_EVAL
    decoder_lr: float = 2e-3
    encoder_lr: float = 1e-5
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    alpha_start: float = -3.0
    alpha_end: float = 1.0
    ramp: float = 0.1
    factor: float = 0.0
    activation: Literal["relu", "gelu"] = "relu"
    partial_norm: bool = False
    blur: Literal["reflect", "zero5"] | None = "reflect"
    reduce: Literal["sum", "mean"] = "sum"
    score: Literal["max", "mean"] | float = "max"
    mask_rule: Literal["any", "half"] = "any"
    seed: int = 111
    drop_last: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    tf32: bool = True
    channels_last: bool | None = None
    compile: bool = False
    graph: bool = False
    log_every: int = 20
    checkpoint_every: int = 250
    amsgrad: bool = False
    lr_drop: float = 1.0
    lr_drop_at: float = 1.0
    wipe_every: int | None = None
    rest: int = 0
    loss: Literal["global", "point"] = "global"
    mining: bool = True
    stop_gradient: bool = True
    train_encoder: bool = True
    pairs: Literal["cross", "self"] = "cross"
    views: Literal["both", "trained", "frozen"] = "both"
    holdout: float = 0.0

    def __post_init__(self) -> None:
        """Check every field; whole numbers given for real ones and lists given for tuples are converted."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(value)
            if field.name in FLOAT_FIELDS and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
            if field.name == "betas" and isinstance(value, tuple) and all(type(v) is int for v in value):
                value = tuple(float(v) for v in value)
            holds, wanted = FIELD_RULES[field.name]
            if not holds(value):
                raise ValueError(f"recipe {self.name!r}: {field.name} must be {wanted}, got {value!r}")
            object.__setattr__(self, field.name, value)
        if self.crop is not None and any(c > s for c, s in zip(to_pair(self.crop), to_pair(self.size), strict=True)):
            raise ValueError(
                f"recipe {self.name!r}: crop must not be larger than size {self.size!r}, got {self.crop!r}"
            )
        if both := set(self.bn_train_categories) & set(self.bn_eval_categories):
            raise ValueError(
                f"recipe {self.name!r}: bn_eval_categories must hold no category of bn_train_categories, "
                f"got {sorted(both)} in both"
            )
        for wrong, sentence in (
            (self.tile and self.crop, f"crop must be none where tile is given ({self.tile}), got {self.crop!r}"),
            (
                self.stride and self.stride > (self.tile or 0),
                f"stride must be at most tile ({self.tile}), got {self.stride}",
            ),
            (self.mining and self.loss == "point", "mining must be false where loss is 'point', got true"),
            (
                self.pairs == "cross" and not self.train_encoder,
                "pairs must be 'self' where train_encoder is false, got 'cross' of two equal encoders",
            ),
            (
                self.pairs == "self" and self.views != "both",
                f"views must be 'both' where pairs is 'self', which has one target, got {self.views!r}",
            ),
            (
                self.rest > (self.wipe_every or 0),
                f"rest must be at most wipe_every ({self.wipe_every}), got {self.rest}",
            ),
        ):
            if wrong:
                raise ValueError(f"recipe {self.name!r}: {sentence}")

    @property
    def out(self) -> tuple[int, int]:
        """The height and width, in pixels, of the images or tiles that the model sees and of the maps that it gives."""
        if self.tile is not None:
            return self.tile, self.tile
        return to_pair(self.size if self.crop is None else self.crop)

    def encoder_bn_for(self, category: str) -> Literal["train", "eval"]:
        """The BatchNorm mode of the trained encoder for ``category``.

        With ``encoder_bn="auto"`` as the paper chose it for its own categories, and ``"eval"`` for any other: one
        class in a batch says little about the statistics of another.
        """
        if self.encoder_bn != "auto":
            return self.encoder_bn
        return "train" if category in self.bn_train_categories else "eval"

    def replace(self, **changes: Any) -> "Recipe":
        """A copy with ``changes``, checked.

        Raises:
            ValueError: an unknown field, or a value that is not allowed.
        """
        _refuse_unknown(changes, self.name)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values that JSON can hold."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """The inverse of `to_dict`.

        Args:
            values: fields by name; absent ones take their defaults.

        Returns:
            The recipe.

        Raises:
            ValueError: no mapping, an unknown field, or a value that is not allowed.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"recipe: wanted a mapping of field names to values, got {type(values).__name__}")
        _refuse_unknown(values, str(values.get("name", "mvtec")))
        return cls(**values)


def to_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of ``size``, which may be one number."""
    return (size, size) if isinstance(size, int) else size


def list_differences(one: Recipe, other: Recipe, ignore: tuple[str, ...] = ()) -> list[str]:
    """Each field in which two recipes differ.

    Args:
        one: a recipe.
        other: another.
        ignore: names of fields.

    Returns:
        Texts like ``"batch: 16 and 8"``.
    """
    a, b = one.to_dict(), other.to_dict()
    return [f"{key}: {a[key]!r} and {b[key]!r}" for key in a if key not in ignore and a[key] != b[key]]


def _refuse_unknown(values: Mapping[str, Any], name: str) -> None:
    known = [field.name for field in fields(Recipe)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"recipe {name!r}: there is no field {key!r}{hint}; fields are {', '.join(known)}")
