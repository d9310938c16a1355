"""Audit of training images: how little each one looks like the others, to find defects among the good images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from recontrast.data.dataset_sample import Sample
from recontrast.data.groups import group_samples
from recontrast.data.image_files import IMAGE_ERRORS, ImageFiles
from recontrast.data.images import image_size, normalise
from recontrast.data.window import Window
from recontrast.models.patchcore import PatchCore
from recontrast.runtime.memory import measure_available_memory

MAX_POINTS = 400  # points of an image; larger feature maps are averaged
MAX_OTHERS = 256  # images that each image is compared with
SEED = 111  # of the draw of these
MIN_IMAGES = 3  # that are no copies of each other
STANDS_OUT = 3.5  # modified z-score; Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993
_TO_DEVIATIONS = 1.4826  # a median absolute deviation in standard deviations of a normal distribution


@dataclass(frozen=True)
class AuditedImage:
    """One training image and how little it looks like the others of its category.

    Attributes:
        sample: The image.
        score: Largest distance of one of its points to the nearest point of another image.
        z_score: Modified z-score: distance of the score from the median of the category, in robust standard deviations
            (by the median absolute deviation). Above `STANDS_OUT`, the image stands out.
        distances: Distance of each point, (h, w), float32.
        bits: Bits with which the image was read.
        window: Window with which the image was read.
    """

    sample: Sample
    score: float
    z_score: float
    distances: NDArray[np.float32]
    bits: int | None = None
    window: Window = None

    @property
    def stands_out(self) -> bool:
        """Whether the image looks less like the others than chance explains for a normal distribution of scores."""
        return self.z_score > STANDS_OUT


def audit_images(
    samples: Sequence[Sample], network: PatchCore, *, size: int = 256, bits: int | None = None, window: Window = None,
    batch: int = 8, seed: int = SEED, device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[AuditedImage], dict[Path, str]]:  # fmt: skip
    """Rank the good training images of one category, those that look least like the others first.

    Each image is compared with the others only, so that none is judged by a model that knows it; copies of an image and
    images of its group are left out with it. If there are more than `MAX_OTHERS` others, some are drawn. Features are
    those of PatchCore (Roth et al., CVPR 2022), averaged to at most `MAX_POINTS` points.

    Args:
        samples: Samples of a category; training images without a defect are taken.
        network: Network whose features are compared; it need not be fitted.
        size: Side of the resized images, in pixels.
        bits: Bits that the camera uses of 16-bit samples, as in `recontrast.data.images.read_image`.
        window: Values that become 0 and 1, as in `recontrast.data.images.read_image`.
        batch: Images per pass of the network.
        seed: Seed of the draw of other images.
        device: Device of the computation.
        on_progress: Called with the number of images done and of all steps: each image is read, then compared.

    Returns:
        The images, the highest score first, and an error message for each file that cannot be read, by path.

    Raises:
        ValueError: If fewer than `MIN_IMAGES` images can be read that are no copies of each other, or their features do
            not fit into memory.
    """
    good = select_good(samples)
    files = ImageFiles([sample.path for sample in good])
    report = on_progress or (lambda done, total: None)
    network = network.to(device).eval()
    by_path = {str(sample.path): sample for sample in good}
    read: list[Sample] = []
    features: list[Tensor] = []
    for start in range(0, len(files), batch):
        pixels = {
            i: files.read(i, size, bits=bits, window=window) for i in range(start, min(start + batch, len(files)))
        }
        kept = [(i, image) for i, image in pixels.items() if image is not None]
        if kept:
            features += embed_images(network, np.stack([image for _, image in kept]), device)
            if not read:
                _check_memory(features[0], len(files))
            read += [by_path[str(files.paths[i])] for i, _ in kept]
        report(min(start + batch, len(files)), 2 * len(files))
    errors = {files.paths[position]: text for position, text in sorted(files.errors.items())}
    groups = _check_count(read, next(iter(errors.values()), None))
    shape = features[0].shape[:2]
    bank = torch.stack([one.flatten(0, 1) for one in features])
    others = choose_others(groups, np.random.default_rng([seed, len(read)]))
    nearest = measure_distances(bank, others, lambda done: report(len(files) + done, len(files) + len(read)))
    distances = nearest.reshape(-1, *shape).cpu().numpy()
    scores = np.array([float(one.max()) for one in distances])
    z_scores = measure_z_scores(scores)
    order = np.argsort(-scores, kind="stable")
    return [
        AuditedImage(read[i], scores[i].item(), z_scores[i].item(), distances[i], bits, window) for i in order
    ], errors


def select_good(samples: Sequence[Sample]) -> list[Sample]:
    """Return the training images without a defect, which `audit_images` takes."""
    return [sample for sample in samples if sample.split == "train" and sample.label == 0]


def list_readable(samples: Sequence[Sample]) -> list[Path]:
    """Return the good training images whose files can be opened; `audit_images` names the others."""

    def can_be_opened(path: Path) -> bool:
        try:
            image_size(path)
        except IMAGE_ERRORS:
            return False
        return True

    return [sample.path for sample in select_good(samples) if can_be_opened(sample.path)]


def check_samples(category: str, samples: Sequence[Sample]) -> None:
    """Raise ValueError if a category has too few different good images for `audit_images`."""
    try:
        _check_count(select_good(samples))
    except ValueError as error:
        raise ValueError(f"{category}: {error}") from None


def _check_count(good: Sequence[Sample], error: str | None = None) -> NDArray[np.int64]:
    """Return the group of each image; raise ValueError if there are too few groups, with the first error of reading."""
    groups = np.array(group_samples(good) if good else [], np.int64)
    if (count := len(set(groups.tolist()))) < MIN_IMAGES:
        reason = "" if error is None else f" that can be read: {error}"
        raise ValueError(f"audit: wanted at least {MIN_IMAGES} different good training images, got {count}{reason}")
    return groups


def measure_distances(
    features: Tensor, others: NDArray[np.bool_], on_progress: Callable[[int], None] = lambda done: None
) -> Tensor:
    """Measure the distance of each point of each image to the nearest point of other images, exactly.

    Args:
        features: Features (n, P, d), float32.
        others: Whether an image (row) is compared with another one (column), (n, n), bool.
        on_progress: Called with the number of images done.

    Returns:
        Distances (n, P), float32.
    """
    squares = features.square().sum(2)
    nearest = torch.full_like(squares, torch.inf)
    for index in range(len(features)):
        # The product of two images serves both; those of 32 images at a time stay below 32 x 400 x 400 x 4 bytes.
        pairs = np.flatnonzero(others[index, index:] | others[index:, index]) + index
        for start in range(0, len(pairs), 32):
            part = torch.from_numpy(pairs[start : start + 32]).to(features.device)
            products = features[index] @ features[part].flatten(0, 1).T
            gaps = (products.mul_(-2) + squares[part].flatten()).view(len(squares[index]), len(part), -1)
            gaps += squares[index][:, None, None]
            rows, columns = gaps.amin(2), gaps.amin(0)  # (P, images), (images, P)
            forward = torch.from_numpy(others[index, part.cpu().numpy()]).to(features.device)
            backward = torch.from_numpy(others[part.cpu().numpy(), index]).to(features.device)
            if forward.any():
                nearest[index] = torch.minimum(nearest[index], rows[:, forward].amin(1))
            nearest[part[backward]] = torch.minimum(nearest[part[backward]], columns[backward])
        on_progress(index + 1)
    return nearest.clamp_min(0).sqrt()


def choose_others(groups: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.bool_]:
    """Choose with which images each one is compared: those of other groups, at most `MAX_OTHERS`, drawn at random.

    Args:
        groups: Group of each image, (n,).
        generator: Generator of the draw.

    Returns:
        Whether an image (row) is compared with another one (column), (n, n), bool.
    """
    chosen = groups[:, None] != groups
    for row in chosen:
        different = np.flatnonzero(row)
        if len(different) > MAX_OTHERS:
            row[:] = False
            row[generator.choice(different, MAX_OTHERS, replace=False)] = True
    return chosen


def measure_z_scores(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Measure modified z-scores: distances from the median in robust standard deviations.

    Args:
        scores: Scores (n,).

    Returns:
        Modified z-scores (n,); 0 for all if more than half of the scores are equal.
    """
    gaps = scores - np.median(scores)
    spread = _TO_DEVIATIONS * float(np.median(np.abs(gaps)))
    return gaps / spread if spread > 0 else np.zeros_like(gaps)


