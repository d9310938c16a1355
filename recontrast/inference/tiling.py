"""Images at their own scale: the network sees tiles, their maps are blended, the score is that of the whole map.

Beyond the decoded image and its map there is one batch of tiles, and the next, in memory, however large the image is.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recontrast.data.image_files import ImageFiles
from recontrast.data.images import read_image
from recontrast.data.listing import PathLike
from recontrast.data.tiles import Tiles, tile_weights
from recontrast.inference.infer import infer
from recontrast.models.fold import FoldedModel
from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe, to_pair
from recontrast.runtime.clock import Clock
from recontrast.runtime.device import trim_memory

BLOCK_PIXELS = 1 << 20  # pixels at once where a whole map is read: small beside any map that is large
CPU_BATCH_PIXELS = 1 << 17  # pixels of a batch of tiles on a CPU, which is no quicker with more: 2 tiles of 256 px
OVERLAP_SHARE = 0.25  # of a tile that neighbours share, where nothing else is asked for


def resolve_overlap(tile: int, overlap: int | None = None) -> int:
    """Pixels that neighbouring tiles share: as asked for, or a quarter of the tile."""
    return int(tile * OVERLAP_SHARE) if overlap is None else overlap


def check_tiling(model: ReContrast | FoldedModel, tile: int, overlap: int) -> None:
    """Refuse tiles that the network cannot see or that do not cover an image."""
    if tile < model.stride or tile % model.stride:
        raise ValueError(
            f"tile: wanted at least {model.stride} px and a multiple of it (the network's stride), got {tile}"
        )
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap: wanted from 0 to {tile - 1} px (tiles of {tile} px), got {overlap}")


def resolve_tiling(
    model: ReContrast | FoldedModel, trained: Recipe, tile: int | None, overlap: int | None, path: str
) -> tuple[Recipe, int | None]:
    """How images are to be seen: a recipe with its tile, and the overlap; no overlap: whole and resized.

    Args:
        model: for its stride.
        trained: recipe of the model's training.
        tile: pixels, 0 for whole images, None for what the model was trained on.
        overlap: pixels, None for a quarter of the tile.
        path: names the model in errors.

    Raises:
        ValueError: the model was trained at the other scale, or tile or overlap do not do.
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
    check_tiling(model, side, resolve_overlap(side, overlap))
    return (trained if side == trained.tile else trained.replace(tile=side, stride=None)), resolve_overlap(
        side, overlap
    )


