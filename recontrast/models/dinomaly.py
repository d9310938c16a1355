"""Dinomaly: one plain transformer rebuilds the features of many classes (Guo et al., CVPR 2025).

https://arxiv.org/abs/2405.14325; the authors' code: models/uad.py, ``ViTill``. Four measures keep it from copying
anomalies: dropout in the bottleneck, linear attention that cannot focus, groups of layers that are rebuilt as a whole,
and a loss that mines the hardest points (`recontrast.mining.hardest`). Dinomaly2 (https://arxiv.org/abs/2510.17611)
adds context-aware recentring: patch tokens minus the class token, so that what is rebuilt depends on the class.
"""

import os
from collections.abc import Sequence

from torch import Tensor, nn

from recontrast.models.token_network import Layers, TokenNetwork
from recontrast.models.transformer_blocks import DecoderBlock, Mlp, initialise


class Dinomaly(TokenNetwork):
    """Dinomaly: reconstruction of groups of layers of a frozen vision transformer.

    Class and register tokens pass through bottleneck and decoder, unless they are subtracted (``recentre``); the loss
    and the map leave them out.

    The attributes are those of `recontrast.models.token_network.TokenNetwork`.

    Args:
        backbone: Vision transformer, by its model name in timm. The authors use DINOv2 with registers:
            "vit_base_patch14_reg4_dinov2".
        weights: Pretrained weights: None (timm's hub), a file, "package" or "random", see `Backbone`.
        layers: Groups of block indices that are rebuilt, such as ((2, 3, 4, 5), (6, 7, 8, 9)). None takes two groups
            of the middle blocks, as the authors' code does. The decoder has one block for each.
        dropout: Probability of dropout in the noisy bottleneck, in training. Default: 0.2.
        recentre: Whether the class token of a layer is subtracted from its patch tokens (Dinomaly2); class and register
            tokens then do not pass through the decoder. Default: False.

    Raises:
        ValueError: If the backbone is not a vision transformer, or has no class token to recentre by, a layer does not
            exist, ``dropout`` is not in [0, 1), or the weights do not fit.
        OSError: If the weight file or the hub cannot be read.
    """

    def __init__(
        self,
        backbone: str = "vit_base_patch14_reg4_dinov2.lvd142m",
        *,
        weights: str | os.PathLike | None = None,
        layers: Layers | None = None,
        dropout: float = 0.2,
        recentre: bool = False,
    ) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"Dinomaly: dropout: wanted a number of at least 0 and below 1, got {dropout}")
        options = {"dropout": dropout} | ({"recentre": True} if recentre else {})
        super().__init__(backbone, weights=weights, layers=layers, options=options)
        if recentre and not self.encoder.has_class_token:
            raise ValueError(f"Dinomaly: recentre: wanted a backbone with a class token, got {backbone!r}")
        self.recentre = recentre
        self.bottleneck = Mlp(self.width, dropout, drop_input=True)
        self.decoder = nn.ModuleList(DecoderBlock(self.width, self.heads) for _ in range(self.depth))
        initialise(self.bottleneck)
        initialise(self.decoder)

    def constant_features(self, images: Tensor) -> list[Tensor]:
        """Compute the mean tokens of each group, which do not change in training.

        Args:
            images: Normalised images (N, 3, H, W).

        Returns:
            Tokens (N, prefix + h * w, width) of each group, without gradient, in the encoder's output dtype; with
                ``recentre``, patch tokens (N, h * w, width) minus the class token.
        """
        groups = super().constant_features(images)
        if not self.recentre:
            return groups
        # The mean over the layers of a group of what is subtracted in each layer.
        return [group[:, self.encoder.prefix_tokens :] - group[:, :1] for group in groups]

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
