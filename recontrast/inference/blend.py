"""Scores of images at their original scale from the maps of their tiles, whatever computes these; without PyTorch."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data.sources import Images, SelectedImages
from recontrast.data.tiles import TileMasks, Tiles, tile_weights
from recontrast.inference.finite import is_finite
from recontrast.recipes.recipe import Recipe

BLOCK_PIXELS = 1 << 20  # pixels of a map that are copied at a time: little memory compared with a large map
CPU_BATCH_PIXELS = 1 << 17  # pixels of a batch of tiles on a CPU, 2 tiles of 256 px; larger batches are no faster

MapAndScore = tuple[NDArray[np.float32], float]
# Tiles, and their masks or None -> maps (n, tile, tile) and scores (n,), float32, batch after batch.
ScoreTiles = Callable[[Images, TileMasks | None], Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]]


def limit_batch(batch: int, tile: int) -> int:
    """Return the number of tiles in a batch on a CPU.

    Args:
        batch: Number that was asked for.
        tile: Side of a tile in pixels.

    Returns:
        At most as many as have `CPU_BATCH_PIXELS` pixels; at least 1.
    """
    return min(batch, max(CPU_BATCH_PIXELS // tile**2, 1))


def blend_tiles(
    score_tiles: ScoreTiles,
    pixels: NDArray[Any],
    recipe: Recipe,
    overlap: int,
    *,
    inside: NDArray[np.bool_] | None = None,
    release: bool = False,
) -> MapAndScore:
    """Cut an image into tiles, and blend their maps into one.

    Args:
        score_tiles: Function that computes the maps and scores of tiles.
        pixels: Image (H, W, 3), uint8, or float32 in [0, 1] with a window. An image smaller than a tile is padded by
            reflection, see `recontrast.data.tiles`.
        recipe: Recipe with ``tile`` and ``score``.
        overlap: Pixels shared by neighbouring tiles.
        inside: Region of interest, whether each pixel is inside, (H, W) bool; tiles wholly outside are not computed.
            None: the whole image.
        release: Whether to release the memory of ``pixels`` while the map grows. Their content is lost.

    Returns:
        The anomaly map (H, W), float32, in the units of the map of a tile, and the score. With the score "model" it is
        the largest score of a tile.

    Raises:
        ValueError: If the recipe has no tile, or the overlap is not in [0, tile).
    """
    if (tile := recipe.tile) is None:
        raise ValueError("tiled: wanted a recipe with a tile, got one of whole resized images")
    height, width = pixels.shape[:2]
    (tops, rows), (lefts, columns) = (tile_weights(length, tile, overlap) for length in (height, width))
    windows = [(y, x, r, c) for y, r in zip(tops, rows, strict=True) for x, c in zip(lefts, columns, strict=True)]
    blended = np.zeros((height, width), np.float32)
    index, largest = 0, -math.inf
    tiles: Images = Tiles(pixels, tile, tile - overlap, release=release)
    masks = None
    if inside is not None:
        masks = TileMasks(inside, tile, tile - overlap)
        chosen = masks.list_inside()
        windows, tiles = [windows[position] for position in chosen], SelectedImages(tiles, chosen)
        masks = masks.select(chosen)
    for maps, scores in score_tiles(tiles, masks):
        largest = float(np.maximum(largest, scores.max().item()))  # NaN stays
        for anomaly in maps:
            y, x, row, column = windows[index]
            window = blended[y : y + tile, x : x + tile]  # smaller than a tile if the image is
            window += (anomaly * row[:, None] * column)[: window.shape[0], : window.shape[1]]
            index += 1
    if inside is not None:
        return blended, score_map(blended, recipe.score, inside)
    return blended, largest if recipe.score == "model" else score_map(blended, recipe.score)


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
