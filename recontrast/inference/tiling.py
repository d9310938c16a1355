"""Inference on images at their original scale: tiles go through the network, and their maps are blended into one.

Apart from the decoded image and its map, memory holds one batch of tiles and the next, whatever the image size.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recontrast.data.image_files import ImageFiles
from recontrast.data.listing import PathLike
from recontrast.data.sources import Images
from recontrast.data.tiles import TileMasks
from recontrast.inference.blend import MapAndScore, blend_tiles, limit_batch, score_map
from recontrast.inference.infer import infer
from recontrast.inference.rois import Rois
from recontrast.inference.tiled_files import score_files, score_paths
from recontrast.models.network import Network
from recontrast.recipes.recipe import Recipe, to_pair
from recontrast.runtime.clock import Clock

__all__ = [
    "check_tiling", "infer_files", "infer_tiled", "resolve_overlap", "resolve_tiling", "score_map", "score_tiled_image",
]  # fmt: skip
OVERLAP_SHARE = 0.25  # default overlap of neighbouring tiles, as a share of the tile


def resolve_overlap(tile: int, overlap: int | None = None) -> int:
    """Return the overlap of neighbouring tiles.

    Args:
        tile: Side of a tile in pixels.
        overlap: Requested overlap in pixels; None for a quarter of the tile.

    Returns:
        Overlap in pixels.
    """
    return int(tile * OVERLAP_SHARE) if overlap is None else overlap


def check_tiling(model: Network, tile: int, overlap: int) -> None:
    """Raise an error if a model cannot process tiles of this size, or the overlap leaves no distance between tiles.

    Args:
        model: Model, for its stride.
        tile: Side of a tile in pixels.
        overlap: Pixels shared by neighbouring tiles.

    Raises:
        ValueError: If the tile is not a multiple of the stride, or the overlap is not in [0, tile).
    """
    if tile < model.stride or tile % model.stride:
        raise ValueError(
            f"tile: wanted at least {model.stride} px and a multiple of it (the network's stride), got {tile}"
        )
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap: wanted from 0 to {tile - 1} px (tiles of {tile} px), got {overlap}")


def resolve_tiling(
    model: Network, trained: Recipe, tile: int | None, overlap: int | None, path: str
) -> tuple[Recipe, int | None]:
    """Decide whether images are cut into tiles, and resolve the size and overlap of the tiles.

    Args:
        model: Model, for its stride.
        trained: Recipe of the training.
        tile: Side of a tile in pixels, 0 for whole images, None for the value used in training.
        overlap: Pixels shared by neighbouring tiles; None for a quarter of the tile.
        path: Path of the model, for error messages.

    Returns:
        Recipe with the resolved tile, and the overlap in pixels; an overlap of None stands for whole resized images.

    Raises:
        ValueError: If tiles are requested from a model of whole images or vice versa, or ``tile`` or ``overlap`` is
            invalid.
    """
    if trained.tile is None:
        if tile or overlap is not None:
            size = " x ".join(map(str, to_pair(trained.size)))
            raise ValueError(
                f"{path}: tile: wanted none for a detector that was trained on whole images resized to {size} px, got "
                f"{f'{tile} px' if tile else f'an overlap of {overlap} px'}: train one with --tile"
            )
        return trained, None
    if tile == 0:
        raise ValueError(
            f"{path}: tile: wanted tiles for a detector that was trained on them ({trained.tile} px, at the images' "
            "own scale), got 0, for whole resized images"
        )
    side = trained.tile if tile is None else tile
    overlap = resolve_overlap(side, overlap)
    check_tiling(model, side, overlap)
    recipe = trained if side == trained.tile else trained.replace(tile=side, stride=None)
    return recipe, overlap


def infer_tiled(
    model: Network, files: ImageFiles, recipe: Recipe, overlap: int, batch: int, rois: Rois | None = None
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Compute maps and scores of image files at their original scale, one file at a time.

    Args:
        model: Model on any device.
        files: Image files. A black tile takes the place of a file that cannot be read.
        recipe: Recipe with ``tile``, for map, score and precision.
        overlap: Pixels shared by neighbouring tiles.
        batch: Number of tiles per batch.
        rois: Regions of interest of the files; None: that of the recipe.

    Yields:
        Map (1, H, W) and score (1,), float32.
    """

    def score_image(pixels: NDArray[Any], inside: NDArray[np.bool_] | None) -> MapAndScore:
        return score_tiled_image(model, pixels, recipe, overlap=overlap, batch=batch, release=True, inside=inside)

    yield from score_files(score_image, files, recipe, rois)


