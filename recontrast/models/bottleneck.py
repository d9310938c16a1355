"""One-class bottleneck that fuses the features of all encoder levels into one code.

ReContrast (Guo et al., NeurIPS 2023, https://arxiv.org/abs/2306.02602, section 3.1) takes it from RD4AD (Deng and Li,
CVPR 2022, https://arxiv.org/abs/2201.10703: multi-scale feature fusion and one-class embedding; upstream
models/resnet.py, `BN_layer`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recontrast.models.blocks import ResidualBlock, ResNetPlan, build_convolution, count_halvings, initialise_weights


class Bottleneck(nn.Module):
    """One-class bottleneck of RD4AD.

    Strided convolutions bring each level to the size of the coarsest one. The levels are concatenated, and residual
    blocks fuse them at half that size, or for a vision transformer at the same size. Upstream's ``BN_layer`` also
    creates a 1x1 convolution (conv4, bn4) that it never calls. This class does not create it.

    Args:
        channels: Channels of the encoder's levels, fine to coarse.
        strides: Strides of the encoder's levels, fine to coarse.
        plan: Residual blocks to use.
        widths: Channels of the decoder's levels. None uses ``channels``.
        halves: Whether the code has half the size of the coarsest level.

    Raises:
        ValueError: If the strides do not grow by powers of 2 and are not equal.
    """

    def __init__(
        self,
        channels: Sequence[int],
        strides: Sequence[int],
        plan: ResNetPlan,
        widths: Sequence[int] | None = None,
        *,
        halves: bool = True,
    ) -> None:
        super().__init__()
        halvings, widths = count_halvings(strides), widths or channels
        self.down = nn.ModuleList()
        concatenated = 0
        for level in range(len(channels)):
            chain, width = [], channels[level]
            for i, times in list(enumerate(halvings))[level:]:
                for _ in range(times):
                    chain += [build_convolution(width, widths[i + 1], "down"), nn.BatchNorm2d(widths[i + 1])]
                    chain += [nn.ReLU(inplace=True)]
                    width = widths[i + 1]
            self.down.append(nn.Sequential(*chain))
            concatenated += width
        self.channels = 2 * widths[-1]
        blocks = [ResidualBlock(self.channels, self.channels, "same", plan) for _ in range(1, plan.fuse)]
        step = "down" if halves else "same"
        self.fuse = nn.Sequential(ResidualBlock(concatenated, self.channels, step, plan), *blocks)
        initialise_weights(self)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Fuse the features of all levels.

        Args:
            features: Features of each level, (N, channels, h, w), fine to coarse.

        Returns:
            Code (N, 2 * width of the coarsest level, h / 2, w / 2), or (..., h, w) if ``halves`` is False, where h and
            w are those of the coarsest level, in the dtype of the weights.
        """
        return self.fuse(torch.cat([down(f) for down, f in zip(self.down, features, strict=True)], dim=1))
