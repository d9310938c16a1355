"""Inference on images at their original scale: tiles go through the network, and their maps are blended into one.

Apart from the decoded image and its map, memory holds one batch of tiles and the next, whatever the image size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recontrast.data.image_files import ImageFiles, describe_image_error
from recontrast.data.images import read_image
from recontrast.data.listing import PathLike
from recontrast.data.sources import Images, SelectedImages
from recontrast.data.tiles import TileMasks, Tiles, tile_weights
from recontrast.data.window import pixel_dtype
from recontrast.inference.finite import is_finite
from recontrast.inference.infer import infer
from recontrast.inference.rois import Rois
from recontrast.models.network import Network
from recontrast.recipes.recipe import Recipe, to_pair
from recontrast.runtime.clock import Clock
from recontrast.runtime.device import trim_memory

BLOCK_PIXELS = 1 << 20  # pixels of a map that are copied at a time: little memory compared with a large map
CPU_BATCH_PIXELS = 1 << 17  # pixels of a batch of tiles on a CPU, 2 tiles of 256 px; larger batches are no faster
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
    rois = Rois(recipe) if rois is None and recipe.roi is not None else rois

    def score_file(index: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        pixels = files.read(index, bits=recipe.bits, window=recipe.window)
        inside = None
        if pixels is None:
            pixels = np.zeros((*recipe.out, 3), pixel_dtype(recipe.window))
            inside = np.ones(recipe.out, bool)
        elif rois is not None:
            try:
                inside = rois.read(index, pixels.shape[:2], str(files.paths[index]))
            except (OSError, ValueError) as error:
                files.errors[index] = describe_image_error(str(files.paths[index]), error)
                inside = np.ones(pixels.shape[:2], bool)
        trim_memory()  # returns the memory of decoding to the system
        anomaly, score = score_tiled_image(
            model, pixels, recipe, overlap=overlap, batch=batch, release=True, inside=inside
        )
        return anomaly[None], np.array([score], np.float32)

    for index in range(len(files)):
        yield score_file(index)  # a separate function, so that no image stays in memory while the next is read
        trim_memory()


def score_tiled_image(
    model: Network,
    pixels: NDArray[np.uint8],
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
        pixels: Image (H, W, 3), uint8. An image smaller than a tile is padded by reflection, see
            `recontrast.data.tiles`.
        recipe: Recipe with ``tile``, for map and precision.
        overlap: Pixels shared by neighbouring tiles; None for a quarter of the tile.
        batch: Number of tiles per batch; on a CPU at most as many as have `CPU_BATCH_PIXELS` pixels.
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
    height, width = pixels.shape[:2]
    (tops, rows), (lefts, columns) = (tile_weights(length, tile, overlap) for length in (height, width))
    windows = [(y, x, r, c) for y, r in zip(tops, rows, strict=True) for x, c in zip(lefts, columns, strict=True)]
    blended = np.zeros((height, width), np.float32)
    if next(model.parameters()).device.type == "cpu":
        batch = min(batch, max(CPU_BATCH_PIXELS // tile**2, 1))
    if inside is None and recipe.roi is not None:
        inside = Rois(recipe).read(0, (height, width), "the image")
    index, largest = 0, -math.inf
    tiles: Images = Tiles(pixels, tile, tile - overlap, release=release)
    rois = None
    if inside is not None:
        rois = TileMasks(inside, tile, tile - overlap)
        chosen = rois.list_inside()
        windows, tiles = [windows[position] for position in chosen], SelectedImages(tiles, chosen)
        rois = rois.select(chosen)
    for maps, scores in infer(model, tiles, recipe, batch=batch, clock=clock, rois=rois):
        largest = float(np.maximum(largest, scores.max().item()))  # NaN stays
        for anomaly in maps.cpu().numpy():
            y, x, row, column = windows[index]
            window = blended[y : y + tile, x : x + tile]  # smaller than a tile if the image is
            window += (anomaly * row[:, None] * column)[: window.shape[0], : window.shape[1]]
            index += 1
    if inside is not None:
        return blended, score_map(blended, recipe.score, inside)
    return blended, largest if recipe.score == "model" else score_map(blended, recipe.score)


def infer_files(
    paths: Sequence[PathLike],
    model: Network,
    recipe: Recipe,
    batch: int = 16,
    clock: Clock | None = None,
    unread: dict[int, str] | None = None,
    on_image: Callable[[Path, NDArray[np.uint8]], object] | None = None,
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
        on_image: Called with the path and the pixels (H, W, 3) of each image that can be read, before it is scored.
        rois: Regions of interest of the files; None: that of the recipe.

    Yields:
        Map (1, H, W) and score (1,), float32, on the CPU.

    Raises:
        ValueError: If the recipe has no tile, or an image cannot be decoded and ``unread`` is None.
        OSError: If an image file cannot be read and ``unread`` is None.
    """
    rois = Rois(recipe) if rois is None and recipe.roi is not None else rois

    def read(position: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
        try:
            pixels = read_image(paths[position], bits=recipe.bits, window=recipe.window)
            inside = None if rois is None else rois.read(position, pixels.shape[:2], str(paths[position]))
        except (OSError, ValueError) as error:
            if unread is None:
                raise
            unread[position] = describe_image_error(str(paths[position]), error)
            return np.zeros((*recipe.out, 3), pixel_dtype(recipe.window)), np.ones(recipe.out, bool)
        if on_image is not None:
            on_image(Path(paths[position]), pixels)
        return pixels, inside

    for position in range(len(paths)):
        pixels, inside = read(position)
        anomaly, score = score_tiled_image(model, pixels, recipe, batch=batch, clock=clock, inside=inside)
        del pixels
        yield torch.from_numpy(anomaly)[None], torch.tensor([score])


def score_map(anomaly: NDArray[np.float32], how: str | float, inside: NDArray[np.bool_] | None = None) -> float:
    """Compute the score of a whole map as `recontrast.AnomalyMap.score` does, without copying the map.

    Args:
        anomaly: Anomaly map (H, W), float32.
        how: "max", "mean", or a share of the pixels: the score is then the mean of that share of largest values.
        inside: Whether each pixel counts, (H, W) bool; None: all do. The pixels that count are copied.

    Returns:
        The score; NaN if a value of the map is NaN or infinite; 0 without pixels.
    """
    if inside is not None:
        anomaly = anomaly[inside][None]
    if not anomaly.size:
        return 0.0
    if not is_finite(anomaly):
        return math.nan
    if how == "max":
        return float(anomaly.max())
    if how == "mean":
        return float(anomaly.mean(dtype=np.float64))
    return _mean_of_largest(anomaly, max(math.floor(anomaly.size * float(how)), 1))


def _mean_of_largest(anomaly: NDArray[np.float32], count: int) -> float:
    """Compute the exact mean of the ``count`` largest values.

    The smallest of them is found by its bits: a first histogram gives its 16 high bits, a second its 16 low bits.
    """
    high, above = _find_bin(anomaly, count, lambda keys: keys >> 16)

    def low_bits(keys: NDArray[np.uint32]) -> NDArray[Any]:
        return keys[keys >> 16 == high] & 0xFFFF

    low, _ = _find_bin(anomaly, count - above, low_bits)
    smallest_key = np.uint32(high << 16 | low)
    total, larger_count, smallest = 0.0, 0, 0.0
    for values, keys in _iterate_blocks(anomaly):
        larger = values[keys > smallest_key]
        total, larger_count = total + float(larger.sum(dtype=np.float64)), larger_count + larger.size
        equal = values[keys == smallest_key]
        smallest = float(equal[0]) if equal.size else smallest
    return (total + (count - larger_count) * smallest) / count


def _find_bin(
    anomaly: NDArray[np.float32], count: int, bins_of: Callable[[NDArray[np.uint32]], NDArray[Any]]
) -> tuple[int, int]:
    """Return which of 65536 bins has the ``count``-th largest value, and the number of values in higher bins."""
    histogram = np.zeros(1 << 16, np.int64)
    for _, keys in _iterate_blocks(anomaly):
        histogram += np.bincount(bins_of(keys), minlength=1 << 16)
    cumulative = np.cumsum(histogram[::-1])
    index = int(np.searchsorted(cumulative, count))
    return (1 << 16) - 1 - index, int(cumulative[index - 1]) if index else 0


def _iterate_blocks(anomaly: NDArray[np.float32]) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint32]]]:
    """Yield the values block by block, with integer keys that sort like the values."""
    step = max(BLOCK_PIXELS // anomaly.shape[1], 1)
    for begin in range(0, len(anomaly), step):
        values = np.ascontiguousarray(anomaly[begin : begin + step]).ravel()
        bits = values.view(np.uint32)
        # Negative values, which rounding can produce, must sort below positive ones.
        yield values, np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