@torch.no_grad()
def embed_images(network: PatchCore, images: NDArray[np.uint8], device: torch.device | str) -> list[Tensor]:
    """Compute features of images, averaged to at most `MAX_POINTS` points.

    Args:
        network: Network whose features are computed.
        images: Images (N, H, W, 3), uint8, or float32 in [0, 1].
        device: Device of the network.

    Returns:
        Features of each image, (h, w, d), float32.
    """
    vectors = network(normalise(torch.from_numpy(images).to(device), network.mean, network.std))
    height, width = vectors.shape[-2:]
    factor = 1
    while -(-height // factor) * -(-width // factor) > MAX_POINTS:
        factor += 1
    if factor > 1:
        vectors = F.avg_pool2d(vectors, factor, ceil_mode=True, count_include_pad=False)
    return list(vectors.permute(0, 2, 3, 1).contiguous())


def _check_memory(features: Tensor, count: int) -> None:
    """Raise ValueError if the features of all images do not fit into memory twice: one by one, and as one tensor."""
    available, needed = measure_available_memory(features.device), 2 * count * features.nbytes + count**2
    if available is not None and needed > available:
        raise ValueError(
            f"audit: wanted {needed / 1e9:.1f} GB of memory for the features of {count} images, got "
            f"{available / 1e9:.1f} GB: take a smaller --size, or fewer images"
        )
