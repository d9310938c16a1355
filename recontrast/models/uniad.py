"""UniAD: a transformer that reconstructs frozen features without copying them (You et al., NeurIPS 2022).

https://arxiv.org/abs/2206.03687; the authors' code: models/reconstructions/uniad.py and models/necks/mfcn.py. Three
measures keep it from copying: attention is masked in the neighbourhood of each point, each decoder layer has its own
learned queries, and noise is added to the features in training.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recontrast.models.backbone import Backbone
from recontrast.models.network import Network, Views

MAX_POINTS = 1 << 12  # the attention mask has the square of this number of values
MAX_LAYERS, MAX_WIDTH = 64, 1 << 14
NEIGHBOURS = 7
POOL = 16  # side of the window whose mean is the image score, in pixels


class UniAD(Network):
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
        neighbours: Side of the masked neighbourhood, in points; odd. None: 7 as in the paper, or fewer for small
            images, where it covers half of the shorter side of the coarsest level.
        jitter: Scale of the noise in training, relative to the norm of a feature divided by its length. Default: 20.
        blocks: Blocks of each level of a vision transformer, which replace ``levels``: ``layers`` of `Backbone`.

    Attributes:
        encoder: Frozen backbone.
        largest_norm: Norm of the longest target or reconstructed feature in training, (), float32.
        mean: Channel means to subtract from images in [0, 1].
        std: Channel standard deviations to divide by.
        stride: Height and width of images must be multiples of it, in pixels.

    Raises:
        ValueError: If an argument is out of range, the backbone is unknown, or the weights do not fit it.
        OSError: If the weight file or the hub cannot be read.
    """

    has_bounded_distances: bool = False
    mask: Tensor
    largest_norm: Tensor

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
        neighbours: int | None = None,
        jitter: float = 20.0,
        blocks: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        if neighbours is not None and (neighbours < 1 or neighbours % 2 == 0):
            raise ValueError(f"UniAD: neighbours: wanted an odd number of points, got {neighbours}")
        if width % (2 * heads):
            raise ValueError(f"UniAD: width: wanted a multiple of {2 * heads} (twice the heads), got {width}")
        for name, value, limit in (("layers", layers, MAX_LAYERS), ("width", width, MAX_WIDTH),
                                   ("feedforward", feedforward, MAX_WIDTH)):  # fmt: skip
            if not 1 <= value <= limit:
                raise ValueError(f"UniAD: {name}: wanted 1 to {limit}, got {value}")
        self._arguments: dict[str, Any] = {
            "backbone": backbone, "levels": levels, "size": tuple(size), "width": width, "heads": heads,
            "layers": layers, "feedforward": feedforward, "dropout": dropout, "neighbours": neighbours,
            "jitter": jitter,
        }  # fmt: skip
        self.encoder = Backbone(backbone, levels=levels, weights=weights, frozen=True, layers=blocks)
        if self.encoder.layers is not None:
            self._arguments["blocks"] = self.encoder.layers
        self.mean, self.std, self.stride = self.encoder.mean, self.encoder.std, self.encoder.strides[-1]
        self.frozen = None
        self.jitter = jitter
        height, columns = self.map_sizes(size)[0]
        if height * columns > MAX_POINTS:
            raise ValueError(f"UniAD: size: wanted at most {MAX_POINTS} points of the coarsest level, got "
                             f"{height * columns} for {size[0]}x{size[1]} px")  # fmt: skip
        channels = sum(self.encoder.channels)
        self.input = nn.Linear(channels, width)
        self.output = nn.Linear(width, channels)
        self.row_positions = nn.Parameter(torch.rand(height, width // 2))
        self.column_positions = nn.Parameter(torch.rand(columns, width // 2))
        options = (width, heads, feedforward, dropout)
        self.encoder_layers = nn.ModuleList(_EncoderLayer(*options) for _ in range(layers))
        self.decoder_layers = nn.ModuleList(_DecoderLayer(height * columns, *options) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        with torch.device("cpu"):  # with its values, also where weights are only described
            mask = build_neighbour_mask(height, columns, neighbours or _choose_neighbours(height, columns))
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("largest_norm", torch.ones(()))
        for module in (*self.encoder_layers.modules(), *self.decoder_layers.modules(), self.input, self.output):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor without the weights, see `Network.config`."""
        return dict(self._arguments)

    @property
    def max_distance(self) -> float:
        """Twice the norm of the longest feature in training, of targets and reconstructions."""
        return 2.0 * float(self.largest_norm)

    def map_sizes(self, size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """Return height and width of the distances for images of ``size``, an int or (h, w), as a list of one.

        Raises:
            ValueError: If the size is not that of the constructor, or not a multiple of ``stride``.
        """
        height, width = self.check_size(size)
        expected: tuple[int, int] = self._arguments["size"]
        if (height, width) != expected:
            wanted = f"{expected[0]}x{expected[1]} px, the size that the model was built for"
            raise ValueError(f"UniAD: images: wanted {wanted}, got {height}x{width}")
        return [(height // self.stride, width // self.stride)]

    def align(self, images: Tensor, frozen_features: Sequence[Tensor] | None = None) -> Tensor:
        """Compute the target features: all levels, resized to the coarsest one and joined.

        Args:
            images: Normalised images (N, 3, H, W).
            frozen_features: Cached features of the encoder, (N, C, h, w) of each level. None computes them.

        Returns:
            Features (N, C, h, w), in the dtype of the images.
        """
        levels = self.encoder(images) if frozen_features is None else frozen_features
        size = levels[-1].shape[-2:]
        resized = [F.interpolate(level, size=size, mode="bilinear", align_corners=True) for level in levels]
        return torch.cat(resized, dim=1)

    def forward(self, images: Tensor, frozen_features: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Compute target features and their reconstruction. In training mode, noise is added to the input features.

        Args:
            images: Normalised images (N, 3, H, W).
            frozen_features: Cached features of the encoder, see `align`.

        Returns:
            Targets and reconstructions, both (N, C, h, w), in the dtype of the images.
        """
        self.check_images(images)
        target = self.align(images, frozen_features)
        tokens = target.flatten(2).transpose(1, 2)  # (N, points, C)
        if self.training and self.jitter:
            scale = self.jitter * torch.linalg.vector_norm(tokens, dim=2, keepdim=True) / tokens.shape[2]
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
        reconstruction = self.output(self.norm(decoded)).transpose(1, 2).reshape(target.shape)
        if self.training:
            norms = [torch.linalg.vector_norm(f.detach().float(), dim=1).amax() for f in (target, reconstruction)]
            self.largest_norm.copy_(torch.stack([self.largest_norm.float(), *norms]).amax())
        return target, reconstruction

    def distances(
        self, images: Tensor, views: Views = "both", *, exportable: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """Compute the Euclidean distance between target and reconstruction of each point, and image scores.

        Args:
            images: Normalised images (N, 3, H, W).
            views: Ignored; there is one encoder.
            exportable: Has no effect: all operators are PyTorch's.

        Returns:
            distances: A list of one tensor (N, h, w), float32.
            scores: Largest mean of 16 x 16 pixels of the upsampled distances, (N,), float32, as in the authors' code.
        """
        target, reconstruction = self(images)
        distances = (reconstruction.float() - target.float()).square().sum(1).sqrt()
        size: tuple[int, int] = self._arguments["size"]
        upsampled = F.interpolate(distances.unsqueeze(1), size=size, mode="bilinear", align_corners=True)
        pooled = F.avg_pool2d(upsampled, tuple(min(POOL, side) for side in size), stride=1)
        return [distances], pooled.amax(dim=(1, 2, 3))


def _choose_neighbours(height: int, width: int) -> int:
    """Return the largest odd number up to 7 and half of the shorter side."""
    half = min(NEIGHBOURS, min(height, width) // 2)
    return max(half - 1 + half % 2, 1)


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
        tokens = self.queries.expand(memory.shape[0], -1, -1)  # len() would fix the batch in an export
        attended = self.first(tokens + positions, memory + positions, memory, attn_mask=mask, need_weights=False)[0]
        tokens = self.norms[0](tokens + self.dropout(attended))
        attended = self.second(tokens + positions, previous + positions, previous, attn_mask=mask, need_weights=False)[
            0
        ]
        tokens = self.norms[1](tokens + self.dropout(attended))
        return self.norms[2](tokens + self.dropout(self.feedforward(tokens)))
