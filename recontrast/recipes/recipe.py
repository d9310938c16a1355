"""`Recipe`: all settings of a training run and its evaluation, as a frozen dataclass.

The numbers are those of the paper (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602, appendix A) and of its
public code.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from textwrap import shorten
from typing import Any, Literal

from recontrast.data.roi import describe_roi
from recontrast.data.views import Views
from recontrast.recipes.contradictions import list_contradictions
from recontrast.recipes.describe import describe_value
from recontrast.recipes.frozen_mapping import FrozenMapping
from recontrast.recipes.validation import FIELD_RULES, FLOAT_FIELDS, ONE_PASS, check_options, to_pair

# Mode of the encoder's BatchNorm for each category in recontrast_mvtec.py and recontrast_visa.py, according to the
# authors "chosen empirically".
MVTEC_BN_EVAL = ("toothbrush", "leather", "grid", "tile", "wood", "screw")
MVTEC_BN_TRAIN = ("carpet", "bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "transistor", "zipper")
VISA_BN_EVAL = ("cashew", "pcb1")
VISA_BN_TRAIN = ("candle", "capsules", "chewinggum", "fryum", "macaroni1", "macaroni2", "pcb2", "pcb3", "pcb4",
                 "pipe_fryum")  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """All settings of a training run and its evaluation: data, model, loss, optimisers, anomaly map and score.

    The defaults are those of upstream's recontrast_mvtec.py. The fields from ``loss`` to ``pairs`` are the switches of
    the paper's ablation (Table 6), and ``views`` is that of Table A6. RD4AD is ``train_encoder=False, pairs="self",
    mining=False``, with ``loss="point"`` as in its paper or ``loss="global"`` as in its code.

    Attributes:
        name: Name in results and error messages. Default: "mvtec".
        architecture: Network: "recontrast", the default (with RD4AD, see above), "patchcore", "padim", "ensemble" (both
            on one encoder), "uniad", "dinomaly" and "inp_former" (both on a vision transformer), or one of your own as
            "MODULE:NAME", see `recontrast.register_architecture`. PatchCore, PaDiM and their ensemble are fitted in one
            pass over the images and ignore ``steps`` and all fields of the optimisers.
        backbone: timm name of the encoder. Default: "wide_resnet50_2.tv_in1k", torchvision's WideResNet-50-2 with its
            first ImageNet weights, as in the paper.
        weights: Source of the pretrained weights: a file, "package" (an installed package) or "random". None, the
            default, downloads them by name from timm's hub.
        steps: Number of optimiser steps. Default: 2000.
        batch: Images per step, over all processes. Default: 16.
        size: Size to which images are resized, in pixels: (height, width), or one number for a square. The aspect ratio
            is not kept. Default: 256.
        crop: Size of the centre crop after resizing, in pixels. None, the default, keeps the whole image. The paper
            crops to 224 for ISIC 2018.
        tile: Side of square tiles, in pixels. If set, images keep their original scale and are processed in tiles, and
            ``size`` is ignored. None, the default, resizes whole images, as the paper does.
        stride: Distance from one training tile to the next, in pixels. None, the default, uses ``tile``: no overlap.
        encoder_bn: Mode of BatchNorm in the trained encoder: "train" normalises with batch statistics, "eval" with
            the pretrained ones. "auto", the default, selects the mode by category, see `encoder_bn_for`.
        bn_train_categories: Categories for which "auto" means "train". Default: those of MVTec AD in upstream's script.
        bn_eval_categories: Categories for which "auto" means "eval". Default: those of MVTec AD in upstream's script.
        decoder_lr: Learning rate of bottleneck and decoder. Default: 2e-3.
        encoder_lr: Learning rate of the trained encoder. Default: 1e-5.
        weight_decay: Weight decay of AdamW. Default: 1e-5.
        betas: Decay rates of the first and second moment in AdamW. Default: (0.9, 0.999).
        eps: Constant added to the denominator in AdamW. Default: 1e-8; 1e-10 in the stable and unified scripts.
        alpha_start: Alpha of hard-normal mining at the first step, in standard deviations. Points whose distance is
            below mean + alpha * std count as easy. Default: -3, where hardly any do.
        alpha_end: Alpha after the ramp, in standard deviations. Default: 1, where about 84 % of the points are easy.
        ramp: Share of the steps over which alpha rises linearly, in [0, 1]. Default: 0.1; 0.2 in the stable scripts.
        factor: Weight of the gradient of easy points, at least 0. Default: 0, which removes it.
        activation: Activation of the decoder: "relu", the default, or "gelu" in the unified scripts.
        partial_norm: Whether the encoders use `recontrast.models.partial_norm.PartialNorm2d`, which bounds the batch
            variance from below, against the loss spikes of appendix E. Default: False; True in the stable scripts.
        blur: Gaussian blur of the anomaly map, sigma 4 pixels: "reflect", the default, has 33 taps and mirrored
            borders; "zero5", of the unified scripts, has 5 taps and zeros outside. None disables it.
        reduce: How the maps of all pairs are combined: "sum", the default, or "mean" in the unified scripts.
        score: Image score from the map: "max", the default, "mean", or the mean of the highest values, given as their
            share of all pixels in (0, 1]. Stable (MVTec AD) and unified scripts use 0.01. "model" is the score that
            the architecture defines (PatchCore: weighted distance of the worst point; PaDiM: largest point distance;
            UniAD: largest mean of 16 x 16 pixels; ensemble: sum of both standardised scores); ReContrast has none.
        mask_rule: Pixels of a resized mask that count as anomalous: "any", the default, takes all above zero, as
            upstream; "half" takes those of at least half of full scale. See `recontrast.data.images.read_mask`.
        seed: Seed of weights, batch order and hold-out split, from 0 to 2**63 - 1. Default: 111; 1 in the unified
            scripts.
        drop_last: Whether to skip the last batch of an epoch if it is smaller. Default: False; True in the stable and
            unified scripts.
        precision: Precision of the convolutions: "float32", the default, or "bfloat16" with autocast. The paper uses
            float32.
        tf32: Whether float32 convolutions may use TF32 on GPUs that support it. Default: True, the default of cuDNN,
            which the reference uses.
        channels_last: Memory format: True for channels-last, False for contiguous. None, the default, takes the faster
            one for the device.
        compile: Whether to compile the model with ``torch.compile``, which takes half a minute or more at the start.
            Default: False.
        graph: Whether to replay training steps as a CUDA graph; ignored on devices other than CUDA. Default: False.
        log_every: Steps between log lines; the loss is read from the device only then. Default: 20.
        checkpoint_every: Steps between checkpoints. Default: 250.
        amsgrad: Whether AdamW uses the AMSGrad variant. Default: False; True in the unified scripts.
        lr_drop: Factor on both learning rates after the drop. Default: 1, no drop; 0.2 in the unified scripts.
        lr_drop_at: Share of the steps after which the learning rates drop, in [0, 1]. Default: 1; 0.8 in the unified
            scripts.
        wipe_every: Steps between resets of the decoder's AdamW state (moments and step count), against stale moments
            (appendix E). None, the default, never resets it; 500 in the stable scripts.
        rest: Steps after each reset in which the encoder is not updated. Default: 0.
        loss: Distance of a pair of feature maps: "global", the default, takes the cosine of the whole map as one vector
            (paper); "point" takes the mean over points (RD4AD's paper).
        mining: Whether to use hard-normal mining (``alpha_start`` to ``factor``); requires ``loss="global"``. Default:
            True.
        stop_gradient: Whether the target of a pair is treated as a constant. Default: True.
        train_encoder: Whether one of the two encoders is trained. False uses one pretrained encoder, as RD4AD. Default:
            True.
        pairs: "cross", the default, reconstructs the features of each encoder from the other one. "self" reconstructs
            the features of one encoder from its own features, as RD4AD.
        views: Pairs that make up the anomaly map, by the encoder that gives the target: "trained", "frozen" or
            "both", the default.
        holdout: Share of the good training images kept back for calibration, in [0, 1). Default: 0, as in the paper.
        bits: Bits that the camera uses of 16-bit samples, from 8 to 16. None, the default: in training, those of the
            brightest sample of all training images (8, 10, 12, 14 or 16), which the detector keeps; 16 otherwise.
        levels: Feature levels, counted from 1 at stride 4: their number, or for PatchCore also a list. None, the
            default: 3; (2, 3) for PatchCore.
        decoder: Decoder of ReContrast: "resnet", "mirror", or "auto", the default, see `recontrast.ReContrast`.
        rule: Rule of hard mining: "deviation", the default, is the paper's, with ``alpha_start`` to ``factor``.
            "hardest" is Dinomaly's, with ``fraction_start``, ``fraction_end``, ``ramp`` and ``factor``. "power" is
            INP-Former's, with ``exponent_start``, ``exponent_end`` and ``ramp``. "none" disables mining. See
            `recontrast.mining`.
        fraction_start: Share of the points with full gradient at the first step, for "hardest". Default: 1.
        fraction_end: The same after the ramp. Default: 0.1.
        exponent_start: Exponent at the first step, for "power". Default: 3.
        exponent_end: The same after the ramp. Default: 3.
        optimiser: "adamw", the default, "adam", "sgd" with momentum ``betas[0]``, or "stableadamw", which scales down
            steps that are too large (`recontrast.training.stable_adamw.StableAdamW`).
        schedule: Learning rates over the steps: "drop", the default, is constant with one drop (``lr_drop``);
            "cosine" and "linear" fall to ``lr_end`` of the learning rates at the last step; "cosine_from_zero" is
            "cosine" whose warm-up begins with a step of rate zero, as in Dinomaly's code.
        warmup: Share of the steps over which the learning rates rise linearly from zero, in [0, 1). Default: 0.
        lr_end: Factor on the learning rates at the end of "cosine" and "linear", in [0, 1]. Default: 0.
        clip: Largest norm of the gradient of all weights; a longer one is scaled down. None, the default, keeps it.
        bank_share: Share of the feature vectors in the bank of PatchCore, in (0, 1]. Default: 0.1.
        bank_neighbours: Vectors that weigh the image score of PatchCore; 1, the default, disables the weighting.
        bank_embedding: "average", the default, or "unfold", see `recontrast.models.patchcore.PatchCore`.
        gaussian_features: Number of channels drawn for PaDiM. Default: 100.
        small_size: Size to which images are reduced for PaDiM in the ensemble, in pixels. Default: 128.
        jitter: Scale of the feature noise of UniAD. Default: 20.
        sampling: How training steps draw images: "images", the default, draws each image once per epoch; "classes"
            draws each class equally often, whatever its number of images, for data sets with long tails.
        shots: Number of good images of each class to use, drawn with ``seed``, or numbers by class, such as
            ``{"screw": 4}``; ``holdout`` is a share of them. None, the default, uses all.
        augment: Augmented copies of the training images: "none", the default; "rotations" by multiples of 45 degrees,
            as AnomalyDINO; "flips"; or "inp_former", 22 views as in INP-Former. See `recontrast.data.augment`.
        layers: Blocks of each level of a vision transformer, counted from 0, such as ``((2, 3, 4, 5), (6, 7, 8, 9))``:
            a level is the mean of its blocks. None, the default, divides the middle blocks into ``levels`` groups, see
            `recontrast.models.backbone.list_layers`.
        options: Options that an architecture of your own has beside the fields of a recipe. Missing ones take its
            defaults. ``replace(**{"options.width": 64})`` changes one. Default: none.
        bottleneck_dropout: Probability of dropout in the bottleneck of Dinomaly. Default: 0.2.
        recentre: Whether Dinomaly rebuilds patch tokens minus the class token, as Dinomaly2. Default: False.
        prototypes: Number of prototypes of INP-Former. Default: 6.
        coherence: Weight of the coherence loss of INP-Former. Default: 0.2.
        fused_norm: Whether BatchNorm, the residual add and the activation after it run as one operator
            (`recontrast.models.norm_act`), which changes results by rounding errors alone. Shortens a step in
            bfloat16 on some CPUs (benchmarks/README.md). Default: False.
        cudnn_benchmark: Whether cuDNN times its algorithms in the first steps of a training on CUDA and keeps the
            fastest of each shape. Which one it is may differ from run to run, and results by rounding errors then do
            too. Default: False.
        map_size: Size of the anomaly map in pixels. It is computed at the size of the network's input, then resized and
            blurred; masks are resized to it by nearest neighbour. Dinomaly and INP-Former use 256. None, the default,
            keeps the size of the input.
        roi: Region of interest, outside of which nothing counts: the mask of all images as
            `recontrast.data.roi.encode_mask` writes it, or "each" if each image has its own. None, the default, is the
            whole image.
        window: Lowest and highest sample of images of more than 8 bits, integers or floats, that become 0 and 1; values
            outside are clipped, and all levels between are kept. "auto": percentiles 0.1 and 99.9 of all good images,
            which training puts in its place. None, the default: images have 8 bits, see ``bits``.
        views_from: Where the views of a part are found, its aligned images under several lights or cameras: "pages" of
            a TIFF file, or a regular expression with one pair of parentheses around the name of the view in the path.
            The network learns each view as an image. None, the default, are single images. (``views``, of the same
            name, is about encoders.)
        view_names: Names of the views in their order; training finds them.
        view_map: How the maps of the views become that of the part: "max", the default, or "mean", pixel by pixel.
            The score is that of this map.

    Raises:
        ValueError: If a field has the wrong type or is out of range, or if fields contradict each other.
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
    score: Literal["max", "mean", "model"] | float = "max"
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
    bits: int | None = None
    architecture: str = "recontrast"
    levels: int | tuple[int, ...] | None = None
    decoder: Literal["auto", "resnet", "mirror"] = "auto"
    rule: Literal["deviation", "hardest", "power", "none"] = "deviation"
    fraction_start: float = 1.0
    fraction_end: float = 0.1
    exponent_start: float = 3.0
    exponent_end: float = 3.0
    optimiser: Literal["adamw", "adam", "sgd", "stableadamw"] = "adamw"
    schedule: Literal["drop", "cosine", "linear", "cosine_from_zero"] = "drop"
    warmup: float = 0.0
    lr_end: float = 0.0
    clip: float | None = None
    bank_share: float = 0.1
    bank_neighbours: int = 1
    bank_embedding: Literal["average", "unfold"] = "average"
    gaussian_features: int = 100
    small_size: int | tuple[int, int] = 128
    jitter: float = 20.0
    sampling: Literal["images", "classes"] = "images"
    shots: int | Mapping[str, int] | None = None
    augment: Literal["none", "rotations", "flips", "inp_former"] = "none"
    layers: tuple[tuple[int, ...], ...] | None = None
    options: Mapping[str, Any] = FrozenMapping({})
    bottleneck_dropout: float = 0.2
    recentre: bool = False
    prototypes: int = 6
    coherence: float = 0.2
    fused_norm: bool = False
    cudnn_benchmark: bool = False
    map_size: int | tuple[int, int] | None = None
    roi: str | None = None
    window: tuple[float, float] | Literal["auto"] | None = None
    views_from: str | None = None
    view_names: tuple[str, ...] = ()
    view_map: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        """Convert integers to floats and lists to tuples where the field requires it, and check all fields."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                value = tuple(tuple(item) if isinstance(item, list) else item for item in value)
            if isinstance(value, Mapping):
                value = FrozenMapping(value)
            if field.name in FLOAT_FIELDS and isinstance(value, int) and not isinstance(value, bool):
                value = float(value) if abs(value) < 2**1023 else math.inf
            if field.name in ("betas", "window") and isinstance(value, tuple) and all(type(v) is int for v in value):
                value = tuple(float(v) if abs(v) < 2**1023 else math.inf for v in value)
            is_valid, wanted = FIELD_RULES[field.name]
            if not is_valid(value):
                name = describe_value(self.name)
                raise ValueError(f"recipe {name}: {field.name}: wanted {wanted}, got {describe_value(value)}")
            object.__setattr__(self, field.name, value)
        try:
            object.__setattr__(self, "options", FrozenMapping(check_options(self.architecture, self.options)))
        except ValueError as error:
            raise ValueError(f"recipe {self.name!r}: {error}") from None
        for contradicts, message in list_contradictions(self):
            if contradicts:
                raise ValueError(f"recipe {self.name!r}: {message}")

    @property
    def uses_steps(self) -> bool:
        """Whether the architecture is trained by steps; otherwise it is fitted in one pass over the images."""
        return self.architecture not in ONE_PASS

    @property
    def uses_mining(self) -> bool:
        """Whether the loss uses hard mining."""
        return self.mining and self.rule != "none"

    @property
    def out(self) -> tuple[int, int]:
        """Height and width of the network input, in pixels."""
        if self.tile is not None:
            return self.tile, self.tile
        return to_pair(self.size if self.crop is None else self.crop)

    @property
    def map_out(self) -> tuple[int, int]:
        """Height and width of the anomaly map, in pixels."""
        return self.out if self.map_size is None else to_pair(self.map_size)

    @property
    def image_views(self) -> Views | None:
        """Views of a part; None for single images, or before training has found the views."""
        return Views(self.views_from, self.view_names) if self.views_from is not None and self.view_names else None

    @property
    def noun(self) -> str:
        """What results count, as a singular noun: "image", or "part" with several views."""
        return "image" if self.image_views is None else "part"

    @property
    def joins_maps(self) -> bool:
        """Whether the map of an image or part is joined from several maps of the network: of tiles, or of views."""
        return self.tile is not None or self.image_views is not None

    @property
    def of_single_images(self) -> "Recipe":
        """Recipe of the same detector on single images, of which none is a view of a part."""
        return self if self.views_from is None else self.replace(views_from=None, view_names=())

    def encoder_bn_for(self, category: str) -> Literal["train", "eval"]:
        """Return the BatchNorm mode of the trained encoder for ``category``.

        With ``encoder_bn="auto"``, this is the paper's choice for its own categories and ``"eval"`` for all others,
        because the statistics of a batch from a single category are unreliable.
        """
        if self.encoder_bn != "auto":
            return self.encoder_bn
        return "train" if category in self.bn_train_categories else "eval"

    def replace(self, **changes: Any) -> "Recipe":
        """Return a copy of the recipe with some fields changed.

        Args:
            **changes: New values by field name. "options.NAME" changes one option; another architecture begins with
                its own defaults.

        Returns:
            The new recipe.

        Raises:
            ValueError: If a field is unknown or a value is invalid.
        """
        is_same = changes.get("architecture", self.architecture) == self.architecture
        options = dict(changes.pop("options", self.options if is_same else {}) or {})
        for key in [key for key in changes if key.startswith("options.")]:
            options[key.removeprefix("options.")] = changes.pop(key)
        _check_names(changes, self.name)
        return replace(self, **changes, options=options)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can represent; tuples become lists.

        Fields from ``bits`` on are left out if they have their default, so that digests and files of detectors that do
        not need them stay those of earlier versions.
        """
        values = {key: _to_lists(value) for key, value in asdict(self).items()}
        values = {key: value.to_dict() if isinstance(value, FrozenMapping) else value for key, value in values.items()}
        names = [field.name for field in fields(self)]
        for field in fields(self)[names.index("bits") :]:
            if getattr(self, field.name) == field.default:
                del values[field.name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Create a recipe from a mapping, the inverse of `to_dict`.

        Args:
            values: Values by field name. Missing fields take their defaults.

        Returns:
            The recipe.

        Raises:
            ValueError: If ``values`` is not a mapping, a field is unknown, or a value is invalid.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"recipe: wanted a mapping of field names to values, got {type(values).__name__}")
        _check_names(values, values.get("name", "mvtec"))
        return cls(**values)


def refuse_views(recipe: Recipe, source: str, purpose: str) -> None:
    """Raise ValueError if a detector needs several views of each part.

    Args:
        recipe: Recipe of the detector.
        source: Its name, for the error message.
        purpose: What it was wanted for.

    Raises:
        ValueError: If its recipe has several views.
    """
    if recipe.views_from is not None:
        got = f"one of parts with {len(recipe.view_names)} views" if recipe.view_names else "one of several views"
        raise ValueError(f"{source}: wanted a detector of single images {purpose}, got {got}")


def _to_lists(value: Any) -> Any:
    """Replace tuples by lists, which JSON can represent."""
    return [_to_lists(item) for item in value] if isinstance(value, tuple) else value


def list_differences(recipe: Recipe, other: Recipe, ignore: tuple[str, ...] = ()) -> list[str]:
    """List the fields in which two recipes differ.

    Args:
        recipe: First recipe.
        other: Second recipe.
        ignore: Names of fields to skip.

    Returns:
        Texts such as ``"batch: 16 and 8"``.
    """
    defaults = {field.name: field.default for field in fields(Recipe)}
    a, b = {**defaults, **recipe.to_dict()}, {**defaults, **other.to_dict()}
    show = {key: describe_roi if key == "roi" else repr for key in a}
    return [f"{k}: {show[k](a[k])} and {show[k](b[k])}" for k in a if k not in ignore and a[k] != b[k]]


def _check_names(values: Mapping[str, Any], name: Any) -> None:
    """Raise ValueError if ``values`` contains a name that is not a field; suggest the closest one."""
    names = [field.name for field in fields(Recipe)]
    for key in values:
        if key not in names:
            wrong = f"recipe {describe_value(name)}: there is no field {describe_value(key)}"
            if close := difflib.get_close_matches(key[:80], names, n=1) if isinstance(key, str) else []:
                raise ValueError(f"{wrong} (did you mean {close[0]}?)")
            raise ValueError(f"{wrong}; fields are {shorten(', '.join(names), 600, placeholder=' ...')}")
