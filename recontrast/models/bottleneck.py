"""The one-class bottleneck of RD4AD (Deng and Li, CVPR 2022): all encoder levels fused into one code."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recontrast.models.blocks import ResidualBlock, ResNetPlan, build_convolution, count_halvings, initialise_weights


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
        self, channels: Sequence[int], strides: Sequence[int], plan: ResNetPlan, widths: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        steps, widths = count_halvings(strides), widths or channels
        self.down = nn.ModuleList()
        for level in range(len(channels)):
            chain, width = [], channels[level]
            for i, times in list(enumerate(steps))[level:]:
                for _ in range(times):
                    chain += [build_convolution(width, widths[i + 1], "down"), nn.BatchNorm2d(widths[i + 1])]
                    chain += [nn.ReLU(inplace=True)]
                    width = widths[i + 1]
            self.down.append(nn.Sequential(*chain))
        self.channels = 2 * widths[-1]
        joined = (len(channels) - 1) * widths[-1] + channels[-1]
        blocks = [ResidualBlock(self.channels, self.channels, "same", plan) for _ in range(1, plan.fuse)]
        self.fuse = nn.Sequential(ResidualBlock(joined, self.channels, "down", plan), *blocks)
        initialise_weights(self)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """All levels as one code.

        Args:
            features: (N, channels, h, w) of each level, fine to coarse.

        Returns:
            (N, 2 * the coarsest's width, h / 2, w / 2) of the coarsest level, in the dtype of the weights.
        """
        return self.fuse(torch.cat([down(f) for down, f in zip(self.down, features, strict=True)], dim=1))
