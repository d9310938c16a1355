"""Bottleneck and decoders: from the levels of an encoder to one small map, and back to every level.

ReContrast (Guo et al., NeurIPS 2023, section 3.1) takes both from RD4AD (Deng and Li, CVPR 2022,
https://arxiv.org/abs/2201.10703): one-class bottleneck embedding and reverse ResNet (upstream models/resnet.py,
`BN_layer`; models/de_resnet.py, `ResNet`), to which it adds two 1x1 heads for each level.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS = ("relu", "gelu")
BASIC_CHANNELS = 512  # of a bottleneck's output, up to which `mirror_plan` takes basic blocks: ResNet-34's size
LEAST_WIDTH = 64  # of a mirrored decoder at its finest level, doubled at each coarser one: ResNet-18's widths


@dataclass(frozen=True)
class Plan:
    """The residual blocks of a ResNet, as its bottleneck and decoder repeat them."""

    expansion: int  # 1: basic blocks (3x3, 3x3); 4: bottleneck blocks (1x1, 3x3, 1x1)
    blocks: tuple[int, ...]  # of the encoder's layer1, layer2, ...; the decoder's coarsest stage has those of layer1
    fuse: int = 3  # blocks of the bottleneck
    base_width: int = 64
    groups: int = 1


RESNETS = {
    "resnet18": Plan(1, (2, 2, 2, 2), fuse=2),
    "resnet34": Plan(1, (3, 4, 6, 3)),
    "resnet50": Plan(4, (3, 4, 6, 3)),
    "resnet101": Plan(4, (3, 4, 23, 3)),
    "resnet152": Plan(4, (3, 8, 36, 3)),
    "resnext50_32x4d": Plan(4, (3, 4, 6, 3), base_width=4, groups=32),
    "resnext101_32x8d": Plan(4, (3, 4, 23, 3), base_width=8, groups=32),
    "wide_resnet50_2": Plan(4, (3, 4, 6, 3), base_width=128),
    "wide_resnet101_2": Plan(4, (3, 4, 23, 3), base_width=128),
}


def mirror_plan(channels: Sequence[int], blocks: int = 2) -> Plan:
    """Plan for an encoder that is no ResNet: basic blocks for narrow pyramids, bottleneck blocks for wide ones."""
    return Plan(1 if 2 * mirror_widths(channels)[-1] <= BASIC_CHANNELS else 4, (blocks,) * len(channels), fuse=blocks)


def mirror_widths(channels: Sequence[int]) -> list[int]:
    """Channels inside a mirrored decoder: the encoder's, but no fewer than ResNet-18 has.

    Mobile networks publish narrow projections (24, 40, 112 channels in EfficientNet-Lite0) of wide layers; a decoder
    as narrow as those cannot rebuild them.
    """
    return [max(width, LEAST_WIDTH << level) for level, width in enumerate(channels)]


def halvings(strides: Sequence[int]) -> list[int]:
    """How often each stride is halved to reach the one before it; wants growing strides, powers of 2 apart."""
    ratios = [coarse / fine for fine, coarse in itertools.pairwise(strides)]
    if not all(r >= 2 and r.is_integer() and int(r).bit_count() == 1 for r in ratios):
        raise ValueError(f"decoder: strides: wanted each 2, 4, 8 ... times the one before, got {tuple(strides)}")
    return [int(r).bit_length() - 1 for r in ratios]


class Residual(nn.Module):
    """ResNet's block, which keeps the size, halves it (3x3, stride 2) or doubles it (2x2 transposed, stride 2)."""

    def __init__(self, inputs: int, outputs: int, step: str, plan: Plan, activation: str = "relu") -> None:
        super().__init__()
        planes = outputs // plan.expansion
        if plan.expansion == 1:
            body = [_spatial(inputs, planes, step), nn.BatchNorm2d(planes), _activation(activation)]
            body += [_spatial(planes, outputs, "same")]
        else:
            width = int(planes * plan.base_width / 64) * plan.groups
            body = [nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), _activation(activation)]
            body += [_spatial(width, width, step, plan.groups), nn.BatchNorm2d(width), _activation(activation)]
            body += [nn.Conv2d(width, outputs, 1, bias=False)]
        self.body = nn.Sequential(*body, nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if step == "same" else _shortcut(inputs, outputs, step)
        self.activation = _activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H', W')."""
        return self.activation(self.body(x).add_(self.shortcut(x)))


class Bottleneck(nn.Module):
    """RD4AD's one-class bottleneck: every level brought to the coarsest, joined, and fused at half its size.

    Upstream's ``BN_layer`` also creates a 1x1 convolution (conv4, bn4) that it never calls; there is none here.

    Args:
        channels, strides: of the encoder's levels, fine to coarse.
        plan: its residual blocks.
        widths: channels of the decoder's levels, for which the code has room; None: the encoder's.

    Raises:
        ValueError: strides that are not powers of 2 apart.
    """

    def __init__(
        self, channels: Sequence[int], strides: Sequence[int], plan: Plan, widths: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        steps, widths = halvings(strides), widths or channels
        self.down = nn.ModuleList()
        for level in range(len(channels)):
            chain, width = [], channels[level]
            for i, times in list(enumerate(steps))[level:]:
                for _ in range(times):
                    chain += [_spatial(width, widths[i + 1], "down"), nn.BatchNorm2d(widths[i + 1])]
                    chain += [nn.ReLU(inplace=True)]
                    width = widths[i + 1]
            self.down.append(nn.Sequential(*chain))
        self.channels = 2 * widths[-1]
        joined = (len(channels) - 1) * widths[-1] + channels[-1]
        blocks = [Residual(self.channels, self.channels, "same", plan) for _ in range(1, plan.fuse)]
        self.fuse = nn.Sequential(Residual(joined, self.channels, "down", plan), *blocks)
        _initialise(self)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """All levels as one code.

        Args:
            features: (N, channels, h, w) of each level, fine to coarse.

        Returns:
            (N, 2 * the coarsest's width, h / 2, w / 2) of the coarsest level, in the dtype of the weights.
        """
        return self.fuse(torch.cat([down(f) for down, f in zip(self.down, features, strict=True)], dim=1))


class ReverseResNet(nn.Module):
    """RD4AD's decoder: the ResNet run backwards, with 2x2 transposed convolutions of stride 2.

    Args:
        channels: of the levels to rebuild, fine to coarse.
        plan: the encoder's, from `RESNETS`.
        heads: the batch is that many parts; each part goes through its own 1x1 convolution (with bias) for each level,
            and only that part: upstream runs every head on the whole batch and throws the rest away. 0: no heads.
        activation: "relu", or "gelu" of the unified recipe.

    Raises:
        ValueError: another activation, or more levels than the plan has.
    """

    def __init__(self, channels: Sequence[int], plan: Plan, *, heads: int = 2, activation: str = "relu") -> None:
        super().__init__()
        self.stages = _stages(channels, [1] * len(channels), plan, activation)
        self.heads = _heads(channels, channels, heads)
        _initialise(self)

    def forward(self, code: Tensor, only: int | None = None) -> list[Tensor]:
        """The levels, rebuilt from a code.

        Args:
            code: (parts * N, 2 * coarsest channels, h, w), one part for each head.
            only: the code is that of this one part, counted from 0; None: of all.

        Returns:
            (N, C, H, W) of each level, fine to coarse, part after part, in the dtype of the weights.
        """
        return _decode(self.stages, self.heads, code, only)


class MirrorDecoder(nn.Module):
    """The plan of `ReverseResNet` for any feature pyramid.

    Args:
        channels, strides: of the levels to rebuild, fine to coarse, as `Backbone` publishes them.
        blocks: residual blocks of each level.
        heads, activation: as in `ReverseResNet`, but at least one head.

    Raises:
        ValueError: no heads, another activation, or strides that are not powers of 2 apart.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        blocks: int = 2,
        heads: int = 2,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if heads < 1:  # without them the widths would be the output's
            raise ValueError(f"MirrorDecoder: heads: wanted at least 1, got {heads}")
        widths = mirror_widths(channels)
        self.stages = _stages(widths, [*halvings(strides), 1], mirror_plan(channels, blocks), activation)
        self.heads = _heads(widths, channels, heads)
        _initialise(self)

    def forward(self, code: Tensor, only: int | None = None) -> list[Tensor]:
        """The levels, rebuilt from a code, as `ReverseResNet.forward` does it.

        Args:
            code: (parts * N, 2 * coarsest width, h, w), one part for each head.
            only: the code is that of this one part; None: of all.

        Returns:
            (N, C, H, W) of each level, fine to coarse, part after part, in the dtype of the weights.
        """
        return _decode(self.stages, self.heads, code, only)


def _stages(channels: Sequence[int], steps: Sequence[int], plan: Plan, activation: str) -> nn.ModuleList:
    """One stage for each level, coarse to fine; ``steps[level]`` doublings lead to that level."""
    if len(channels) > len(plan.blocks):
        raise ValueError(f"decoder: channels: wanted at most {len(plan.blocks)} levels, got {len(channels)}")
    stages, width = nn.ModuleList(), 2 * channels[-1]
    for outputs, times, blocks in zip(reversed(channels), reversed(steps), plan.blocks, strict=False):
        stage = [Residual(width if i == 0 else outputs, outputs, "up", plan, activation) for i in range(times)]
        stage += [Residual(outputs, outputs, "same", plan, activation) for _ in range(times, blocks)]
        stages.append(nn.Sequential(*stage))
        width = outputs
    return stages


def _heads(widths: Sequence[int], channels: Sequence[int], heads: int) -> nn.ModuleList:
    pairs = list(zip(widths, channels, strict=True))
    return nn.ModuleList(nn.ModuleList(nn.Conv2d(w, c, 1) for w, c in pairs) for _ in range(heads))


def _decode(stages: nn.ModuleList, heads: Any, code: Tensor, only: int | None) -> list[Tensor]:
    levels: list[Tensor] = []
    for stage in stages:
        code = stage(code)
        levels.insert(0, code)
    if not heads:
        return levels
    heads = heads if only is None else [heads[only]]
    # Views: no copy of either half. Not chunk(), which ONNX cannot say of a batch of unknown size.
    parts = zip(*(x.unflatten(0, (len(heads), x.shape[0] // len(heads))).unbind(0) for x in levels), strict=True)
    return [conv(x) for head, part in zip(heads, parts, strict=True) for conv, x in zip(head, part, strict=True)]


def _activation(name: str) -> nn.Module:
    if name not in ACTIVATIONS:
        raise ValueError(f"decoder: activation: wanted {' or '.join(map(repr, ACTIVATIONS))}, got {name!r}")
    return nn.GELU() if name == "gelu" else nn.ReLU(inplace=True)


def _spatial(inputs: int, outputs: int, step: str, groups: int = 1) -> nn.Module:
    if step == "up":
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2, groups=groups, bias=False)
    return nn.Conv2d(inputs, outputs, 3, stride=2 if step == "down" else 1, padding=1, groups=groups, bias=False)


def _shortcut(inputs: int, outputs: int, step: str) -> nn.Sequential:
    if step == "up":
        return nn.Sequential(_spatial(inputs, outputs, step), nn.BatchNorm2d(outputs))
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))


def _initialise(module: nn.Module) -> None:
    """He's initialisation for nn.Conv2d alone: upstream leaves the transposed ones and all biases at torch's."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
