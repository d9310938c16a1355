"""PatchCore: a bank of features of good images, and distances to it (Roth et al., CVPR 2022).

https://arxiv.org/abs/2106.08265. No weight is trained: one pass over the good images fills the bank.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from recontrast.device_limits import pool_adaptively
from recontrast.inside import pool_inside
from recontrast.models.backbone import Backbone
from recontrast.models.coreset import ACTIVE_SHARE, find_nearest, project_randomly, select_coreset
from recontrast.models.network import OnePassNetwork, Views, check_choice, disable_autocast

MAX_DIMENSION = 1 << 16
PROJECTION = 128  # dimensions of the random projection in which the bank is selected
MEMORY_SHARE = 0.8  # of the available memory that fitting may use


class PatchCore(OnePassNetwork):
    """PatchCore: distances of local features to the nearest features of good images.

    `observe` collects the features of good images, and `build_bank` keeps a coreset of them. The bank is stored in
    float16, and distances are computed in float32.

    Args:
        backbone: Model name in timm. The paper uses "wide_resnet50_2.tv_in1k".
        weights: Pretrained weights: None (timm's hub), a file, "package" or "random", see `Backbone`.
        levels: Feature levels, counted from 1 at stride 4. None uses (2, 3), as in the paper, or all of ``layers``.
        layers: Blocks of each level of a vision transformer, see `Backbone`.
        embedding: How a point's 3 x 3 neighbourhood becomes one vector. "average" takes its mean in each level and
            joins the levels, as anomalib does. "unfold" joins the nine vectors and averages them down to
            ``dimension`` values in each level and again over the levels, as the authors' code does.
        dimension: Values per vector with ``embedding="unfold"``. Default: 1024, as in the paper.
        neighbours: Vectors of the bank around the nearest one that weigh the image score (equation 7 of the paper).
            1 disables the weighting.

    Attributes:
        encoder: Frozen backbone.
        bank: Vectors of the bank, (M, d), float16; empty in a new model.
        mean: Channel means to subtract from images in [0, 1].
        std: Channel standard deviations to divide by.
        stride: Height and width of images must be multiples of it, in pixels.

    Raises:
        ValueError: If an argument is out of range, the backbone is unknown, or the weights do not fit it.
        OSError: If the weight file or the hub cannot be read.
    """

    bank: Tensor
    fits_inside = True
    fitted_buffers: ClassVar[tuple[str, ...]] = ("bank",)

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        *,
        weights: str | os.PathLike | None = None,
        levels: Sequence[int] | None = None,
        layers: Sequence[Sequence[int]] | None = None,
        embedding: Literal["average", "unfold"] = "average",
        dimension: int = 1024,
        neighbours: int = 1,
    ) -> None:
        super().__init__()
        if levels is None:
            levels = (2, 3) if layers is None else tuple(range(1, len(layers) + 1))
        if not levels or list(levels) != sorted(set(levels)) or levels[0] < 1:
            raise ValueError(f"PatchCore: levels: wanted ascending numbers from 1 on, got {tuple(levels)}")
        check_choice("PatchCore", "embedding", embedding, ("average", "unfold"))
        if not 1 <= dimension <= MAX_DIMENSION:
            raise ValueError(f"PatchCore: dimension: wanted 1 to {MAX_DIMENSION}, got {dimension}")
        if neighbours < 1:
            raise ValueError(f"PatchCore: neighbours: wanted at least 1, got {neighbours}")
        if layers is not None and levels[-1] > len(layers):
            raise ValueError(f"PatchCore: levels: wanted at most {len(layers)}, as there are layers, got {levels[-1]}")
        self.encoder = Backbone(backbone, levels=levels[-1], weights=weights, frozen=True, layers=layers)
        self.frozen = None
        self.levels, self.embedding, self.dimension, self.neighbours = tuple(levels), embedding, dimension, neighbours
        channels = [self.encoder.channels[level - 1] for level in levels]
        self.width = sum(channels) if embedding == "average" else dimension
        self.register_buffer("bank", torch.zeros(0, self.width, dtype=torch.float16))
        self.mean, self.std = self.encoder.mean, self.encoder.std
        self.stride = self.encoder.strides[-1]
        self._observed: list[Tensor] = []
        self._seen = 0  # vectors of all observed images, of which `_observed` may hold a share
        self._observed_share = 1.0
        self._generator = torch.Generator()
        self._float32_bank: tuple[Tensor, Tensor] | None = None  # the bank that was converted, and the result

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor without the weights, see `Network.config`."""
        return {
            "backbone": self.encoder.name,
            "levels": self.levels,
            **({} if self.encoder.layers is None else {"layers": self.encoder.layers}),
            "embedding": self.embedding,
            "dimension": self.dimension,
            "neighbours": self.neighbours,
        }

    @property
    def max_distance(self) -> float:
        """Twice the norm of the longest vector in the bank, which a vector of the same length cannot exceed."""
        return 2.0 * float(torch.linalg.vector_norm(self.bank.float(), dim=1).max()) if len(self.bank) else 1.0

    def map_sizes(self, size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """Return height and width of the distances for images of ``size``, an int or (h, w), as a list of one.

        Raises:
            ValueError: If height or width is not a multiple of ``stride``.
        """
        height, width = self.check_size(size)
        finest = self.encoder.strides[self.levels[0] - 1]
        return [(height // finest, width // finest)]

    def forward(self, images: Tensor) -> Tensor:
        """Compute the feature vectors of images.

        Args:
            images: Normalised images (N, 3, H, W).

        Returns:
            Vectors (N, d, h, w), in the size of the finest level, float32.
        """
        return self.embed(self.encoder(images))

    def embed(self, features: Sequence[Tensor]) -> Tensor:
        """Compute the feature vectors from features of the encoder.

        Args:
            features: Features of each level, (N, C, h, w).

        Returns:
            Vectors (N, d, h, w), in the size of the finest level, float32.
        """
        chosen = [features[level - 1].float() for level in self.levels]
        size = chosen[0].shape[-2:]
        if self.embedding == "average":
            pooled = [F.avg_pool2d(feature, 3, 1, 1) for feature in chosen]
            return torch.cat([pooled[0], *(_resize(feature, size) for feature in pooled[1:])], dim=1)
        # Averaging over channels and resizing commute, so that the small tensor is resized.
        averaged = [_average_channels(_unfold(feature), self.dimension) for feature in chosen]
        return _average_channels(
            torch.cat([averaged[0], *(_resize(feature, size) for feature in averaged[1:])], dim=1), self.dimension
        )

    def plan_memory(
        self, count: int, size: int | tuple[int, int], share: float, available: int, *, seed: int = 0
    ) -> str | None:
        """Fit `observe` and `build_bank` into the available memory.

        If the features of all images do not fit, `observe` collects a random share of them.

        Args:
            count: Number of images that will be observed.
            size: Size of the images in pixels, an int or (h, w).
            share: Share of the vectors to keep, see `build_bank`.
            available: Available memory in bytes.
            seed: Seed of the random share.

        Returns:
            A sentence about the random share; None if all features fit.

        Raises:
            ValueError: If the bank itself does not fit.
        """
        height, width = self.map_sizes(size)[0]
        total = count * height * width
        dimension = min(self.width, PROJECTION)
        # The vectors in float16; in float32 their projections, those of the active ones, and two numbers for each.
        each = 2 * self.width + 4 * dimension + 4 * dimension // ACTIVE_SHARE + 8
        # The bank in float16, and in float32 for predictions.
        bank = 6 * self.width * (len(self.bank) + max(int(total * share), 1))
        budget = int(MEMORY_SHARE * available) - bank
        kept = min(budget / (each * total), 1.0)
        if kept < share:
            least = (bank + each * total * share) / MEMORY_SHARE
            raise ValueError(
                f"PatchCore: bank_share: wanted a bank that fits into {available / 1e6:,.1f} MB of available memory, "
                f"got one that needs {least / 1e6:,.1f} MB ({share:g} of the features of {count} images): lower "
                "bank_share or the size of the images"
            )
        self._observed_share = kept
        self._generator.manual_seed(seed)
        if kept == 1:
            return None
        return (
            f"the features of {count} images need {(bank + each * total) / MEMORY_SHARE / 1e6:,.1f} MB, and "
            f"{available / 1e6:,.1f} MB are available: the bank is selected from a random share of {kept:.1%} of them"
        )

    @torch.no_grad()
    def observe(self, images: Tensor, inside: Tensor | None = None) -> None:
        """Collect the feature vectors of a batch of good images for `build_bank`.

        Args:
            images: Normalised images (N, 3, H, W).
            inside: Whether each pixel is in the region of interest, (N, H, W) bool of any size, on the device of the
                images; other points are left out (`recontrast.inside.pool_inside`). None takes all.
        """
        self.check_images(images)
        self.observe_features(self(images), inside)

    def observe_features(self, embedded: Tensor, inside: Tensor | None = None) -> None:
        """Collect feature vectors for `build_bank`.

        Args:
            embedded: Vectors of good images that `forward` has computed, (N, d, h, w).
            inside: Region of interest, as in `observe`.
        """
        vectors = embedded.permute(0, 2, 3, 1)
        vectors = vectors.flatten(0, 2) if inside is None else vectors[pool_inside(inside, embedded.shape[2:])]
        self._seen += len(vectors)
        if self._observed_share < 1:
            count = math.floor(self._observed_share * len(vectors))
            order = torch.randperm(len(vectors), generator=self._generator)
            vectors = vectors[order[:count].to(vectors.device)]
        self._observed.append(vectors.half())

    def build_bank(self, share: float = 0.1, *, seed: int = 0) -> Tensor:
        """Select a share of the observed vectors for the bank, and forget the others.

        A bank that is fitted already keeps its vectors. It gains those of the observed vectors that are farthest from
        it and from each other.

        Args:
            share: Share of the observed vectors to keep, in (0, 1]; at least one is kept. The paper uses 0.1 and 0.01.
            seed: Seed of the random projection and of the first vector.

        Returns:
            Positions of the bank's vectors among those of the former bank and the observed ones, (M,), int64.

        Raises:
            ValueError: If ``share`` is out of range, no image was observed, or a feature is not finite in float16.
        """
        if not 0 < share <= 1:
            raise ValueError(f"PatchCore: share: wanted a value in (0, 1], got {share}")
        if not self._observed:
            raise ValueError("PatchCore: build_bank: wanted observed images, got none")
        observed, self._observed = self._observed, []
        seen, self._seen = self._seen, 0
        total = sum(map(len, observed))
        count = min(max(int(seen * share), 1), total)
        if not all(bool(vectors.isfinite().all()) for vectors in observed):
            raise ValueError("PatchCore: features: wanted values that fit into float16, got NaN or values above 65504")
        bank = self.bank.to(observed[0].device)
        selected = torch.arange(total, device=bank.device)
        if count < total:
            # Batch by batch, because a float32 copy of all vectors would need twice their memory.
            projected = torch.empty(total, min(self.width, PROJECTION), device=bank.device)
            for part, vectors in zip(projected.split([len(v) for v in observed]), observed, strict=True):
                part.copy_(project_randomly(vectors, PROJECTION, seed))
            start = int(torch.randint(total, (1,), generator=torch.Generator().manual_seed(seed)))
            centres = project_randomly(bank, PROJECTION, seed)
            selected = select_coreset(projected, count, start=start, centres=centres)
        self.bank = torch.cat([bank, _take_rows(observed, selected)])
        return torch.cat([torch.arange(len(bank), device=bank.device), len(bank) + selected])

    def distances(
        self, images: Tensor, views: Views = "both", *, exportable: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """Compute the distance of each point to the bank, and image scores, see `Network.distances`.

        Args:
            images: Normalised images (N, 3, H, W).
            views: Ignored; there is one encoder.
            exportable: Whether to use only operators of PyTorch, for ``torch.export``.

        Returns:
            distances: A list of one tensor (N, h, w), float32: Euclidean distances to the nearest vector of the bank.
            scores: Largest distance of each image, (N,), float32, weighted if ``neighbours`` exceeds 1.

        Raises:
            ValueError: If the bank is empty.
        """
        if not len(self.bank):
            raise ValueError("PatchCore: bank: wanted a fitted model, got an empty bank")
        return self.distances_of(self(images), exportable=exportable)

    def distances_of(self, embedded: Tensor, *, exportable: bool = False) -> tuple[list[Tensor], Tensor]:
        """Compute the distance of feature vectors to the bank, and image scores.

        Args:
            embedded: Vectors that `forward` has computed, (N, d, h, w).
            exportable: Whether to use only operators of PyTorch, for ``torch.export``.

        Returns:
            See `distances`: a list of one tensor (N, h, w) and scores (N,), float32.
        """
        with disable_autocast(embedded, exportable):  # bfloat16 has too few digits for distances
            vectors = embedded.permute(0, 2, 3, 1).flatten(1, 2)  # (N, points, d)
            bank = self.bank.float() if exportable else self._get_float32_bank()
            nearest, indices = self._find_nearest(vectors, bank, exportable)
            scores, point = nearest.max(1)
            if self.neighbours > 1:
                worst = vectors.gather(1, point.view(-1, 1, 1).expand(-1, -1, vectors.shape[2]))[:, 0]
                scores = scores * self._weigh(worst, indices.gather(1, point[:, None])[:, 0], bank)
        return [nearest.view(-1, *embedded.shape[2:])], scores

    def _find_nearest(self, vectors: Tensor, bank: Tensor, exportable: bool) -> tuple[Tensor, Tensor]:
        """Return the distance of each vector (N, points, d) to the bank, and the index of the nearest one there."""
        if not exportable:
            distances, indices = find_nearest(vectors.flatten(0, 1), bank)
            return distances.view(vectors.shape[:2]), indices.view(vectors.shape[:2])
        indices = (bank.square().sum(1) - 2 * vectors @ bank.T).argmin(2)
        return (vectors - bank[indices]).square().sum(2).sqrt(), indices

    def _weigh(self, worst: Tensor, nearest: Tensor, bank: Tensor) -> Tensor:
        """Compute the weights of equation 7: small where the bank around the nearest vector is as far away."""
        count = min(self.neighbours, len(bank))
        centres = bank[nearest]
        squares = bank.square().sum(1) - 2 * centres @ bank.T
        around = squares.topk(count, largest=False).indices  # with the nearest vector itself
        distances = (worst.unsqueeze(1) - bank[around]).square().sum(2).sqrt()
        own = (worst - centres).square().sum(1).sqrt()
        return 1 - (own - distances.logsumexp(1)).exp()

    def _get_float32_bank(self) -> Tensor:
        """Return the bank in float32, converted once."""
        if self._float32_bank is None or self._float32_bank[0] is not self.bank:
            self._float32_bank = self.bank, self.bank.float()
        return self._float32_bank[1]


def _take_rows(parts: Sequence[Tensor], indices: Tensor) -> Tensor:
    """Return rows of the joined ``parts`` without joining them."""
    rows = parts[0].new_empty(len(indices), parts[0].shape[1])
    begin = 0
    for part in parts:
        positions = ((indices >= begin) & (indices < begin + len(part))).nonzero()[:, 0]
        rows[positions] = part[indices[positions] - begin]
        begin += len(part)
    return rows


def _resize(feature: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(feature, size=tuple(size), mode="bilinear", align_corners=False)


def _unfold(feature: Tensor) -> Tensor:
    """Join the vectors of each 3 x 3 neighbourhood, with zeros outside: (N, C, h, w) -> (N, 9 C, h, w)."""
    return F.unfold(feature, 3, padding=1).view(len(feature), -1, *feature.shape[-2:])


def _average_channels(feature: Tensor, count: int) -> Tensor:
    """Average neighbouring channels down, or repeat them up, to ``count``: (N, C, h, w) -> (N, count, h, w)."""
    batch, _, height, width = feature.shape
    channels = feature.permute(0, 2, 3, 1).reshape(batch * height * width, 1, -1)
    averaged = pool_adaptively(F.adaptive_avg_pool1d, channels, (count,))
    return averaged.view(batch, height, width, count).permute(0, 3, 1, 2)
