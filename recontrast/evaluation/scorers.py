"""What an evaluation needs of a detector: a network in PyTorch, or the program in an exported file."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recontrast.data.sources import Images
from recontrast.inference import tiling
from recontrast.inference.blend import MapAndScore
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.inference.finite import is_finite
from recontrast.inference.infer import infer, max_map_value
from recontrast.inference.load_ahead import compute_batches
from recontrast.inference.rois import Rois
from recontrast.inference.tiled_files import score_paths
from recontrast.models.network import Network
from recontrast.recipes.recipe import Recipe, to_pair
from recontrast.runtime.clock import Clock
from recontrast.runtime.device import move_model, resolve_device

MapsAndScores = Iterator[tuple[Tensor, Tensor]]  # maps (N, H, W) and scores (N,), float32, batch after batch
OnImage = Callable[[Path, NDArray[np.uint8]], None]


class Scorer(Protocol):
    """Interface of what computes maps and scores in an evaluation.

    Attributes:
        device: Device of the maps and scores.
        max_value: Upper end of the scale of maps.
        is_bounded: Whether no map value exceeds ``max_value``.
    """

    device: torch.device
    max_value: float
    is_bounded: bool

    def score_images(self, images: Images, batch: int, clock: Clock, rois: Rois | None = None) -> MapsAndScores:
        """Compute maps and scores of images that were resized and cropped.

        Args:
            images: Images at ``recipe.out``, (N, H, W, 3) uint8.
            batch: Number of images per batch.
            clock: Clock that measures the parts.
            rois: Regions of interest of the images; the graph of an exported file has its own, unless it is one of
                tiles.

        Returns:
            Maps and scores, batch after batch.
        """

    def score_files(
        self, paths: Sequence[Path], batch: int, clock: Clock, unread: dict[int, str] | None, on_image: OnImage,
        rois: Rois | None = None,
    ) -> MapsAndScores:  # fmt: skip
        """Compute maps and scores of image files at their original scale, from tiles.

        Args:
            paths: Image files.
            batch: Number of tiles per batch.
            clock: Clock that measures the parts.
            unread: Receives one sentence for each image that cannot be read, by position; None raises the error.
            on_image: Called with the path and the pixels of each image that was read, see
                `recontrast.inference.tiled_files.score_paths`.
            rois: Regions of interest of the files.

        Returns:
            Maps and scores, image after image.
        """


class NetworkScorer:
    """A network with the recipe of its maps and scores; see `Scorer` for the attributes.

    Args:
        network: Network, moved to ``device``.
        recipe: Recipe.
        device: Device; None leaves the network where it is.

    Raises:
        ValueError: If the image size is not a multiple of the network's stride.
    """

    def __init__(self, network: Network, recipe: Recipe, device: str | torch.device | None) -> None:
        network.map_sizes(recipe.out)  # raises an error if the size is not a multiple of the stride
        if device is not None:
            move_model(network, resolve_device(device), recipe.channels_last)
        self.network, self.recipe = network, recipe
        self.device = next(network.parameters()).device
        self.max_value, self.is_bounded = max_map_value(network, recipe), network.has_bounded_distances

    def score_images(self, images: Images, batch: int, clock: Clock, rois: Rois | None = None) -> MapsAndScores:
        """Compute maps and scores of images (N, H, W, 3) uint8, see `Scorer`."""
        return infer(self.network, images, self.recipe, batch=batch, clock=clock, rois=rois)

    def score_files(
        self, paths: Sequence[Path], batch: int, clock: Clock, unread: dict[int, str] | None, on_image: OnImage,
        rois: Rois | None = None,
    ) -> MapsAndScores:  # fmt: skip
        """Compute maps and scores of image files from tiles, see `Scorer`."""
        return tiling.infer_files(paths, self.network, self.recipe, batch, clock, unread, on_image, rois)


class ExportedScorer:
    """The program in an exported file; see `Scorer` for the attributes.

    Args:
        detector: Detector in the file.
    """

    def __init__(self, detector: ExportedDetector) -> None:
        self.detector, self.device = detector, torch.device("cpu")
        self.max_value, self.is_bounded = detector.max_map_value, False  # the file does not say whether it is

    def score_images(self, images: Images, batch: int, clock: Clock, rois: Rois | None = None) -> MapsAndScores:
        """Compute maps and scores of images (N, H, W, 3) uint8, see `Scorer`.

        The resize in the graph does not change an image that has the size after resizing. A cropped image is therefore
        put back into a black image of this size, from which the graph crops it again.
        """
        recipe = self.detector.recipe
        views = max(len(recipe.view_names), 1)
        batch = max(batch // views, 1) * views  # all views of a part
        size, (height, width) = to_pair(recipe.size), recipe.out
        top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)

        def load(start: int) -> NDArray[np.uint8]:
            cropped = images[np.arange(start, min(start + batch, len(images)))]
            pixels = np.zeros((len(cropped), *size, 3), cropped.dtype)
            pixels[:, top : top + height, left : left + width] = cropped
            return pixels

        def score(pixels: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
            clock.mark("loading")
            maps, scores = self.detector.score_parts(pixels)
            scores = np.where([is_finite(anomaly) for anomaly in maps], scores, np.float32(np.nan))
            clock.mark("forward")
            return torch.from_numpy(maps), torch.from_numpy(scores)

        return compute_batches(load, score, len(images), batch)

    def score_files(
        self, paths: Sequence[Path], batch: int, clock: Clock, unread: dict[int, str] | None, on_image: OnImage,
        rois: Rois | None = None,
    ) -> MapsAndScores:  # fmt: skip
        """Compute maps and scores of image files from tiles, see `Scorer`."""

        def score_image(pixels: NDArray[Any], inside: NDArray[np.bool_] | None) -> MapAndScore:
            clock.mark("loading")
            result = self.detector.score_tiled(pixels, batch, release=False, inside=inside)
            clock.mark("forward")
            return result

        for maps, scores in score_paths(
            score_image, paths, self.detector.recipe, unread=unread, on_image=on_image, rois=rois
        ):
            yield torch.from_numpy(maps), torch.from_numpy(scores)


def build_scorer(model: Network | ExportedDetector, recipe: Recipe, device: str | torch.device | None) -> Scorer:
    """Return the scorer of a network or of an exported file.

    Args:
        model: Network, or detector in an exported file.
        recipe: Recipe of the maps and scores.
        device: Device to move a network to; None leaves it where it is. Exported files run where they were opened.

    Returns:
        The scorer.

    Raises:
        ValueError: If the image size is not a multiple of the network's stride.
    """
    if isinstance(model, ExportedDetector):
        return ExportedScorer(model)
    return NetworkScorer(model, recipe, device)
