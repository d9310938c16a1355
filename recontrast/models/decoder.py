"""Decoders that reconstruct the features of every encoder level from the code of the bottleneck.

ReContrast (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602, section 3.1) takes the reversed ResNet of RD4AD
(Deng and Li, CVPR 2022, https://arxiv.org/abs/2201.10703; upstream models/de_resnet.py, `ResNet`) and adds two 1x1
convolutions per level, one for each encoder. `MirrorDecoder` has the same structure for any feature pyramid.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from recontrast.models.blocks import (
    ResidualBlock,
    ResNetPlan,
    build_mirror_plan,
    compute_mirror_widths,
    count_halvings,
    initialise_weights,
)


class ReverseResNet(nn.Module):
    """Decoder of RD4AD: a ResNet in reverse order, with 2x2 transposed convolutions of stride 2.

    Args:
        channels: Channels of the levels to reconstruct, fine to coarse.
        plan: Residual blocks of the encoder, from `recontrast.models.blocks.RESNETS`.
        heads: Number of heads. The batch is divided into as many parts, and each part passes through the 1x1
            convolutions (with bias) of its own head. Upstream runs every head on the whole batch and discards the
            rest. With 0 there are no heads.
        activation: "relu", or "gelu" as in the unified recipe.

    Raises:
        ValueError: If the activation is unknown, or there are more levels than the plan has.
    """

    def __init__(self, channels: Sequence[int], plan: ResNetPlan, *, heads: int = 2, activation: str = "relu") -> None:
        super().__init__()
        self.stages = _build_stages(channels, [1] * len(channels), plan, activation)
        self.heads = _build_heads(channels, channels, heads)
        initialise_weights(self)

    def forward(self, code: Tensor, only: int | None = None) -> list[Tensor]:
        """Reconstruct the features of every level.

        Args:
            code: Code of the bottleneck, (parts * N, 2 * coarsest channels, h, w), one part for each head.
            only: Index of the head to use for the whole code. None uses all heads.

        Returns:
            Features (N, C, H, W) of each level, fine to coarse, one part after the other, in the dtype of the weights.
        """
        return _decode(self.stages, self.heads, code, only)


class MirrorDecoder(nn.Module):
    """Decoder with the structure of `ReverseResNet` for any feature pyramid.

    Args:
        channels: Channels of the levels to reconstruct, fine to coarse, from `Backbone.channels`.
        strides: Strides of these levels, from `Backbone.strides`.
        blocks: Number of residual blocks per level.
        heads: Number of heads, at least 1; see `ReverseResNet`.
        activation: "relu" or "gelu".
        doubles: Whether the code has half the size of the coarsest level, see `Bottleneck`.

    Raises:
        ValueError: If ``heads`` is 0, the activation is unknown, or the strides do not grow by powers of 2 and are not
            equal.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        *,
        blocks: int = 2,
        heads: int = 2,
        activation: str = "relu",
        doubles: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1:  # only the heads map the decoder's widths to the encoder's channels
            raise ValueError(f"MirrorDecoder: heads: wanted at least 1, got {heads}")
        widths = compute_mirror_widths(channels)
        plan = build_mirror_plan(channels, blocks)
        self.stages = _build_stages(widths, [*count_halvings(strides), int(doubles)], plan, activation)
        self.heads = _build_heads(widths, channels, heads)
        initialise_weights(self)

    def forward(self, code: Tensor, only: int | None = None) -> list[Tensor]:
        """Reconstruct the features of every level, as `ReverseResNet.forward`.

        Args:
            code: Code of the bottleneck, (parts * N, 2 * coarsest width, h, w), one part for each head.
            only: Index of the head to use for the whole code. None uses all heads.

        Returns:
            Features (N, C, H, W) of each level, fine to coarse, one part after the other, in the dtype of the weights.
        """
        return _decode(self.stages, self.heads, code, only)


def _build_stages(
    channels: Sequence[int], doublings: Sequence[int], plan: ResNetPlan, activation: str
) -> nn.ModuleList:
    """Build one stage per level, coarse to fine; ``doublings[level]`` blocks of a stage double the size."""
    if len(channels) > len(plan.blocks):
        raise ValueError(f"decoder: channels: wanted at most {len(plan.blocks)} levels, got {len(channels)}")
    stages, width = nn.ModuleList(), 2 * channels[-1]
    for outputs, times, blocks in zip(reversed(channels), reversed(doublings), plan.blocks, strict=False):
        steps = ["up"] * times + ["same"] * (blocks - times)
        inputs = [width] + [outputs] * (len(steps) - 1)
        stage = [ResidualBlock(i, outputs, step, plan, activation) for i, step in zip(inputs, steps, strict=True)]
        stages.append(nn.Sequential(*stage))
        width = outputs
    return stages


def _build_heads(widths: Sequence[int], channels: Sequence[int], heads: int) -> nn.ModuleList:
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
    # unflatten() and unbind() return views. chunk() does so too, but has no ONNX form for a dynamic batch size.
    parts = zip(*(x.unflatten(0, (len(heads), x.shape[0] // len(heads))).unbind(0) for x in levels), strict=True)
    return [conv(x) for head, part in zip(heads, parts, strict=True) for conv, x in zip(head, part, strict=True)]
