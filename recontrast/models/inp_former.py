"""INP-Former: intrinsic normal prototypes of an image guide the reconstruction of its features (Luo et al., CVPR 2025).

https://arxiv.org/abs/2503.02424; the authors' code: models/uad.py, ``INP_Former``. Prototypes collect what is normal
from the tokens of the image itself. The decoder rebuilds the tokens from the prototypes alone, so that it does not
rebuild an anomaly, which no prototype holds.
"""

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recontrast.models.token_network import Layers, TokenNetwork
from recontrast.models.transformer_blocks import AggregationBlock, Mlp, PrototypeBlock, compute_coherence, initialise

MAX_PROTOTYPES = 1 << 12


class INPFormer(TokenNetwork):
    """INP-Former: reconstruction of groups of layers of a frozen vision transformer from prototypes of the image.

    Class and register tokens are left out throughout.

    The other attributes are those of `recontrast.models.token_network.TokenNetwork`.

    Args:
        backbone: Vision transformer, by its model name in timm. The authors use DINOv2 with registers:
            "vit_base_patch14_reg4_dinov2".
        weights: Pretrained weights: None (timm's hub), a file, "package" or "random", see `Backbone`.
        layers: Groups of block indices that are rebuilt, such as ((2, 3, 4, 5), (6, 7, 8, 9)). None takes two groups
            of the middle blocks, as the authors' code does. The decoder has one block for each.
        prototypes: Number of prototypes. Default: 6.

    Attributes:
        prototype_tokens: Learned tokens from which the prototypes of each image start, (prototypes, width).

    Raises:
        ValueError: If the backbone is not a vision transformer, a layer does not exist, ``prototypes`` is out of range,
            or the weights do not fit.
        OSError: If the weight file or the hub cannot be read.
    """

    def __init__(
        self,
        backbone: str = "vit_base_patch14_reg4_dinov2.lvd142m",
        *,
        weights: str | os.PathLike | None = None,
        layers: Layers | None = None,
        prototypes: int = 6,
    ) -> None:
        if not 1 <= prototypes <= MAX_PROTOTYPES:
            raise ValueError(f"INPFormer: prototypes: wanted 1 to {MAX_PROTOTYPES}, got {prototypes}")
        super().__init__(backbone, weights=weights, layers=layers, options={"prototypes": prototypes})
        self.prototype_tokens = nn.Parameter(torch.randn(prototypes, self.width))
        self.aggregation = AggregationBlock(self.width, self.heads)
        self.bottleneck = Mlp(self.width)
        self.decoder = nn.ModuleList(PrototypeBlock(self.width, self.heads) for _ in range(self.depth))
        for part in (self.aggregation, self.bottleneck, self.decoder):
            initialise(part)

    def constant_features(self, images: Tensor) -> list[Tensor]:
        """Compute the mean patch tokens of each group, which do not change in training.

        Args:
            images: Normalised images (N, 3, H, W).

        Returns:
            Tokens (N, h * w, width) of each group, without gradient, in the encoder's output dtype.
        """
        return [group[:, self.encoder.prefix_tokens :] for group in super().constant_features(images)]

    def forward(
        self, images: Tensor, frozen_features: Sequence[Tensor] | None = None
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Compute features and their reconstruction, and how well the prototypes cover the features.

        Args:
            images: Normalised images (N, 3, H, W).
            frozen_features: Result of `constant_features` for these images. None computes it.

        Returns:
            pairs: Pairs (teacher, student) of features (N, width, h, w), one for each group.
            coherence: Cosine distance of each token to the closest prototype, (N, h * w), in the dtype of the features.
        """
        groups = self.encode(images, frozen_features)
        tokens, outputs = self.fuse(groups), []
        prototypes = self.aggregation(self.prototype_tokens.expand(tokens.shape[0], -1, -1), tokens)
        coherence = compute_coherence(tokens, prototypes)
        tokens = self.bottleneck(tokens)
        for block in self.decoder:
            tokens = block(tokens, prototypes)
            outputs.append(tokens)
        return self.pair_up(images, groups, outputs), coherence
