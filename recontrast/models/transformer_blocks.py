"""Transformer blocks of Dinomaly and INP-Former, with the names of their parameters in the authors' codes.

Dinomaly: Guo et al., CVPR 2025, https://arxiv.org/abs/2405.14325. INP-Former: Luo et al., CVPR 2025,
https://arxiv.org/abs/2503.02424. Both codes: models/vision_transformer.py.
"""

import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-8  # of the LayerNorms in both codes
COSINE_EPS = 1e-8  # default of F.cosine_similarity
HIDDEN_RATIO = 4  # hidden channels of `Mlp`, relative to its input


class Mlp(nn.Module):
    """Two linear layers with GELU between them, with dropout.

    ``Mlp`` of both codes; ``bMlp`` of Dinomaly, its noisy bottleneck, with ``drop_input``.

    Args:
        width: Channels of input and output.
        dropout: Probability of dropout in training, after each layer.
        drop_input: Whether dropout also acts on the input.
    """

    def __init__(self, width: int, dropout: float = 0.0, *, drop_input: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, HIDDEN_RATIO * width)
        self.fc2 = nn.Linear(HIDDEN_RATIO * width, width)
        self.dropout, self.drop_input = nn.Dropout(dropout), drop_input

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the output of tokens (..., width), in the same shape."""
        if self.drop_input:
            tokens = self.dropout(tokens)
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(tokens)))))


class LinearAttention(nn.Module):
    """Self-attention with the kernel ``elu + 1`` in place of softmax; its cost grows linearly with the tokens.

    ``LinearAttention2`` of Dinomaly; Katharopoulos et al., https://arxiv.org/abs/2006.16236, equation 5.

    Args:
        width: Channels, a multiple of ``heads``.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the output of tokens (N, T, width), in the same shape."""
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        query, key = F.elu(query) + 1, F.elu(key) + 1  # (N, heads, T, d), positive
        weight = query @ key.sum(2).unsqueeze(3)  # (N, heads, T, 1)
        attended = query @ (key.mT @ value) / weight
        return self.proj(attended.transpose(1, 2).flatten(2))


class DecoderBlock(nn.Module):
    """Block of Dinomaly's decoder: linear attention and `Mlp`, normalised before each (``Block`` of its code).

    Args:
        width: Channels, a multiple of ``heads``.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, NORM_EPS), nn.LayerNorm(width, NORM_EPS)
        self.attn, self.mlp = LinearAttention(width, heads), Mlp(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the output of tokens (N, T, width), in the same shape."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class _CrossAttention(nn.Module):
    """Projections of an attention from queries to other tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def project(self, queries: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (N, heads, Q, d), keys and values (N, heads, T, d)."""
        query = self.q(queries).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key, value = self.kv(others).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value


class AggregationAttention(_CrossAttention):
    """Softmax attention from prototypes to tokens (``Aggregation_Attention`` of INP-Former).

    Args:
        width: Channels, a multiple of ``heads``.
        heads: Number of heads.
    """

    def forward(self, prototypes: Tensor, tokens: Tensor) -> Tensor:
        """Compute the output of prototypes (N, P, width) that attend to tokens (N, T, width), (N, P, width)."""
        query, key, value = self.project(prototypes, tokens)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


class AggregationBlock(nn.Module):
    """INP extractor: prototypes collect what is normal in an image (``Aggregation_Block`` of INP-Former).

    Args:
        width: Channels, a multiple of ``heads``.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, NORM_EPS), nn.LayerNorm(width, NORM_EPS)
        self.attn, self.mlp = AggregationAttention(width, heads), Mlp(width)

    def forward(self, prototypes: Tensor, tokens: Tensor) -> Tensor:
        """Compute the prototypes of each image, (N, P, width), from prototypes (N, P, width) and tokens (N, T, width).

        Both inputs share the first norm, as in the authors' code.
        """
        prototypes = prototypes + self.attn(self.norm1(prototypes), self.norm1(tokens))
        return prototypes + self.mlp(self.norm2(prototypes))


class PrototypeAttention(_CrossAttention):
    """Attention from tokens to prototypes by their rectified cosine (``Prototype_Attention`` of INP-Former).

    Args:
        width: Channels, a multiple of ``heads``.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.learn_scale = nn.Parameter(self.proj.weight.new_ones(heads, 1, 1))

    def forward(self, tokens: Tensor, prototypes: Tensor) -> Tensor:
        """Compute the output of tokens (N, T, width) that attend to prototypes (N, P, width), (N, T, width)."""
        query, key, value = self.project(tokens, prototypes)
        cosines = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).mT
        attended = F.relu(cosines * self.learn_scale) @ value
        return self.proj(attended.transpose(1, 2).flatten(2))


class PrototypeBlock(nn.Module):
    """Block of the INP-guided decoder (``Prototype_Block`` of INP-Former).

    Tokens do not pass around the attention: the output is made of prototypes alone.

    Args:
        width: Channels, a multiple of ``heads``.
        heads: Number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, NORM_EPS), nn.LayerNorm(width, NORM_EPS)
        self.attn, self.mlp = PrototypeAttention(width, heads), Mlp(width)

    def forward(self, tokens: Tensor, prototypes: Tensor) -> Tensor:
        """Compute the output of tokens (N, T, width) guided by prototypes (N, P, width), (N, T, width)."""
        tokens = self.attn(self.norm1(tokens), self.norm1(prototypes))
        return tokens + self.mlp(self.norm2(tokens))


def initialise(module: nn.Module) -> None:
    """Initialise the linear layers and norms below ``module`` as the scripts of both codes do.

    Args:
        module: Module, changed in place: weights from a normal distribution of deviation 0.01, cut at 0.03; biases 0.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.01, a=-0.03, b=0.03)
            nn.init.zeros_(part.bias)


def compute_coherence(tokens: Tensor, prototypes: Tensor) -> Tensor:
    """Compute the cosine distance of each token to the closest prototype of its image (INP-Former, equation 5).

    ``gather_loss`` of the authors' code, as one matrix product instead of a tensor (N, T, P, C).

    Args:
        tokens: Tokens (N, T, C).
        prototypes: Prototypes (N, P, C).

    Returns:
        Distances (N, T), in [0, 2].
    """
    unit = [F.normalize(vectors, dim=2, eps=COSINE_EPS) for vectors in (tokens, prototypes)]
    return 1 - (unit[0] @ unit[1].mT).amax(2)
