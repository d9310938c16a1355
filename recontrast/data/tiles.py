"""Square tiles of an image at its original scale: their positions, their pixels and their blending weights.

Along an axis, a tile begins every ``stride`` pixels. The last tile is shifted inwards, so that it ends at the border of
the image. An image smaller than a tile is extended to the tile size by mirroring its right and lower border
(a b c d | d c b a).
"""

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data.memory import release_rows


def tile_starts(length: int, tile: int, stride: int) -> list[int]:
    """Compute the first pixel of each tile along an axis.

    Args:
        length: Length of the axis, in pixels.
        tile: Side of a tile, in pixels.
        stride: Distance from one tile to the next, in pixels; at most ``tile``, so that tiles leave no gap.

    Returns:
        The first pixels in ascending order; at least one.

    Raises:
        ValueError: If ``tile`` or ``stride`` is out of range.
    """
    if tile < 1 or not 1 <= stride <= tile:
        raise ValueError(f"tiles: wanted a tile of at least 1 px and a stride from 1 px to it, got {tile} and {stride}")
    return [*range(0, length - tile, stride), max(length - tile, 0)]


def tile_weights(length: int, tile: int, overlap: int) -> tuple[list[int], NDArray[np.float32]]:
    """Compute blending weights along an axis; at each pixel, the weights of all tiles add up to 1.

    The window of a tile rises as a squared sine over ``overlap`` pixels and falls likewise. Near its border a network
    sees less context, so those pixels count least. The windows are divided by their sum, also at the border of the
    image. The weight of a pixel in two dimensions is the product of both axes.

    Args:
        length: Length of the axis, in pixels.
        tile: Side of a tile, in pixels.
        overlap: Pixels shared by neighbouring tiles, from 0 to ``tile`` - 1; the last two tiles can share more.

    Returns:
        The first pixel of each tile, and the weights, (tiles, tile) float32.

    Raises:
        ValueError: If ``overlap`` is out of range.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap: wanted from 0 to {tile - 1} px (tiles of {tile} px), got {overlap}")
    starts = tile_starts(length, tile, tile - overlap)
    window = np.ones(tile)
    if overlap:
        rise = np.sin(np.pi / 2 * (np.arange(overlap) + 0.5) / overlap) ** 2
        window[:overlap] *= rise
        window[-overlap:] *= rise[::-1]
    total = np.zeros(max(length, tile))
    for start in starts:
        total[start : start + tile] += window
    return starts, np.stack([window / total[start : start + tile] for start in starts]).astype(np.float32)


def count_tiles(shape: tuple[int, int], tile: int, stride: int) -> int:
    """Return the number of tiles of an image.

    Args:
        shape: Height and width of the image, in pixels.
        tile: Side of a tile, in pixels.
        stride: Distance from one tile to the next, in pixels.

    Returns:
        The number of tiles.
    """
    return len(tile_starts(shape[0], tile, stride)) * len(tile_starts(shape[1], tile, stride))


def join_tiles(tiles: NDArray[Any], shape: tuple[int, int], stride: int) -> NDArray[Any]:
    """Put the tiles of an image together; the inverse of `Tiles`.

    Args:
        tiles: All tiles of the image in reading order, (tiles, tile, tile, 3), uint8 or float32.
        shape: Height and width of the image, in pixels.
        stride: Distance from one tile to the next, in pixels.

    Returns:
        The image, (height, width, 3), of the dtype of the tiles.
    """
    (height, width), tile = shape, tiles.shape[1]
    pixels = np.empty((max(height, tile), max(width, tile), 3), tiles.dtype)
    corners = [(y, x) for y in tile_starts(height, tile, stride) for x in tile_starts(width, tile, stride)]
    for (y, x), part in zip(corners, tiles, strict=True):
        pixels[y : y + tile, x : x + tile] = part
    return pixels[:height, :width]


class Tiles:
    """Tiles of one decoded image, cut on access, in reading order.

    Args:
        pixels: Image, (H, W, 3), uint8 or float32; copied only if it is smaller than a tile.
        tile: Side of a tile, in pixels.
        stride: Distance from one tile to the next, in pixels; at most ``tile``.
        release: Whether to release the memory of the rows above the requested tiles
            (`recontrast.data.memory.release_rows`); these rows can then no longer be read.

    Attributes:
        corners: Upper left pixel (y, x) of each tile.
    """

    def __init__(self, pixels: NDArray[Any], tile: int, stride: int, *, release: bool = False) -> None:
        height, width = pixels.shape[:2]
        self.corners = [(y, x) for y in tile_starts(height, tile, stride) for x in tile_starts(width, tile, stride)]
        self.tile, self._release = tile, release
        padding = [(0, max(tile - height, 0)), (0, max(tile - width, 0)), (0, 0)]
        self._pixels = np.pad(pixels, padding, "symmetric") if height < tile or width < tile else pixels

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Cut tiles.

        Args:
            index: List or array of tile numbers, (n,).

        Returns:
            Copies of the tiles, (n, tile, tile, 3), of the dtype of the image.
        """
        corners = [self.corners[i] for i in index]
        tiles = np.empty((len(corners), self.tile, self.tile, 3), self._pixels.dtype)
        for position, (y, x) in enumerate(corners):
            tiles[position] = self._pixels[y : y + self.tile, x : x + self.tile]
        if self._release and corners:
            release_rows(self._pixels, min(y for y, _ in corners))
        return tiles


