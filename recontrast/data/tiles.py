"""Square tiles of an image at its own scale: where they lie, how they are cut, how much each counts where they meet.

Along an axis tiles begin every ``stride`` pixels; the last one is shifted inwards, so that it ends where the image
does. An image smaller than a tile is mirrored (d c b a | a b c d | d c b a) beyond its right and lower edge up to one.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data.memory import release_rows


def tile_starts(length: int, tile: int, stride: int) -> list[int]:
    """First pixel of each tile along an axis of ``length`` pixels; at least one tile, no pixel without one."""
    if tile < 1 or not 1 <= stride <= tile:
        raise ValueError(f"tiles: wanted a tile of at least 1 px and a stride from 1 px to it, got {tile} and {stride}")
    return [*range(0, length - tile, stride), max(length - tile, 0)]


def tile_weights(length: int, tile: int, overlap: int) -> tuple[list[int], NDArray[np.float32]]:
    """A partition of unity along an axis: where tiles begin, and how much each of their pixels counts.

    Each tile's window rises as a squared sine over ``overlap`` pixels and falls likewise, so that what a network makes
    of the border of a tile, where it does not see what lies beyond, counts least. Windows are divided by their sum:
    at every pixel, those at the border of the image too, the weights add up to 1. In two dimensions the weight is
    the product of both axes'.

    Args:
        length: of the axis, pixels.
        tile: pixels.
        overlap: pixels that neighbours share, at least 0 and below ``tile``; the last two tiles may share more.

    Returns:
        The starts, and weights (tiles, tile).
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"overlap: wanted from 0 to {tile - 1} px (tiles of {tile} px), got {overlap}")
    first = tile_starts(length, tile, tile - overlap)
    window = np.ones(tile)
    if overlap:
        rise = np.sin(np.pi / 2 * (np.arange(overlap) + 0.5) / overlap) ** 2
        window[:overlap] *= rise
        window[-overlap:] *= rise[::-1]
    total = np.zeros(max(length, tile))
    for start in first:
        total[start : start + tile] += window
    return first, np.stack([window / total[start : start + tile] for start in first]).astype(np.float32)


def count_tiles(shape: tuple[int, int], tile: int, stride: int) -> int:
    """Number of tiles of an image of ``shape`` (H, W)."""
    return len(tile_starts(shape[0], tile, stride)) * len(tile_starts(shape[1], tile, stride))


class Tiles:
    """Tiles of one decoded image, cut when they are indexed: from the left to the right, then downwards.

    Args:
        pixels: (H, W, 3) uint8; not copied, unless it is smaller than a tile.
        tile: side, pixels.
        stride: pixels from one tile to the next, at most ``tile``.
        release: the rows above those that are asked for may be given back (`pages.forget`): they are lost.

    Attributes:
        corners: upper left pixel (y, x) of each tile.
    """

    def __init__(self, pixels: NDArray[np.uint8], tile: int, stride: int, *, release: bool = False) -> None:
        height, width = pixels.shape[:2]
        self.corners = [(y, x) for y in tile_starts(height, tile, stride) for x in tile_starts(width, tile, stride)]
        self.tile, self._release = tile, release
        missing = [(0, max(tile - height, 0)), (0, max(tile - width, 0)), (0, 0)]
        self._pixels = np.pad(pixels, missing, "symmetric") if height < tile or width < tile else pixels

    def __len__(self) -> int:
        return len(self.corners)

    def __getitem__(self, index: Any) -> NDArray[np.uint8]:
        """Copies of the tiles of a list or array of whole numbers: (n, tile, tile, 3)."""
        chosen = [self.corners[i] for i in index]
        found = np.empty((len(chosen), self.tile, self.tile, 3), np.uint8)
        for place, (y, x) in enumerate(chosen):
            found[place] = self._pixels[y : y + self.tile, x : x + self.tile]
        if self._release and chosen:
            release_rows(self._pixels, min(y for y, _ in chosen))
        return found
