"""Maps and pictures of images of any size: written as tiles, reduced for the eye, a strip of rows at a time."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data import heatmaps
from recontrast.data.atomic import replace_file

SIDE = 256  # pixels of a tile of a TIFF file, of both axes: a viewer reads those that it shows
OVERLAY_PIXELS = 16_000_000  # of an overlay; of a larger image it is reduced by a whole factor
STRIP = 1 << 18  # pixels coloured at once
HEADER = 1 << 16  # bytes beyond the pixels that a file may take, and 16 for each tile


def save_map(path: Path, anomaly: NDArray[np.float32], kind: str, top: float) -> None:
    """Write a map of any size, whole or not at all; the free space is asked for first.

    Args:
        path: the file.
        anomaly: (H, W), values in [0, top].
        kind: ``"tiff16"`` (uint16, 65535 stands for ``top``) or ``"tiff32"`` (float32), both as tiles of 256 px without
            compression, or ``"npy"`` (float32).
        top: the largest value a map can have.

    Raises:
        ImportError: tifffile, which writes tiles, is not installed.
        OSError: the file cannot be written.
    """
    if kind not in ("tiff16", "tiff32", "npy"):
        raise ValueError(f"maps must be tiff16, tiff32, npy or none, got {kind!r}")
    height, width = anomaly.shape
    if kind == "npy":
        with replace_file(path, size=anomaly.nbytes + HEADER) as file:
            np.lib.format.write_array(file, np.ascontiguousarray(anomaly, np.float32))
        return
    try:
        import tifffile
    except ImportError as error:
        raise ImportError("maps as tiled TIFF need tifffile: pip install 'recontrast[tiles]'") from error
    dtype = np.dtype(np.uint16 if kind == "tiff16" else np.float32)
    number = math.ceil(height / SIDE) * math.ceil(width / SIDE)
    with replace_file(path, size=number * (SIDE * SIDE * dtype.itemsize + 16) + HEADER) as file:
        tifffile.imwrite(
            file, _tiles(anomaly, dtype, top), shape=anomaly.shape, dtype=dtype, tile=(SIDE, SIDE),
            photometric="minisblack", metadata=None,
        )  # fmt: skip


def find_reduction(shape: tuple[int, int], limit: int = OVERLAY_PIXELS) -> int:
    """The smallest whole factor by which an image of ``shape`` (H, W) has at most ``limit`` pixels."""
    factor = math.isqrt(max(math.ceil(shape[0] * shape[1] / limit) - 1, 0)) + 1
    while math.ceil(shape[0] / factor) * math.ceil(shape[1] / factor) > limit:
        factor += 1
    return factor


def reduce_blocks(pixels: NDArray[Any], factor: int, how: str) -> NDArray[Any]:
    """Blocks of ``factor`` x ``factor`` pixels, fewer at the right and the lower edge, become one.

    Args:
        pixels: (H, W) or (H, W, C).
        factor: whole number; 1 returns ``pixels``.
        how: "mean" (of an image) or "max" (of a map: a small defect stays as hot as it is).

    Returns:
        (ceil(H / factor), ceil(W / factor), ...), in the dtype of ``pixels``.
    """
    if factor == 1:
        return pixels
    edges = np.arange(0, pixels.shape[1], factor)
    widths = np.minimum(edges + factor, pixels.shape[1]) - edges
    found = np.empty((math.ceil(len(pixels) / factor), len(edges), *pixels.shape[2:]), pixels.dtype)
    for row in range(len(found)):
        block = pixels[row * factor : (row + 1) * factor]
        if how == "max":
            found[row] = np.maximum.reduceat(block.max(axis=0), edges, axis=0)
        else:
            count = (widths * len(block)).reshape(-1, *(1,) * (pixels.ndim - 2))
            mean = np.add.reduceat(block.sum(axis=0, dtype=np.float64), edges, axis=0) / count
            found[row] = np.rint(mean) if np.issubdtype(pixels.dtype, np.integer) else mean
    return found


def draw_overlay(image: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """`pictures.overlay`, strip by strip: what it needs beyond the result does not grow with the image."""
    found = np.empty(image.shape, np.uint8)
    step = max(STRIP // image.shape[1], 1)
    for begin in range(0, len(image), step):
        rows = slice(begin, begin + step)
        found[rows] = heatmaps.draw_overlay(image[rows], heat[rows])
    return found


def _tiles(anomaly: NDArray[np.float32], dtype: np.dtype[Any], top: float) -> Iterator[NDArray[Any]]:
    """The tiles of a file in its order, padded with zeros at the right and the lower edge."""
    for y in range(0, anomaly.shape[0], SIDE):
        for x in range(0, anomaly.shape[1], SIDE):
            part = anomaly[y : y + SIDE, x : x + SIDE]
            tile = np.zeros((SIDE, SIDE), dtype)
            tile[: part.shape[0], : part.shape[1]] = heatmaps.to_uint16(part, top) if dtype == np.uint16 else part
            yield tile
