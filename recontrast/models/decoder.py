"""Bottleneck and decoders: from the levels of an encoder to one small map, and back to every level.

ReContrast (Guo et al., NeurIPS 2023, section 3.1) takes both from RD4AD (Deng and Li, CVPR 2022,
https://arxiv.org/abs/2201.10703): one-class bottleneck embedding and reverse ResNet (upstream models/resnet.py,
`BN_layer`; models/de_resnet.py, `ResNet`), to which it adds two 1x1 heads for each level.
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

    def __init__(self, channels: Sequence[int], plan: ResNetPlan, *, heads: int = 2, activation: str = "relu") -> None:
        super().__init__()
        self.stages = _stages(channels, [1] * len(channels), plan, activation)
        self.heads = _heads(channels, channels, heads)
        initialise_weights(self)

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
        widths = compute_mirror_widths(channels)
        self.stages = _stages(widths, [*count_halvings(strides), 1], build_mirror_plan(channels, blocks), activation)
        self.heads = _heads(widths, channels, heads)
        initialise_weights(self)

    def forward(self, code: Tensor, only: int | None = None) -> list[Tensor]:
        """The levels, rebuilt from a code, as `ReverseResNet.forward` does it.

        Args:
            code: (parts * N, 2 * coarsest width, h, w), one part for each head.
            only: the code is that of this one part; None: of all.

        Returns:
            (N, C, H, W) of each level, fine to coarse, part after part, in the dtype of the weights.
        """
        return _decode(self.stages, self.heads, code, only)


def _stages(channels: Sequence[int], steps: Sequence[int], plan: ResNetPlan, activation: str) -> nn.ModuleList:
    """One stage for each level, coarse to fine; ``steps[level]`` doublings lead to that level."""
    if len(channels) > len(plan.blocks):
        raise ValueError(f"decoder: channels: wanted at most {len(plan.blocks)} levels, got {len(channels)}")
    stages, width = nn.ModuleList(), 2 * channels[-1]
    for outputs, times, blocks in zip(reversed(channels), reversed(steps), plan.blocks, strict=False):
        stage = [ResidualBlock(width if i == 0 else outputs, outputs, "up", plan, activation) for i in range(times)]
        stage += [ResidualBlock(outputs, outputs, "same", plan, activation) for _ in range(times, blocks)]
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
