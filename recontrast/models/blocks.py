"""Residual blocks of bottleneck and decoder, and the plans that say how many of which width."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

ACTIVATIONS = ("relu", "gelu")


MAX_BASIC_CHANNELS = (
    512  # of a bottleneck's output, up to which `build_mirror_plan` takes basic blocks: ResNet-34's size
)


MIN_WIDTH = 64  # of a mirrored decoder at its finest level, doubled at each coarser one: ResNet-18's widths


@dataclass(frozen=True)
class ResNetPlan:
    """The residual blocks of a ResNet, as its bottleneck and decoder repeat them."""

    expansion: int  # 1: basic blocks (3x3, 3x3); 4: bottleneck blocks (1x1, 3x3, 1x1)
    blocks: tuple[int, ...]  # of the encoder's layer1, layer2, ...; the decoder's coarsest stage has those of layer1
    fuse: int = 3  # blocks of the bottleneck
    base_width: int = 64
    groups: int = 1


RESNETS = {
    "resnet18": ResNetPlan(1, (2, 2, 2, 2), fuse=2),
    "resnet34": ResNetPlan(1, (3, 4, 6, 3)),
    "resnet50": ResNetPlan(4, (3, 4, 6, 3)),
    "resnet101": ResNetPlan(4, (3, 4, 23, 3)),
    "resnet152": ResNetPlan(4, (3, 8, 36, 3)),
    "resnext50_32x4d": ResNetPlan(4, (3, 4, 6, 3), base_width=4, groups=32),
    "resnext101_32x8d": ResNetPlan(4, (3, 4, 23, 3), base_width=8, groups=32),
    "wide_resnet50_2": ResNetPlan(4, (3, 4, 6, 3), base_width=128),
    "wide_resnet101_2": ResNetPlan(4, (3, 4, 23, 3), base_width=128),
}


def build_mirror_plan(channels: Sequence[int], blocks: int = 2) -> ResNetPlan:
    """Plan for an encoder that is no ResNet: basic blocks for narrow pyramids, bottleneck blocks for wide ones."""
    return ResNetPlan(
        1 if 2 * compute_mirror_widths(channels)[-1] <= MAX_BASIC_CHANNELS else 4,
        (blocks,) * len(channels),
        fuse=blocks,
    )


def compute_mirror_widths(channels: Sequence[int]) -> list[int]:
    """Channels inside a mirrored decoder: the encoder's, but no fewer than ResNet-18 has.

    Mobile networks publish narrow projections (24, 40, 112 channels in EfficientNet-Lite0) of wide layers; a decoder
    as narrow as those cannot rebuild them.
    """
    return [max(width, MIN_WIDTH << level) for level, width in enumerate(channels)]


def count_halvings(strides: Sequence[int]) -> list[int]:
    """How often each stride is halved to reach the one before it; wants growing strides, powers of 2 apart."""
    ratios = [coarse / fine for fine, coarse in itertools.pairwise(strides)]
    if not all(r >= 2 and r.is_integer() and int(r).bit_count() == 1 for r in ratios):
        raise ValueError(f"decoder: strides: wanted each 2, 4, 8 ... times the one before, got {tuple(strides)}")
    return [int(r).bit_length() - 1 for r in ratios]


class ResidualBlock(nn.Module):
    """ResNet's block, which keeps the size, halves it (3x3, stride 2) or doubles it (2x2 transposed, stride 2)."""

    def __init__(self, inputs: int, outputs: int, step: str, plan: ResNetPlan, activation: str = "relu") -> None:
        super().__init__()
        planes = outputs // plan.expansion
        if plan.expansion == 1:
            body = [build_convolution(inputs, planes, step), nn.BatchNorm2d(planes), build_activation(activation)]
            body += [build_convolution(planes, outputs, "same")]
        else:
            width = int(planes * plan.base_width / 64) * plan.groups
            body = [nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), build_activation(activation)]
            body += [
                build_convolution(width, width, step, plan.groups),
                nn.BatchNorm2d(width),
                build_activation(activation),
            ]
            body += [nn.Conv2d(width, outputs, 1, bias=False)]
        self.body = nn.Sequential(*body, nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if step == "same" else _shortcut(inputs, outputs, step)
        self.activation = build_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, outputs, H', W')."""
        return self.activation(self.body(x).add_(self.shortcut(x)))


def build_activation(name: str) -> nn.Module:
    """ReLU or GELU by name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"decoder: activation: wanted {' or '.join(map(repr, ACTIVATIONS))}, got {name!r}")
    return nn.GELU() if name == "gelu" else nn.ReLU(inplace=True)


def build_convolution(inputs: int, outputs: int, step: str, groups: int = 1) -> nn.Module:
    """A 3x3 convolution of stride 1 ("same") or 2 ("down"), or a 2x2 transposed one of stride 2 ("up"); no bias."""
    if step == "up":
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2, groups=groups, bias=False)
    return nn.Conv2d(inputs, outputs, 3, stride=2 if step == "down" else 1, padding=1, groups=groups, bias=False)


def _shortcut(inputs: int, outputs: int, step: str) -> nn.Sequential:
    if step == "up":
        return nn.Sequential(build_convolution(inputs, outputs, step), nn.BatchNorm2d(outputs))
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=2, bias=False), nn.BatchNorm2d(outputs))


def initialise_weights(module: nn.Module) -> None:
    """He's initialisation for nn.Conv2d alone: upstream leaves the transposed ones and all biases at torch's."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