def score_tiled_image(
    model: Network,
    pixels: NDArray[Any],
    recipe: Recipe,
    *,
    overlap: int | None = None,
    batch: int = 16,
    clock: Clock | None = None,
    release: bool = False,
    inside: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.float32], float]:
    """Compute the anomaly map and the score of an image at its original scale.

    Args:
        model: Model on any device.
        pixels: Image (H, W, 3), uint8, or float32 in [0, 1] with a window. An image smaller than a tile is padded by
            reflection, see `recontrast.data.tiles`.
        recipe: Recipe with ``tile``, for map and precision.
        overlap: Pixels shared by neighbouring tiles; None for a quarter of the tile.
        batch: Number of tiles per batch; fewer on a CPU, see `recontrast.inference.blend.limit_batch`.
        clock: Clock that measures loading, forward pass and maps.
        release: Whether to release the memory of ``pixels`` while the map grows. Their content is lost.
        inside: Region of interest, whether each pixel is inside, (H, W) bool; tiles wholly outside are not computed.
            None: that of the recipe.

    Returns:
        The anomaly map (H, W), float32, in the units of the map of a tile, and the score. With the score "model" it is
        the largest score of a tile.

    Raises:
        ValueError: If the recipe has no tile, tile or overlap is invalid, or the region of the recipe has another
            aspect ratio than the image.
    """
    if recipe.tile is None:
        raise ValueError("tiled: wanted a recipe with a tile, got one of whole resized images")
    tile, overlap = recipe.tile, resolve_overlap(recipe.tile, overlap)
    check_tiling(model, tile, overlap)
    if next(model.parameters()).device.type == "cpu":
        batch = limit_batch(batch, tile)
    if inside is None and recipe.roi is not None:
        inside = Rois(recipe).read(0, pixels.shape[:2], "the image")

    recipe = recipe.of_single_images

    def score_tiles(
        tiles: Images, masks: TileMasks | None
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        for maps, scores in infer(model, tiles, recipe, batch=batch, clock=clock, rois=masks):
            yield maps.cpu().numpy(), scores.cpu().numpy()

    return blend_tiles(score_tiles, pixels, recipe, overlap, inside=inside, release=release)


def infer_files(
    paths: Sequence[PathLike],
    model: Network,
    recipe: Recipe,
    batch: int = 16,
    clock: Clock | None = None,
    unread: dict[int, str] | None = None,
    on_image: Callable[[Path, NDArray[Any]], object] | None = None,
    rois: Rois | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute maps and scores of image files at their original scale, like `recontrast.inference.infer.infer`.

    Args:
        paths: Image files.
        model: Model on any device.
        recipe: Recipe with ``tile``, for map, score and precision.
        batch: Number of tiles per batch.
        clock: Clock that measures loading, forward pass and maps.
        unread: Receives one sentence for each image that cannot be read, by position; a black tile takes its place.
            None raises the error instead.
        on_image: Called with the path and the pixels of each image that can be read, see
            `recontrast.inference.tiled_files.score_paths`.
        rois: Regions of interest of the files; None: that of the recipe.

    Yields:
        Map (1, H, W) and score (1,), float32, on the CPU.

    Raises:
        ValueError: If the recipe has no tile, or an image cannot be decoded and ``unread`` is None.
        OSError: If an image file cannot be read and ``unread`` is None.
    """

    def score_image(pixels: NDArray[Any], inside: NDArray[np.bool_] | None) -> MapAndScore:
        return score_tiled_image(model, pixels, recipe, batch=batch, clock=clock, inside=inside)

    for maps, scores in score_paths(score_image, paths, recipe, unread=unread, on_image=on_image, rois=rois):
        yield torch.from_numpy(maps), torch.from_numpy(scores)
