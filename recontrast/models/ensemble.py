"""An ensemble of PatchCore on large images and PaDiM on small ones, which share one encoder.

PatchCore (https://arxiv.org/abs/2106.08265) sees details and no position, PaDiM (https://arxiv.org/abs/2011.08785) sees
positions and no details. The distances of each are divided by their standard deviation on good images, each left out of
what it is compared with, weighted and added up.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recontrast.device_limits import to_float64
from recontrast.models.coreset import find_nearest
from recontrast.models.network import OnePassNetwork, Views, disable_autocast
from recontrast.models.padim import PaDiM
from recontrast.models.patchcore import MEMORY_SHARE, PROJECTION, PatchCore

# Of PatchCore and PaDiM. Chosen on two categories and confirmed on two others (benchmarks/README.md).
WEIGHTS = (1.0, 0.5)
# Least deviation of image scores, relative to their mean. With fewer images than features of PaDiM, all left-out images
# are about equally far away, and a member without a floor would decide every score alone.
LEAST_DEVIATION = 0.05
SAMPLE = 32  # good images whose distances give the standard deviations
# Largest relative distance of two vectors of one point: features are rounded to float16, and of batches of other sizes
# they differ in the last digits.
SAME = 2e-3
MAX_SIZE = 4096  # side of images, in pixels


class Ensemble(OnePassNetwork):
    """PatchCore on images in full size, and PaDiM on the same images in a small size.

    `observe` collects features of good images, and `fit` computes the bank, the Gaussians, and the distances of good
    images from which `set_scales` computes the weights of both.

    Args:
        backbone: Model name in timm.
        weights: Pretrained weights: None (timm's hub), a file, "package" or "random", see `Backbone`.
        small_size: Height and width of the images for PaDiM, in pixels.
        features: Number of channels drawn for PaDiM.
        seed: Seed of the draw.
        layers: Blocks of each level of a vision transformer, see `Backbone`. PatchCore uses levels 2 and 3, or with
            ``layers`` all of them.

    Attributes:
        encoder: Frozen backbone.
        scales: Standard deviation of the map values of PatchCore and of PaDiM on good images, divided by their weights,
            (2,), float32.
        score_scales: The same for their image scores.
        mean: Channel means to subtract from images in [0, 1].
        std: Channel standard deviations to divide by.
        stride: Height and width of images must be multiples of it, in pixels.

    Raises:
        ValueError: If an argument is out of range, the backbone is unknown, or the weights do not fit it.
        OSError: If the weight file or the hub cannot be read.
    """

    scales: Tensor
    score_scales: Tensor

    def __init__(
        self,
        backbone: str = "wide_resnet50_2.tv_in1k",
        *,
        weights: str | os.PathLike | None = None,
        small_size: tuple[int, int] = (128, 128),
        features: int = 100,
        seed: int = 0,
        layers: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self._arguments: dict[str, Any] = {"backbone": backbone, "small_size": tuple(small_size), "features": features}
        self._arguments["seed"] = seed
        self.patchcore = PatchCore(backbone, weights=weights, layers=layers)
        self.padim = PaDiM(backbone, weights="random", features=features, seed=seed, layers=layers)
        self.encoder, self.frozen = self.patchcore.encoder, None
        if layers is not None:
            self._arguments["layers"] = self.encoder.layers
        del self.patchcore.encoder, self.padim.encoder  # one encoder, whose weights are stored once
        self.mean, self.std, self.stride = self.encoder.mean, self.encoder.std, self.encoder.strides[-1]
        if max(small_size) > MAX_SIZE:
            raise ValueError(f"Ensemble: small_size: wanted at most {MAX_SIZE} px, got {small_size[0]}x{small_size[1]}")
        self.small_size = self.check_size((small_size[0], small_size[1]))
        self.register_buffer("scales", torch.ones(2))
        self.register_buffer("score_scales", torch.ones(2))
        self._images = 0  # observed, with the former ones
        self._former = 0  # of a fit that goes on
        self._slots: list[int] = []  # of former images that `observe_again` needs
        self._sample: dict[int, tuple[int, Tensor, Tensor]] = {}  # slot -> number of the image, features of both

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor without the weights, see `Network.config`."""
        return dict(self._arguments)

    @property
    def max_distance(self) -> float:
        """Upper end of the scale of distances: the larger one of the two members, see `Network.max_distance`."""
        limits = (self.patchcore.max_distance, self.padim.max_distance)
        return max(limit / float(scale) for limit, scale in zip(limits, self.scales, strict=True))

    def map_sizes(self, size: int | tuple[int, int]) -> list[tuple[int, int]]:
        """Return height and width of the distances of both members for images of ``size``, an int or (h, w).

        Raises:
            ValueError: If height or width is not a multiple of ``stride``.
        """
        height, width = self.check_size(size)
        fine, finest = self.encoder.strides[self.patchcore.levels[0] - 1], self.encoder.strides[0]
        return [(height // fine, width // fine), (self.small_size[0] // finest, self.small_size[1] // finest)]

    def fix_size(self, size: tuple[int, int]) -> "Ensemble":
        """Change nothing, because the encoder sees images of two sizes, see `Network.fix_size`.

        Args:
            size: Height and width of images in pixels.

        Returns:
            The network itself.
        """
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the feature vectors of both members.

        Args:
            images: Normalised images (N, 3, H, W).

        Returns:
            Vectors of PatchCore (N, d, h, w), and channels of PaDiM (N, features, h, w), both float32.
        """
        rows, columns = (
            _build_shrinking_matrix(length, small).to(images)
            for length, small in zip(images.shape[2:], self.small_size, strict=True)
        )
        small = rows @ images @ columns.mT
        if images.is_contiguous(memory_format=torch.channels_last):
            small = small.contiguous(memory_format=torch.channels_last)
        return self.patchcore.embed(self.encoder(images)), self.padim.embed(self.encoder(small))

    def plan_memory(self, count: int, size: int | tuple[int, int], available: int) -> None:
        """Check that `observe` and `fit` fit into the available memory.

        Args:
            count: Number of images that will be observed.
            size: Size of the images in pixels, an int or (h, w).
            available: Available memory in bytes.

        Raises:
            ValueError: If the features of the images do not fit.
        """
        height, width = self.map_sizes(size)[0]
        # The vectors in float16; in float32 their projections and two numbers for each.
        needed = count * height * width * (2 * self.patchcore.width + 4 * PROJECTION + 8) / MEMORY_SHARE
        if needed > available:
            raise ValueError(
                f"Ensemble: images: wanted features that fit into {available / 1e6:,.1f} MB of available memory, got "
                f"{needed / 1e6:,.1f} MB for {count} images: lower size, or choose architecture patchcore, which can "
                "select from a part of them"
            )

    @torch.no_grad()
    def observe(self, images: Tensor) -> None:
        """Collect the features of a batch of good images for `fit`.

        Args:
            images: Normalised images (N, 3, H, W), of one size in all calls.
        """
        self.check_images(images)
        large, small = self(images)
        self.patchcore.observe_features(large)
        self.padim.observe_features(small)
        for row in range(len(images)):  # a random sample of all images seen so far
            number, self._images = self._images, self._images + 1
            slot = _choose_slot(number)
            if slot < SAMPLE:
                self._sample[slot] = number, large[row].half(), small[row].clone()

    def resume(self, count: int) -> list[int]:
        """Go on from a fit, see `OnePassNetwork.resume`.

        The standard deviations need distances of a random sample of all images, former and new ones. Those of the
        former ones have changed, because bank and Gaussians have.

        Args:
            count: Number of images that the network was fitted to, at least 2.

        Returns:
            Positions of up to 32 of them, which are in the sample before new images come.

        Raises:
            ValueError: If the model is not fitted, or ``count`` is below 2.
        """
        self.padim.resume(count)
        numbers = {slot: number for number in range(count) if (slot := _choose_slot(number)) < SAMPLE}
        self._images, self._former, self._slots = count, count, sorted(numbers)
        return [numbers[slot] for slot in self._slots]

    @torch.no_grad()
    def observe_again(self, images: Tensor) -> None:
        """Take the images that `resume` named into the sample.

        Args:
            images: Normalised images (N, 3, H, W), in the order of `resume`; all of them, in one call or several.
        """
        large, small = self(images)
        for row in range(len(images)):
            slot = self._slots.pop(0)
            self._sample[slot] = slot, large[row].half(), small[row].clone()

    @torch.no_grad()
    def fit(self, share: float = 0.1, *, seed: int = 0) -> list[Tensor]:
        """Compute bank and Gaussians, and forget the observed features.

        After `resume`, a former image is left out of the bank together with all vectors that equal its own.

        Args:
            share: Share of the vectors in the bank, see `PatchCore.build_bank`.
            seed: Seed of the bank.

        Returns:
            Distances of up to 32 good images for PatchCore and for PaDiM, (K, h, w) each, float32, computed as if each
            image had not been observed.

        Raises:
            ValueError: If `PatchCore.build_bank` or `PaDiM.fit_gaussians` raises it.
        """
        sample = [self._sample[slot] for slot in sorted(self._sample)]
        former, kept = self._former, len(self.patchcore.bank)
        self._sample, self._images, self._former = {}, 0, 0
        selected = self.patchcore.build_bank(share, seed=seed)
        count = self.padim.fit_gaussians()
        points = sample[0][1][0].numel()
        bank, owners = self.patchcore.bank.float(), former + (selected - kept).div(points, rounding_mode="floor")
        large = []
        for number, vectors, _ in sample:
            own = vectors.float().flatten(1).T
            is_own = owners == number
            if number < former:  # the bank does not say which of its vectors were of this image
                is_own = torch.zeros_like(is_own)
                norms = torch.linalg.vector_norm(bank[:kept], dim=1)
                is_own[:kept] = find_nearest(bank[:kept], own)[0].flatten() <= SAME * norms
            others = bank[~is_own]
            nearest = find_nearest(own, others if len(others) else bank)[0]
            large.append(nearest.view(vectors.shape[1:]))
        small = self.padim.distances_of(torch.stack([features for _, _, features in sample]))[0][0]
        return [torch.stack(large), leave_one_out(small, count)]

    @torch.no_grad()
    def set_scales(self, maps: list[Tensor], distances: list[Tensor]) -> None:
        """Set the standard deviations from maps and distances of good images.

        Args:
            maps: Anomaly maps of PatchCore and of PaDiM alone, (K, H, W) each.
            distances: Distances that `fit` returned.

        Raises:
            ValueError: If all values are equal.
        """
        scales = torch.stack([to_float64(values).std(correction=0) for values in maps])
        maxima = [to_float64(values).amax(dim=(1, 2)) for values in distances]
        # One image has no deviation of its score: then that of the map, which has the same unit, takes its place.
        score_scales = torch.stack([
            values.std() if len(values) > 1 and values.std() > 0 else scale
            for values, scale in zip(maxima, scales, strict=True)
        ])  # fmt: skip
        floors = LEAST_DEVIATION * torch.stack([values.mean() for values in maxima])
        score_scales = torch.maximum(score_scales, floors)
        if not bool((scales > 0).all()):
            raise ValueError("Ensemble: wanted good images that differ, got images whose features are all equal")
        weights = torch.tensor(WEIGHTS).to(scales)
        self.scales.copy_((scales / weights).to(self.scales.dtype))
        self.score_scales.copy_((score_scales / weights).to(self.scales.dtype))

    def distances(
        self, images: Tensor, views: Views = "both", *, exportable: bool = False
    ) -> tuple[list[Tensor], Tensor]:
        """Compute the standardised distances of both members, and image scores, see `Network.distances`.

        Args:
            images: Normalised images (N, 3, H, W).
            views: Ignored; there is one encoder.
            exportable: Whether to use only operators of PyTorch, for ``torch.export``.

        Returns:
            distances: Standardised and weighted distances of PatchCore and of PaDiM, (N, h, w) each, float32.
            scores: Sum of the largest distances of both, treated likewise, (N,), float32.

        Raises:
            ValueError: If the network is not fitted.
        """
        if not len(self.patchcore.bank) or not len(self.padim.centres):
            raise ValueError("Ensemble: wanted a fitted model, got one without a bank")
        large, small = self(images)
        (first,), first_scores = self.patchcore.distances_of(large, exportable=exportable)
        (second,), second_scores = self.padim.distances_of(small, exportable=exportable)
        with disable_autocast(images, exportable):
            scores = first_scores / self.score_scales[0] + second_scores / self.score_scales[1]
            return [first / self.scales[0], second / self.scales[1]], scores


def _choose_slot(number: int) -> int:
    """Return the place of an image in a random sample of all images up to it; from `SAMPLE` on it is not in it."""
    if number < SAMPLE:
        return number
    return int(torch.randint(number + 1, (1,), generator=torch.Generator().manual_seed(number)))


def leave_one_out(distances: Tensor, count: int) -> Tensor:
    """Compute Mahalanobis distances of images as if they had not been among those that the Gaussians were fitted to.

    The mean and the scatter matrix without one image follow from those with it (Sherman and Morrison), so that no
    matrix is inverted again. The regularisation is taken to be part of the scatter.

    Args:
        distances: Mahalanobis distances of images that are among the fitted ones, of any shape.
        count: Number of images that the Gaussians were fitted to, at least 2.

    Returns:
        Distances in the shape of ``distances``; unchanged for fewer than 3 images.
    """
    if count < 3:
        return distances
    ratio = count / (count - 1)
    squared = distances.square() / (count - 1)
    return ((count - 2) * ratio**2 * squared / (1 - ratio * squared).clamp_min(1e-3)).sqrt()


def _build_shrinking_matrix(length: int, small: int) -> Tensor:
    """Build the matrix (small, length) of a linear interpolation that averages over what lies between, float32."""
    if small == length:
        return torch.eye(length)
    identity = torch.eye(length).view(1, 1, length, length)
    return F.interpolate(identity, size=(small, length), mode="bilinear", antialias=True)[0, 0]
