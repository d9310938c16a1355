"""PaDiM: a Gaussian of good images' features at each point, and Mahalanobis distances to it (Defard et al., 2020).

https://arxiv.org/abs/2011.08785. No weight is trained: one pass over the good images estimates the Gaussians.
"""

import math
import os
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from recontrast.device_limits import to_float64
from recontrast.models.backbone import Backbone
from recontrast.models.network import OnePassNetwork, Views, disable_autocast

REGULARISATION = 0.01  # added to the diagonal of each covariance (section III-B of the paper)
BLOCK = 256  # points whose covariances are inverted at a time


class PaDiM(OnePassNetwork):
    """PaDiM: Mahalanobis distances to a Gaussian for each point of the feature map.

    `observe` collects first and second moments of the features of good images, and `fit_gaussians` inverts the
    covariances; after `resume`, together with those of the images that the model was fitted to. Memory is (points) x
    (features)^2 floats and does not depend on the number of images.

    Args:
        backbone: Model name in timm.
        weights: Pretrained weights: None (timm's hub), a file, "package" or "random", see `Backbone`.
        levels: Number of feature levels from stride 4 on, joined at the size of the first one. The paper uses 3.
        layers: Blocks of each level of a vision transformer, which replace ``levels``, see `Backbone`.
        features: Number of channels, drawn at random from those of all levels. The paper uses 100 for a ResNet-18 and
            550 for a WideResNet-50-2.
        seed: Seed of the draw.

    Attributes:
        encoder: Frozen backbone.
        channels: Indices of the drawn channels, (features,), int64.
        points: Height and width of the feature map that the model was fitted for, (2,), int64; zeros in a new model.
        centres: Mean of each point, (points, features), float32.
        whitening: Inverse Cholesky factor of each covariance, lower triangle row by row,
            (points, features * (features + 1) / 2), float32.
        mean: Channel means to subtract from images in [0, 1].
        std: Channel standard deviations to divide by.
        stride: Height and width of images must be multiples of it, in pixels.

    Raises:
        ValueError: If an argument is out of range, the backbone is unknown, or the weights do not fit it.
        OSError: If the weight file or the hub cannot be read.
    """

    channels: Tensor
    points: Tensor
    centres: Tensor
    whitening: Tensor
    fitted_buffers: ClassVar[tuple[str, ...]] = ("centres", "whitening")

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        *,
        weights: str | os.PathLike | None = None,
        levels: int = 3,
        layers: Sequence[Sequence[int]] | None = None,
        features: int = 100,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.encoder = Backbone(backbone, levels=levels, weights=weights, frozen=True, layers=layers)
        total = sum(self.encoder.channels)
        if not 1 <= features <= total:
            wanted = f"1 to {total} (the channels of {len(self.encoder.channels)} levels of {backbone})"
            raise ValueError(f"PaDiM: features: wanted {wanted}, got {features}")
        self._arguments: dict[str, Any] = {"backbone": backbone, "levels": levels, "features": features, "seed": seed}
        if self.encoder.layers is not None:
            self._arguments["layers"] = self.encoder.layers
        self.frozen = None
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed), device="cpu")[:features]
        self.register_buffer("channels", drawn.sort().values)
        self.register_buffer("points", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("centres", torch.zeros(0, features))
        self.register_buffer("whitening", torch.zeros(0, features * (features + 1) // 2))
        self.mean, self.std = self.encoder.mean, self.encoder.std
        self.stride = self.encoder.strides[-1]
        self._moments: _Moments | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor without the weights, see `Network.config`."""
        return dict(self._arguments)

    @property
    def max_distance(self) -> float:
        """Bound of the distance between two vectors of the length of the longest mean.

        The regularisation bounds the inverse Cholesky factors.
        """
        if not len(self.centres):
            return 1.0
        return 2.0 * float(torch.linalg.vector_norm(self.centres, dim=1).max()) / math.sqrt(REGULARISATION)

    def map_sizes(self, size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """Return height and width of the distances for images of ``size``, an int or (h, w), as a list of one.

        Raises:
            ValueError: If height or width is not a multiple of ``stride``, or a fitted model has another size.
        """
        height, width = self.check_size(size)
        finest = self.encoder.strides[0]
        points = (height // finest, width // finest)
        if len(self.centres) and list(points) != self.points.tolist():
            rows, columns = self.points.tolist()
            wanted = f"{rows * finest}x{columns * finest} px, the size that the model was fitted for"
            raise ValueError(f"PaDiM: images: wanted {wanted}, got {height}x{width}")
        return [points]

    def forward(self, images: Tensor) -> Tensor:
        """Compute the randomly selected channels of all levels, with coarse levels repeated to the size of the first.

        Args:
            images: Normalised images (N, 3, H, W).

        Returns:
            Features (N, features, h, w), float32.
        """
        return self.embed(self.encoder(images))

    def embed(self, levels: Sequence[Tensor]) -> Tensor:
        """Select and join the channels of features of the encoder.

        Args:
            levels: Features of each level, (N, C, h, w).

        Returns:
            Features (N, features, h, w), float32.
        """
        size = levels[0].shape[-2:]
        resized = [levels[0], *(F.interpolate(level, size=size, mode="nearest") for level in levels[1:])]
        return torch.cat(resized, dim=1).index_select(1, self.channels).float()

    @torch.no_grad()
    def observe(self, images: Tensor) -> None:
        """Add the features of a batch of good images to the moments of `fit_gaussians`.

        Args:
            images: Normalised images (N, 3, H, W), of one size in all calls.
        """
        self.check_images(images)
        self.observe_features(self(images))

    @torch.no_grad()
    def observe_features(self, features: Tensor) -> None:
        """Add features to the moments of `fit_gaussians`.

        Args:
            features: Features of good images that `forward` has computed, (N, features, h, w).
        """
        vectors = features.flatten(2).permute(2, 0, 1)  # (points, N, features)
        if self._moments is None:
            self._moments = _Moments(vectors, (features.shape[2], features.shape[3]))
        self._moments.add(vectors)

    @torch.no_grad()
    def resume(self, count: int) -> list[int]:
        """Restore the moments of the images that the Gaussians were fitted to, so that `observe` adds to them.

        Mean, covariance and number of images determine both moments. The covariance is computed in float64 from its
        inverse Cholesky factor, which is stored in float32.

        Args:
            count: Number of images that the Gaussians were fitted to, at least 2.

        Returns:
            No positions: no former image is needed.

        Raises:
            ValueError: If the model is not fitted, or ``count`` is below 2.
        """
        if not len(self.centres) or count < 2:
            got = f"one of {count} images" if len(self.centres) else "one without Gaussians"
            raise ValueError(f"PaDiM: resume: wanted a model fitted to at least 2 images, got {got}")
        rows, columns = self.points.tolist()
        self._moments = moments = _Moments(self.centres.unsqueeze(1), (rows, columns))
        width = len(self.channels)
        lower = torch.tril_indices(width, width)
        for begin in range(0, len(self.centres), BLOCK):
            packed = to_float64(self.whitening[begin : begin + BLOCK])
            identity = torch.eye(width, dtype=packed.dtype, device=packed.device)
            inverse = packed.new_zeros(len(packed), width, width)
            inverse[:, lower[0], lower[1]] = packed
            factor = torch.linalg.solve_triangular(inverse, identity.expand_as(inverse), upper=False)
            covariance = factor @ factor.mT - REGULARISATION * identity
            moments.products[begin : begin + BLOCK] = ((count - 1) * covariance).float().to(moments.products.device)
        moments.count = count
        return []

    def plan_memory(self, size: int | tuple[int, int], available: int) -> None:
        """Check that the moments of `observe` fit into the available memory.

        Args:
            size: Size of the images in pixels, an int or (h, w).
            available: Available memory in bytes.

        Raises:
            ValueError: If they do not fit.
        """
        height, width = self.map_sizes(size)[0]
        count = len(self.channels)
        needed = height * width * (4 * count * count + 4 * count * (count + 1))  # products; factors, joined in the end
        if needed > available:
            raise ValueError(
                f"PaDiM: gaussian_features: wanted moments that fit into {available / 1e6:,.1f} MB of available "
                f"memory, got {needed / 1e6:,.1f} MB ({count} features of {height} x {width} points): lower "
                "gaussian_features or the size of the images"
            )

    @torch.no_grad()
    def fit_gaussians(self) -> int:
        """Compute mean and inverse Cholesky factor of each point from the observed images, and forget the moments.

        Returns:
            Number of observed images.

        Raises:
            ValueError: If fewer than two images were observed, or a feature is not finite.
        """
        moments, self._moments = self._moments, None
        if moments is None or moments.count < 2:
            got = 0 if moments is None else moments.count
            raise ValueError(f"PaDiM: fit_gaussians: wanted at least 2 observed images, got {got}")
        width = len(self.channels)
        rows, cols = torch.tril_indices(width, width)
        centres = moments.shift + moments.sums / moments.count
        if not bool(moments.products.isfinite().all()):
            raise ValueError("PaDiM: features: wanted finite values, got NaN, infinity or values above 1e19")
        packed = []
        for begin in range(0, len(centres), BLOCK):
            means = to_float64(moments.sums[begin : begin + BLOCK]) / moments.count
            products = to_float64(moments.products[begin : begin + BLOCK])
            identity = torch.eye(width, dtype=products.dtype, device=products.device)
            covariance = (products - moments.count * means.unsqueeze(2) * means.unsqueeze(1)) / (moments.count - 1)
            factor = torch.linalg.cholesky(covariance + REGULARISATION * identity)
            inverse = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
            packed.append(inverse[:, rows, cols].float().to(centres.device))
        self.points = torch.tensor(moments.size, device=centres.device)
        self.centres, self.whitening = centres, torch.cat(packed)
        return moments.count

    def distances(
        self, images: Tensor, views: Views = "both", *, exportable: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """Compute the Mahalanobis distance of each point, and image scores, see `Network.distances`.

        Args:
            images: Normalised images (N, 3, H, W), of the size that the model was fitted for.
            views: Ignored; there is one encoder.
            exportable: Whether to use only operators of PyTorch, for ``torch.export``.

        Returns:
            distances: A list of one tensor (N, h, w), float32.
            scores: Largest distance of each image, (N,), float32.

        Raises:
            ValueError: If the model is not fitted, or the images have another size.
        """
        if not len(self.centres):
            raise ValueError("PaDiM: wanted a fitted model, got one without Gaussians")
        if not exportable:  # which cannot read the size that the model was fitted for
            self.map_sizes((images.shape[2], images.shape[3]))
        return self.distances_of(self(images), exportable=exportable)

    def distances_of(self, embedded: Tensor, *, exportable: bool = False) -> tuple[list[Tensor], Tensor]:
        """Compute the Mahalanobis distance of each point of features, and image scores.

        Args:
            embedded: Features that `forward` has computed, (N, features, h, w).
            exportable: Whether to use only operators of PyTorch, for ``torch.export``.

        Returns:
            See `distances`: a list of one tensor (N, h, w) and scores (N,), float32.
        """
        height, width = embedded.shape[2:]
        with disable_autocast(embedded, exportable):  # bfloat16 has too few digits for distances
            differences = embedded.flatten(2).permute(2, 1, 0) - self.centres.unsqueeze(2)  # (points, d, N)
            count = len(self.channels)
            rows, cols = torch.tril_indices(count, count, device=self.whitening.device)
            squared = []
            for begin in range(0, height * width, BLOCK):
                packed = self.whitening[begin : begin + BLOCK]
                inverse = packed.new_zeros(len(packed), count, count)
                inverse[:, rows, cols] = packed
                squared.append((inverse @ differences[begin : begin + BLOCK]).square().sum(1))
            distances = torch.cat(squared).sqrt().T.view(-1, height, width)
        return [distances], distances.amax(dim=(1, 2))


class _Moments:
    """Sums of the features of each point and of their products, relative to the first batch's means.

    The shift keeps the digits that ``E[x^2] - E[x]^2`` would lose.
    """

    def __init__(self, vectors: Tensor, size: tuple[int, int]) -> None:
        points, _, width = vectors.shape
        self.size, self.count = size, 0
        self.shift = vectors.mean(1)
        self.sums = vectors.new_zeros(points, width)
        self.products = vectors.new_zeros(points, width, width)

    def add(self, vectors: Tensor) -> None:
        """Add the vectors (points, N, features) of N images."""
        if len(vectors) != len(self.sums):
            raise ValueError(f"PaDiM: observe: wanted {len(self.sums)} points as before, got {len(vectors)}")
        centred = vectors - self.shift.unsqueeze(1)
        self.sums += centred.sum(1)
        self.products.baddbmm_(centred.mT, centred)
        self.count += vectors.shape[1]