def infer_tiled(
    model: ReContrast | FoldedModel, files: ImageFiles, recipe: Recipe, overlap: int, batch: int
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Map (1, H, W) and score (1,) of each of ``files``, read one by one; of a black tile for what cannot be read."""

    def one(place: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        pixels = files.read(place)
        if pixels is None:
            pixels = np.zeros((*recipe.out, 3), np.uint8)
        trim_memory()  # what decoding took
        anomaly = compute_tiled_map(model, pixels, recipe, overlap=overlap, batch=batch, spend=True)
        return anomaly[None], np.array([score_map(anomaly, recipe.score)], np.float32)

    for place in range(len(files)):
        yield one(place)  # nothing of an image is held while the next is read
        trim_memory()


def compute_tiled_map(
    model: ReContrast | FoldedModel,
    pixels: NDArray[np.uint8],
    recipe: Recipe,
    *,
    overlap: int | None = None,
    batch: int = 16,
    clock: Clock | None = None,
    spend: bool = False,
) -> NDArray[np.float32]:
    """Anomaly map of an image at its own scale.

    Args:
        model: on any device.
        pixels: (H, W, 3) uint8; smaller than a tile, it is mirrored up to one, see `recontrast.data.tiles`.
        recipe: with ``tile``; for map and precision.
        overlap: pixels that neighbouring tiles share; None: a quarter of the tile.
        batch: tiles at once; on a CPU at most so many as have `CPU_BATCH_PIXELS` pixels.
        clock: told what takes the time.
        spend: ``pixels`` are lost, those of a large file given back as the map grows.

    Returns:
        (H, W), values as those of a tile's map.

    Raises:
        ValueError: the recipe has no tile, or tile or overlap do not do.
    """
    if recipe.tile is None:
        raise ValueError("tiled: wanted a recipe with a tile, got one of whole resized images")
    tile, overlap = recipe.tile, resolve_overlap(recipe.tile, overlap)
    check_tiling(model, tile, overlap)
    height, width = pixels.shape[:2]
    (tops, rows), (lefts, columns) = (tile_weights(length, tile, overlap) for length in (height, width))
    windows = [(y, x, r, c) for y, r in zip(tops, rows, strict=True) for x, c in zip(lefts, columns, strict=True)]
    found = np.zeros((height, width), np.float32)
    if next(model.parameters()).device.type == "cpu":
        batch = min(batch, max(CPU_BATCH_PIXELS // tile**2, 1))
    place = 0
    tiles = Tiles(pixels, tile, tile - overlap, release=spend)
    for maps, _ in infer(model, tiles, recipe, batch=batch, clock=clock):
        for anomaly in maps.cpu().numpy():
            y, x, row, column = windows[place]
            part = found[y : y + tile, x : x + tile]  # of an image smaller than a tile: less than a tile
            part += (anomaly * row[:, None] * column)[: part.shape[0], : part.shape[1]]
            place += 1
    return found


def infer_files(
    paths: Sequence[PathLike],
    model: ReContrast | FoldedModel,
    recipe: Recipe,
    batch: int = 16,
    clock: Clock | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Maps and scores of image files at their own scale, one after the other, as `recontrast.inference.infer.infer`.

    Yields:
        Map (1, H, W) and score (1,), float32, on the CPU.
    """
    for path in paths:
        anomaly = compute_tiled_map(model, read_image(path), recipe, batch=batch, clock=clock)
        yield torch.from_numpy(anomaly)[None], torch.tensor([score_map(anomaly, recipe.score)])


def score_map(anomaly: NDArray[np.float32], how: str | float) -> float:
    """Score of a whole map by the rule of `recontrast.AnomalyMap.score`, without a copy of it.

    Args:
        anomaly: (H, W) float32.
        how: "max", "mean", or the share of the pixels with the largest values whose mean is taken.
    """
    if how == "max":
        return float(anomaly.max())
    if how == "mean":
        return float(anomaly.mean(dtype=np.float64))
    wanted = max(math.floor(anomaly.size * float(how)), 1)
    return _mean_of_largest(anomaly, wanted)


def _mean_of_largest(anomaly: NDArray[np.float32], wanted: int) -> float:
    """Exact mean of the ``wanted`` largest values: the smallest of them by two histograms of 16 bits each."""
    high, above = _place(anomaly, wanted, lambda keys: keys >> 16)
    inside = wanted - above

    def low(keys: NDArray[np.uint32]) -> NDArray[np.uint32]:
        return keys[keys >> 16 == high] & 0xFFFF

    last, _ = _place(anomaly, inside, low)
    key = np.uint32(high << 16 | last)
    total, counted, least = 0.0, 0, 0.0
    for values, keys in _pieces(anomaly):
        larger = values[keys > key]
        total, counted = total + float(larger.sum(dtype=np.float64)), counted + larger.size
        equal = values[keys == key]
        least = float(equal[0]) if equal.size else least
    return (total + (wanted - counted) * least) / wanted


def _place(anomaly: NDArray[np.float32], wanted: int, of: Any) -> tuple[int, int]:
    """The bin, of 65536, that holds the ``wanted``-th largest value, and how many are in those above it."""
    counts = np.zeros(1 << 16, np.int64)
    for _, keys in _pieces(anomaly):
        counts += np.bincount(of(keys), minlength=1 << 16)
    reached = np.cumsum(counts[::-1])
    place = int(np.searchsorted(reached, wanted))
    return (1 << 16) - 1 - place, int(reached[place - 1]) if place else 0


def _pieces(anomaly: NDArray[np.float32]) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint32]]]:
    """Values piece by piece, and whole numbers in the same order as they."""
    step = max(BLOCK_PIXELS // anomaly.shape[1], 1)
    for begin in range(0, len(anomaly), step):
        values = np.ascontiguousarray(anomaly[begin : begin + step]).ravel()
        bits = values.view(np.uint32)
        yield values, np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))  # what rounding made negative comes first
