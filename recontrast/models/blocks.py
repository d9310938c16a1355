"""Residual blocks of the bottleneck and the decoders, and the block counts and widths of each backbone.

The bottleneck and the decoder repeat the residual blocks of the encoder (Deng and Li, CVPR 2022,
https://arxiv.org/abs/2201.10703; upstream models/resnet.py, `BasicBlock` and `Bottleneck`; models/de_resnet.py, their
transposed twins). `RESNETS` lists the ResNets of torchvision. `build_mirror_plan` plans for any other backbone.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

ACTIVATIONS = ("relu", "gelu")
MAX_BASIC_CHANNELS = 512  # bottleneck output of ResNet-34; a mirror plan with more channels uses bottleneck blocks
MIN_WIDTH = 64  # minimum channels of a mirror decoder's finest level; doubled at each coarser level, as in ResNet-18


@dataclass(frozen=True)
class ResNetPlan:
    """Residual blocks of a ResNet, which its bottleneck and decoder repeat."""

    expansion: int  # 1: basic blocks (3x3, 3x3); 4: bottleneck blocks (1x1, 3x3, 1x1)
    blocks: tuple[int, ...]  # blocks in layer1, layer2, ... of the encoder; the coarsest decoder stage uses layer1's
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
    """Return the plan for a backbone other than a ResNet: basic blocks if it is narrow, else bottleneck blocks."""
    is_narrow = 2 * compute_mirror_widths(channels)[-1] <= MAX_BASIC_CHANNELS
    return ResNetPlan(1 if is_narrow else 4, (blocks,) * len(channels), fuse=blocks)


def compute_mirror_widths(channels: Sequence[int]) -> list[int]:
    """Return the channels inside a mirror decoder: those of the encoder, but at least those of ResNet-18.

    Mobile networks output narrow projections of wide layers (24, 40 and 112 channels in EfficientNet-Lite0). A decoder
    of that width cannot reconstruct them.
    """
    return [max(width, MIN_WIDTH << level) for level, width in enumerate(channels)]


def count_halvings(strides: Sequence[int]) -> list[int]:
    """Return the number of halvings between each level and the next coarser one; 0 between levels of equal stride.

    Raises:
        ValueError: If the strides do not grow by powers of 2 and are not equal.
    """
    ratios = [coarse / fine for fine, coarse in itertools.pairwise(strides)]
    if not all(r >= 1 and r.is_integer() and int(r).bit_count() == 1 for r in ratios):
        raise ValueError(f"decoder: strides: wanted each 1, 2, 4, 8 ... times the previous one, got {tuple(strides)}")
    return [int(r).bit_length() - 1 for r in ratios]


class ResidualBlock(nn.Module):
    """Residual block of a ResNet that keeps, halves or doubles the size of its input.

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        step: "same" keeps the size, "down" halves it (3x3, stride 2), "up" doubles it (2x2 transposed, stride 2).
        plan: Kind and width of the block.
        activation: "relu" or "gelu".

    Attributes:
        adds_in_norm: Whether the last layer of ``body`` takes the shortcut too, adds it and applies the activation, see
            `recontrast.models.norm_act`.
    """

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
        keeps_shape = step == "same" and inputs == outputs
        self.shortcut = nn.Identity() if keeps_shape else _build_shortcut(inputs, outputs, step)
        self.activation = build_activation(activation)
        self.adds_in_norm = False

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, outputs, H', W')."""
        if not self.adds_in_norm:
            return self.activation(self.body(x).add_(self.shortcut(x)))
        *layers, norm = self.body
        hidden = x
        for layer in layers:
            hidden = layer(hidden)
        return norm(hidden, self.shortcut(x))


def build_activation(name: str) -> nn.Module:
    """Build the activation called ``name``.

    Raises:
        ValueError: If the name is not one of `ACTIVATIONS`.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"decoder: activation: wanted {' or '.join(map(repr, ACTIVATIONS))}, got {name!r}")
    return nn.GELU() if name == "gelu" else nn.ReLU(inplace=True)


def build_convolution(inputs: int, outputs: int, step: str, groups: int = 1) -> nn.Module:
    """Build a 3x3 convolution of stride 1 ("same") or 2 ("down"), or a 2x2 transposed one ("up"), without bias."""
    if step == "up":
        return nn.ConvTranspose2d(inputs, outputs, 2, stride=2, groups=groups, bias=False)
    return nn.Conv2d(inputs, outputs, 3, stride=2 if step == "down" else 1, padding=1, groups=groups, bias=False)


def _build_shortcut(inputs: int, outputs: int, step: str) -> nn.Sequential:
    if step == "up":
        return nn.Sequential(build_convolution(inputs, outputs, step), nn.BatchNorm2d(outputs))
    stride = 2 if step == "down" else 1
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))


def initialise_weights(module: nn.Module) -> None:
    """Apply He initialisation to every nn.Conv2d; transposed convolutions keep PyTorch's default, as upstream."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
