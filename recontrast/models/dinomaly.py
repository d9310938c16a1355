"""Dinomaly: one plain transformer rebuilds the features of many classes (Guo et al., CVPR 2025).

https://arxiv.org/abs/2405.14325; the authors' code: models/uad.py, ``ViTill``. Four measures keep it from copying
anomalies: dropout in the bottleneck, linear attention that cannot focus, groups of layers that are rebuilt as a whole,
and a loss that mines the hardest points (`recontrast.mining.hardest`).
"""

import os
from collections.abc import Sequence

from torch import Tensor, nn

from recontrast.models.token_network import Layers, TokenNetwork
from recontrast.models.transformer_blocks import DecoderBlock, Mlp, initialise


class Dinomaly(TokenNetwork):
    """Dinomaly: reconstruction of groups of layers of a frozen vision transformer.

    Class and register tokens pass through bottleneck and decoder; the loss and the map leave them out.

    The attributes are those of `recontrast.models.token_network.TokenNetwork`.

    Args:
        backbone: Vision transformer, by its model name in timm. The authors use DINOv2 with registers:
            "vit_base_patch14_reg4_dinov2".
        weights: Pretrained weights: None (timm's hub), a file, "package" or "random", see `Backbone`.
        layers: Groups of block indices that are rebuilt, such as ((2, 3, 4, 5), (6, 7, 8, 9)). None takes two groups
            of the middle blocks, as the authors' code does. The decoder has one block for each.
        dropout: Probability of dropout in the noisy bottleneck, in training. Default: 0.2.

    Raises:
        ValueError: If the backbone is not a vision transformer, a layer does not exist, ``dropout`` is not in [0, 1),
            or the weights do not fit.
        OSError: If the weight file or the hub cannot be read.
    """

    def __init__(
        self,
        backbone: str = "vit_base_patch14_reg4_dinov2.lvd142m",
        *,
        weights: str | os.PathLike | None = None,
        layers: Layers | None = None,
        dropout: float = 0.2,
    ) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"Dinomaly: dropout: wanted a number of at least 0 and below 1, got {dropout}")
        super().__init__(backbone, weights=weights, layers=layers, options={"dropout": dropout})
        self.bottleneck = Mlp(self.width, dropout, drop_input=True)
        self.decoder = nn.ModuleList(DecoderBlock(self.width, self.heads) for _ in range(self.depth))
        initialise(self.bottleneck)
        initialise(self.decoder)

    def forward(self, images: Tensor, frozen_features: Sequence[Tensor] | None = None) -> list[tuple[Tensor, Tensor]]:
        """Compute the features of each group of layers (teacher) and their reconstruction (student).

        Args:
            images: Normalised images (N, 3, H, W).
            frozen_features: Result of `constant_features` for these images. None computes it.

        Returns:
            Pairs (teacher, student) of features (N, width, h, w), one for each group, in the dtype of the weights or of
                autocast.
        """
        groups = self.encode(images, frozen_features)
        tokens, outputs = self.bottleneck(self.fuse(groups)), []
        for block in self.decoder:
            tokens = block(tokens)
            outputs.append(tokens)
        return self.pair_up(images, groups, outputs)
