"""UniAD: a transformer that reconstructs frozen features without copying them (You et al., NeurIPS 2022).

https://arxiv.org/abs/2206.03687; the authors' code: models/reconstructions/uniad.py and models/necks/mfcn.py. Three
measures keep it from copying: attention is masked in the neighbourhood of each point, each decoder layer has its own
learned queries, and noise is added to the features in training.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recontrast.models.backbone import Backbone


class UniAD(nn.Module):
    """UniAD: reconstruction of a frozen feature pyramid by neighbour-masked attention.

    Args:
        backbone: Model name in timm. The paper uses an EfficientNet-B4.
        weights: Pretrained weights: None (timm's hub), a file, "package" or "random", see `Backbone`.
        levels: Number of feature levels from stride 4 on; all are resized to the coarsest and joined.
        size: Image size in pixels, (height, width). The paper uses (224, 224).
        width: Channels of the transformer. Default: 256, as in the paper.
        heads: Attention heads. Default: 8.
        layers: Layers of the encoder and of the decoder. Default: 4.
        feedforward: Hidden channels of the feed-forward blocks. Default: 1024.
        dropout: Dropout probability in training. Default: 0.1.
        neighbours: Side of the masked neighbourhood, in points; odd. Default: 7.
        jitter: Scale of the noise in training, relative to the norm of a feature divided by its length. Default: 20.

    Attributes:
        encoder: Frozen backbone.
        mean: Channel means to subtract from images in [0, 1].
        std: Channel standard deviations to divide by.
        stride: Height and width of images must be multiples of it, in pixels.

    Raises:
        ValueError: If an argument is out of range, the backbone is unknown, or the weights do not fit it.
        OSError: If the weight file or the hub cannot be read.
    """

    mask: Tensor

    def __init__(
        self,
        backbone: str = "efficientnet_b4",
        *,
        weights: str | os.PathLike | None = None,
        levels: int = 3,
        size: tuple[int, int] = (224, 224),
        width: int = 256,
        heads: int = 8,
        layers: int = 4,
        feedforward: int = 1024,
        dropout: float = 0.1,
        neighbours: int = 7,
        jitter: float = 20.0,
    ) -> None:
        super().__init__()
        if neighbours < 1 or neighbours % 2 == 0:
            raise ValueError(f"UniAD: neighbours: wanted an odd number of points, got {neighbours}")
        if width % (2 * heads):
            raise ValueError(f"UniAD: width: wanted a multiple of {2 * heads} (twice the heads), got {width}")
        self._arguments: dict[str, Any] = {
            "backbone": backbone, "levels": levels, "size": tuple(size), "width": width, "heads": heads,
            "layers": layers, "feedforward": feedforward, "dropout": dropout, "neighbours": neighbours,
            "jitter": jitter,
        }  # fmt: skip
        self.encoder = Backbone(backbone, levels=levels, weights=weights, frozen=True)
        self.mean, self.std, self.stride = self.encoder.mean, self.encoder.std, self.encoder.strides[-1]
        self.jitter = jitter
        (height, columns) = self.map_sizes(size)[0]
        channels = sum(self.encoder.channels)
        self.input = nn.Linear(channels, width)
        self.output = nn.Linear(width, channels)
        self.row_positions = nn.Parameter(torch.rand(height, width // 2))
        self.column_positions = nn.Parameter(torch.rand(columns, width // 2))
        options = (width, heads, feedforward, dropout)
        self.encoder_layers = nn.ModuleList(_EncoderLayer(*options) for _ in range(layers))
        self.decoder_layers = nn.ModuleList(_DecoderLayer(height * columns, *options) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", build_neighbour_mask(height, columns, neighbours), persistent=False)
        for module in (*self.encoder_layers.modules(), *self.decoder_layers.modules(), self.input, self.output):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor without the weights, see `ReContrast.config`."""
        return dict(self._arguments)

    def map_sizes(self, size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """Return height and width of the distances for images of ``size``, an int or (h, w), as a list of one.

        Raises:
            ValueError: If the size is not that of the constructor, or not a multiple of ``stride``.
        """
        height, width = (size, size) if isinstance(size, int) else size
        expected: tuple[int, int] = self._arguments["size"]
        if (height, width) != expected or height % self.stride or width % self.stride or not height or not width:
            wanted = f"{expected[0]}x{expected[1]} px, a multiple of {self.stride}"
            raise ValueError(f"UniAD: images: wanted {wanted}, got {height}x{width}")
        return [(height // self.stride, width // self.stride)]

    def align(self, images: Tensor) -> Tensor:
        """Compute the target features: all levels, resized to the coarsest one and joined.

        Args:
            images: Normalised images (N, 3, H, W).

        Returns:
            Features (N, C, h, w), in the dtype of the images.
        """
        levels = self.encoder(images)
        size = levels[-1].shape[-2:]
        resized = [F.interpolate(level, size=size, mode="bilinear", align_corners=True) for level in levels]
        return torch.cat(resized, dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute target features and their reconstruction. In training mode, noise is added to the input features.

        Args:
            images: Normalised images (N, 3, H, W).

        Returns:
            Targets and reconstructions, both (N, C, h, w), in the dtype of the images.
        """
        target = self.align(images)
        tokens = target.flatten(2).transpose(1, 2)  # (N, points, C)
        if self.training and self.jitter:
            scale = self.jitter * tokens.norm(dim=2, keepdim=True) / tokens.shape[2]
            tokens = tokens + torch.randn_like(tokens) * scale
        hidden = self.input(tokens)
        rows, columns = len(self.row_positions), len(self.column_positions)
        positions = torch.cat(
            [
                self.column_positions.unsqueeze(0).expand(rows, -1, -1),
                self.row_positions.unsqueeze(1).expand(-1, columns, -1),
            ],
            dim=2,
        ).flatten(0, 1)
        mask = self.mask.to(hidden.dtype)
        for layer in self.encoder_layers:
            hidden = layer(hidden, positions, mask)
        memory, decoded = hidden, hidden
        for layer in self.decoder_layers:
            decoded = layer(decoded, memory, positions, mask)
        reconstruction = self.output(self.norm(decoded))
        return target, reconstruction.transpose(1, 2).reshape(target.shape)

    def loss(self, images: Tensor) -> Tensor:
        """Compute the mean squared error between targets and reconstructions.

        Args:
            images: Normalised images (N, 3, H, W).

        Returns:
            The loss, a scalar in the dtype of the images.
        """
        target, reconstruction = self(images)
        return F.mse_loss(reconstruction, target)

    def distances(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Compute the Euclidean distance between target and reconstruction of each point, and image scores.

        Args:
            images: Normalised images (N, 3, H, W).

        Returns:
            distances: A list of one tensor (N, h, w), float32.
            scores: Largest distance of each image, (N,), float32.
        """
        target, reconstruction = self(images)
        distances = (reconstruction.float() - target.float()).square().sum(1).sqrt()
        return [distances], distances.amax(dim=(1, 2))


def build_neighbour_mask(height: int, width: int, neighbours: int) -> Tensor:
    """Build the attention mask that hides the neighbourhood of each point, the point itself included.

    Args:
        height: Rows of points.
        width: Columns of points.
        neighbours: Side of the hidden square, in points; odd.

    Returns:
        Mask (height * width, height * width), float32: -inf where attention is not allowed, otherwise 0.

    Raises:
        ValueError: If the square hides all points from one of them.
    """
    y = torch.arange(height).repeat_interleave(width)
    x = torch.arange(width).repeat(height)
    reach = neighbours // 2
    hidden = ((y[:, None] - y).abs() <= reach) & ((x[:, None] - x).abs() <= reach)
    if bool(hidden.all(1).any()):
        raise ValueError(
            f"UniAD: neighbours: wanted a square that leaves points of {height}x{width} visible, got {neighbours}"
        )
    return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))


class _FeedForward(nn.Module):
    """Feed-forward block of a layer, with dropout."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.expand, self.reduce = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.reduce(self.dropout(F.relu(self.expand(tokens))))


class _EncoderLayer(nn.Module):
    """Transformer layer with normalisation after each block and positions added to queries and keys."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.feedforward = _FeedForward(width, feedforward, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        query = tokens + positions
        attended = self.attention(query, query, tokens, attn_mask=mask, need_weights=False)[0]
        tokens = self.norms[0](tokens + self.dropout(attended))
        return self.norms[1](tokens + self.dropout(self.feedforward(tokens)))


class _DecoderLayer(nn.Module):
    """Decoder layer whose queries are learned: they attend to the encoder's tokens, then to the layer before."""

    def __init__(self, points: int, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(points, width))
        self.first = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.second = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.feedforward = _FeedForward(width, feedforward, dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, previous: Tensor, memory: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        tokens = self.queries.expand(len(memory), -1, -1)
        attended = self.first(tokens + positions, memory + positions, memory, attn_mask=mask, need_weights=False)[0]
        tokens = self.norms[0](tokens + self.dropout(attended))
        attended = self.second(tokens + positions, previous + positions, previous, attn_mask=mask, need_weights=False)[
            0
        ]
        tokens = self.norms[1](tokens + self.dropout(attended))
        return self.norms[2](tokens + self.dropout(self.feedforward(tokens)))
