"""Base class of Dinomaly and INP-Former, which rebuild groups of layers of a frozen vision transformer."""

import math
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from recontrast import reference
from recontrast.distances import point_distances
from recontrast.models.backbone import Backbone
from recontrast.models.network import Network, Views

Layers = Sequence[Sequence[int]]
GROUPS = 2  # of layers in both codes
HEAD_WIDTH = 64  # channels of each head of the decoder


class TokenNetwork(Network):
    """Base class of networks that rebuild the tokens of a frozen vision transformer in groups of layers.

    A subclass implements `rebuild` and `forward`, whose first output are the pairs of `pair_up`.

    Args:
        backbone: Vision transformer, by its model name in timm.
        weights: Pretrained weights: None (timm's hub), a file, "package" or "random", see `Backbone`.
        layers: Groups of block indices whose tokens are averaged and rebuilt. None takes two groups of the middle
            blocks, as the authors' codes do, see `recontrast.models.backbone.list_layers`.
        options: Further arguments of the subclass, for `config`.

    Attributes:
        encoder: Frozen backbone.
        width: Channels of the tokens.
        heads: Heads of each decoder block: one for 64 channels.
        depth: Number of decoder blocks, one for each block in ``layers``.
        mean: Channel means to subtract from images in [0, 1].
        std: Channel standard deviations to divide by.
        stride: Height and width of images must be multiples of it: side of a patch, in pixels.

    Raises:
        ValueError: If the backbone is not a vision transformer, a layer does not exist, or the weights do not fit.
        OSError: If the weight file or the hub cannot be read.
    """

    def __init__(
        self, backbone: str, *, weights: str | os.PathLike | None, layers: Layers | None, options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.encoder = Backbone(backbone, levels=GROUPS, layers=layers, weights=weights, frozen=True)
        if not self.encoder.is_token_model:
            raise ValueError(f"{type(self).__name__}: backbone: wanted a vision transformer, got {backbone!r}")
        self.frozen = None
        self.mean, self.std, self.stride = self.encoder.mean, self.encoder.std, self.encoder.strides[-1]
        self.width = self.encoder.channels[-1]
        self.heads = math.gcd(self.width, max(self.width // HEAD_WIDTH, 1))
        self.depth = sum(self.encoder.group_sizes)
        self._arguments: dict[str, Any] = {"backbone": backbone, "layers": self.encoder.layers, **options}

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor without the weights, see `Network.config`."""
        return dict(self._arguments)

    @property
    def max_distance(self) -> float:
        """Largest value of a cosine distance."""
        return 2.0

    def encode(self, images: Tensor, frozen_features: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Compute the mean tokens of each group of layers.

        Args:
            images: Normalised images (N, 3, H, W).
            frozen_features: Result of `constant_features` for these images; None computes it.

        Returns:
            Tokens (N, prefix + h * w, width) of each group, without gradient, in the encoder's output dtype.
        """
        self.check_images(images)
        return list(frozen_features) if frozen_features is not None else self.constant_features(images)

    def constant_features(self, images: Tensor) -> list[Tensor]:
        """Compute the mean tokens of each group, which do not change in training, see `Network.constant_features`.

        Args:
            images: Normalised images (N, 3, H, W).

        Returns:
            Tokens (N, prefix + h * w, width) of each group, without gradient, in the encoder's output dtype.
        """
        return _average(self.encoder.forward_tokens(images), self.encoder.group_sizes)

    def fuse(self, groups: Sequence[Tensor]) -> Tensor:
        """Compute the mean over all layers.

        Args:
            groups: Mean tokens of each group, (N, T, width).

        Returns:
            Mean tokens (N, T, width), in the dtype of ``groups``.
        """
        shares = [size / self.depth for size in self.encoder.group_sizes]
        first, *others = [group * share for group, share in zip(groups, shares, strict=True)]
        return sum(others, first)

    def pair_up(
        self, images: Tensor, groups: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Pair the patch tokens of each group with those of the decoder blocks that rebuild it.

        The last blocks of the decoder rebuild the first layers of the encoder.

        Args:
            images: Images (N, 3, H, W), for the size of the maps.
            groups: Mean tokens of each group, (N, prefix + h * w, width).
            outputs: Tokens of each decoder block, in the order of the blocks, with or without prefix tokens.

        Returns:
            Pairs (teacher, student) of features (N, width, h, w), by group: views of the tokens, in their dtype.
        """
        size = self.map_sizes((images.shape[2], images.shape[3]))[0]
        students = _average(list(outputs)[::-1], self.encoder.group_sizes)
        return [(_to_map(t, size), _to_map(s, size)) for t, s in zip(groups, students, strict=True)]

    def distances(
        self, images: Tensor, views: Views = "both", *, exportable: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """Compute the cosine distance between tokens and their reconstruction, see `Network.distances`.

        Args:
            images: Normalised images (N, 3, H, W), in the dtype of the weights.
            views: Ignored; there is one encoder.
            exportable: Whether to use only operators of PyTorch, for ``torch.export``.

        Returns:
            distances: Distances (N, h, w) of each group, float32.
            scores: None.
        """
        outputs = self(images)
        pairs = outputs[0] if isinstance(outputs, tuple) else outputs
        if exportable:
            return [1 - reference.cosine(reference.cosine_sums(teacher, student)) for teacher, student in pairs], None
        return point_distances(pairs), None


def _average(layers: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Return the mean of each group of consecutive layers; adding up needs no stack of all of them."""
    means, start = [], 0
    for size in sizes:
        first, *others = layers[start : start + size]
        means.append(sum(others, first) / size)
        start += size
    return means


def _to_map(tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the last h * w tokens of (N, T, C) as a map (N, C, h, w), in the memory format channels_last."""
    height, width = size
    return tokens[:, tokens.shape[1] - height * width :].unflatten(1, (height, width)).permute(0, 3, 1, 2)
