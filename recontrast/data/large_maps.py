"""Maps and overlays of large images: tiled files, reduced overlays, and memory that does not grow with the image."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data import heatmaps
from recontrast.data.atomic import replace_file

TILE_SIDE = 256  # side of a tile of a TIFF file, pixels; a viewer reads only the tiles that it shows
OVERLAY_PIXELS = 16_000_000  # largest overlay; larger images are reduced by an integer factor
STRIP_PIXELS = 1 << 18  # pixels coloured at a time
HEADER_BYTES = 1 << 16  # space allowed for the file header; each tile needs another 16 bytes


def save_map(path: Path, anomaly: NDArray[np.float32], kind: str, top: float) -> None:
    """Write a map of any size; the free disk space is checked first.

    Args:
        path: File to write.
        anomaly: (H, W), values in [0, top].
        kind: ``"tiff16"`` (uint16, 65535 stands for ``top``) or ``"tiff32"`` (float32), both in uncompressed tiles of
            256 x 256 pixels, or ``"npy"`` (float32).
        top: Largest possible map value.

    Raises:
        ValueError: If ``kind`` is none of these.
        ImportError: If tifffile is not installed; it writes the tiles.
        OSError: If the file cannot be written.
    """
    if kind not in ("tiff16", "tiff32", "npy"):
        raise ValueError(f"maps: wanted tiff16, tiff32 or npy, got {kind!r}")
    height, width = anomaly.shape
    if kind == "npy":
        with replace_file(path, size=anomaly.nbytes + HEADER_BYTES) as file:
            np.lib.format.write_array(file, np.ascontiguousarray(anomaly, np.float32))
        return
    try:
        import tifffile
    except ImportError as error:
        raise ImportError(
            "maps as tiled TIFF: wanted the package tifffile, got none installed: pip install tifffile"
        ) from error
    dtype = np.dtype(np.uint16 if kind == "tiff16" else np.float32)
    tiles = math.ceil(height / TILE_SIDE) * math.ceil(width / TILE_SIDE)
    with replace_file(path, size=tiles * (TILE_SIDE * TILE_SIDE * dtype.itemsize + 16) + HEADER_BYTES) as file:
        tifffile.imwrite(
            file, _cut_tiles(anomaly, dtype, top), shape=anomaly.shape, dtype=dtype, tile=(TILE_SIDE, TILE_SIDE),
            photometric="minisblack", metadata=None,
        )  # fmt: skip


def find_reduction(shape: tuple[int, int], limit: int = OVERLAY_PIXELS) -> int:
    """Return the smallest integer factor that reduces an image to at most ``limit`` pixels.

    Args:
        shape: Height and width of the image, in pixels.
        limit: Largest number of pixels of the result.

    Returns:
        The factor, 1 if the image is small enough.
    """
    factor = math.isqrt(max(math.ceil(shape[0] * shape[1] / limit) - 1, 0)) + 1
    while math.ceil(shape[0] / factor) * math.ceil(shape[1] / factor) > limit:
        factor += 1
    return factor


def reduce_blocks(pixels: NDArray[Any], factor: int, method: str) -> NDArray[Any]:
    """Reduce each block of ``factor`` x ``factor`` pixels to one; blocks at the right and lower edge can be smaller.

    Args:
        pixels: (H, W) or (H, W, C).
        factor: Side of a block, in pixels. 1 returns ``pixels``.
        method: "mean", for images, or "max", for maps, where small defects must keep their peak.

    Returns:
        (ceil(H / factor), ceil(W / factor), ...), in the dtype of ``pixels``.
    """
    if factor == 1:
        return pixels
    edges = np.arange(0, pixels.shape[1], factor)
    widths = np.minimum(edges + factor, pixels.shape[1]) - edges
    reduced = np.empty((math.ceil(len(pixels) / factor), len(edges), *pixels.shape[2:]), pixels.dtype)
    for row in range(len(reduced)):
        block = pixels[row * factor : (row + 1) * factor]
        if method == "max":
            reduced[row] = np.maximum.reduceat(block.max(axis=0), edges, axis=0)
        else:
            count = (widths * len(block)).reshape(-1, *(1,) * (pixels.ndim - 2))
            mean = np.add.reduceat(block.sum(axis=0, dtype=np.float64), edges, axis=0) / count
            reduced[row] = np.rint(mean) if np.issubdtype(pixels.dtype, np.integer) else mean
    return reduced


def draw_overlay(image: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Draw a heat map over an image as `heatmaps.draw_overlay` does, in strips of constant memory.

    Args:
        image: (H, W, 3) uint8.
        heat: (H, W), values in [0, 1].

    Returns:
        (H, W, 3) uint8.
    """
    overlay = np.empty(image.shape, np.uint8)
    step = max(STRIP_PIXELS // image.shape[1], 1)
    for begin in range(0, len(image), step):
        rows = slice(begin, begin + step)
        overlay[rows] = heatmaps.draw_overlay(image[rows], heat[rows])
    return overlay


def _cut_tiles(anomaly: NDArray[np.float32], dtype: np.dtype[Any], top: float) -> Iterator[NDArray[Any]]:
    """Yield the tiles of a map row by row, zero-padded at the right and lower edge."""
    for y in range(0, anomaly.shape[0], TILE_SIDE):
        for x in range(0, anomaly.shape[1], TILE_SIDE):
            part = anomaly[y : y + TILE_SIDE, x : x + TILE_SIDE]
            tile = np.zeros((TILE_SIDE, TILE_SIDE), dtype)
            tile[: part.shape[0], : part.shape[1]] = heatmaps.to_uint16(part, top) if dtype == np.uint16 else part
            yield tile