class PartTiles:
    """Tiles of the views of a part, those of one view after those of another.

    Args:
        images: Views (views, H, W, 3), uint8 or float32.
        tile: Side of a tile, in pixels.
        stride: Distance from one tile to the next, in pixels; at most ``tile``.
    """

    def __init__(self, images: NDArray[Any], tile: int, stride: int) -> None:
        self._views = [Tiles(image, tile, stride) for image in images]

    def __len__(self) -> int:
        return sum(map(len, self._views))

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Cut the tiles at the positions ``index`` (n,): (n, tile, tile, 3), of the dtype of the images."""
        count = len(self._views[0])
        return np.concatenate([self._views[position // count][[position % count]] for position in index])


class TileMasks:
    """Tiles of the region of interest of one image, cut on access, in reading order.

    An image smaller than a tile is inside the region where it is mirrored from a pixel inside.

    Args:
        inside: Whether each pixel is inside, (H, W) bool.
        tile: Side of a tile, in pixels.
        stride: Distance from one tile to the next, in pixels; at most ``tile``.
    """

    def __init__(self, inside: NDArray[np.bool_], tile: int, stride: int) -> None:
        height, width = inside.shape
        self.corners = [(y, x) for y in tile_starts(height, tile, stride) for x in tile_starts(width, tile, stride)]
        self.tile = tile
        padding = [(0, max(tile - height, 0)), (0, max(tile - width, 0))]
        self._inside = np.pad(inside, padding, "symmetric") if height < tile or width < tile else inside

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: Any) -> NDArray[np.bool_]:
        """Cut the masks of the tiles at the positions ``index`` (n,): (n, tile, tile) bool."""
        corners = [self.corners[i] for i in index]
        return np.stack([self._inside[y : y + self.tile, x : x + self.tile] for y, x in corners])

    def list_inside(self) -> NDArray[np.int64]:
        """Return the positions of the tiles with a pixel inside, ascending."""
        return np.array([
            position for position, (y, x) in enumerate(self.corners)
            if self._inside[y : y + self.tile, x : x + self.tile].any()
        ], np.int64)  # fmt: skip

    def select(self, positions: NDArray[np.int64]) -> "TileMasks":
        """Return the masks of some tiles, by position."""
        selected = copy.copy(self)
        selected.corners = [self.corners[position] for position in positions]
        return selected
