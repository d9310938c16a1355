"""Crop fundus photographs to the eye, as the reference prepares APTOS 2019 (``fundus_crop`` in its prepare_aptos.py).

The eye is the largest 8-connected region in which the three channels sum to more than `DARK_LEVEL`. The crop is a
square around its centroid, whose side is the longer side of the bounding box plus `MARGIN` pixels on each side; parts
outside the photograph are black. The crop is resized with the 8-bit ``INTER_LINEAR`` of OpenCV, including its rounding:
no antialiasing, 11-bit weights. The pixels are therefore those behind the published numbers.
"""

import numpy as np

from recontrast.data.images import read_image
from recontrast.data.listing import PathLike

DARK_LEVEL = 30  # largest sum of the three channels (0 to 765) of the black background
MARGIN = 5  # pixels added on each side of the eye
SIDE = 512  # side of the result, pixels
_BITS = 11  # precision of the interpolation weights in OpenCV


def read_fundus(path: PathLike) -> np.ndarray:
    """Read a fundus photograph and crop it to the eye.

    Args:
        path: Path of the photograph.

    Returns:
        (SIDE, SIDE, 3) uint8, RGB.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not an image, or no pixel is brighter than `DARK_LEVEL`.
    """
    image = read_image(path)
    square = find_eye_square(image)
    if square is None:
        raise ValueError(f"{path}: wanted a fundus photograph, got one without a pixel brighter than {DARK_LEVEL}")
    return resize_linear(crop_with_padding(image, *square), SIDE)


def find_eye_square(image: np.ndarray) -> tuple[int, int, int, int] | None:
    """Find the square around the eye.

    Args:
        image: Photograph, (H, W, 3) uint8.

    Returns:
        Top, left, bottom and right, in pixels, possibly outside the image; None if all pixels are dark.
    """
    red, green, blue = (image[:, :, channel].astype(np.uint16) for channel in range(3))
    rows, starts, ends = find_largest_region(red + green + blue > DARK_LEVEL)
    if not len(rows):
        return None
    lengths = ends - starts
    area = int(lengths.sum())
    centroid = np.array([(rows * lengths).sum() / area, ((starts + ends - 1) * lengths).sum() / 2 / area])
    half = max(int(rows.max() - rows.min()) + 1, int(ends.max() - starts.min())) / 2
    low, high = (
        np.trunc(centroid - half).astype(int),
        np.trunc(centroid + half).astype(int),
    )  # towards zero, as the reference
    return (*(low - MARGIN).tolist(), *(high + MARGIN).tolist())


def find_largest_region(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the largest 8-connected region of a mask; of several, the first in reading order.

    Args:
        mask: (H, W) bool.

    Returns:
        The horizontal runs of the region: row, first column, and column after the last one, each (n,) int64.
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    if not len(rows):
        return rows, starts, ends
    # Runs are in reading order, so the runs of the next row that touch a run, also at a corner, are consecutive.
    pitch = mask.shape[1] + 1
    first = np.searchsorted(rows * pitch + ends, (rows + 1) * pitch + starts, "left")
    after = np.searchsorted(rows * pitch + starts, (rows + 1) * pitch + ends, "right")
    touching = np.maximum(after - first, 0)
    above = np.repeat(np.arange(len(rows)), touching)
    below = np.repeat(first - np.cumsum(touching) + touching, touching) + np.arange(len(above))
    label = np.arange(len(rows))  # index of an earlier run of the same region, in the end of its first run
    while (label[above] != label[below]).any():
        low = np.minimum(label[above], label[below])
        np.minimum.at(label, label[above], low)
        np.minimum.at(label, label[below], low)
        while (label != label[label]).any():
            label = label[label]
    largest = label == np.bincount(label, ends - starts).argmax()
    return rows[largest], starts[largest], ends[largest]


def crop_with_padding(image: np.ndarray, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    """Crop an image; parts outside the image are black.

    Args:
        image: (H, W, C) uint8.
        top: First row.
        left: First column.
        bottom: Row after the last one.
        right: Column after the last one.

    Returns:
        (bottom - top, right - left, C) uint8.
    """
    result = np.zeros((bottom - top, right - left, image.shape[2]), image.dtype)
    part = image[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    y, x = max(-top, 0), max(-left, 0)
    result[y : y + part.shape[0], x : x + part.shape[1]] = part
    return result


def resize_linear(image: np.ndarray, side: int) -> np.ndarray:
    """Resize an image to a square, bit-identical to OpenCV's ``resize(image, (side, side))``.

    Args:
        image: (H, W, C) uint8.
        side: Side of the result, in pixels.

    Returns:
        (side, side, C) uint8.
    """
    height, width, _ = image.shape
    if height == width == 2 * side:  # OpenCV averages 2 x 2 pixels to halve the size
        quarters = image.reshape(side, 2, side, 2, -1).astype(np.uint16).sum((1, 3))
        return ((quarters + 2) >> 2).astype(np.uint8)
    upper, lower, weight_y = _find_neighbours(height, side)
    left, right, weight_x = _find_neighbours(width, side)
    # At the left and right border OpenCV takes one pixel, at the upper and lower one the same row twice, rounding both.
    weight_x[left == right] = 0
    blended = []
    for rows in (upper, lower):
        part = image[rows].astype(np.int32)
        blended.append(part.take(left, 1) * (2**_BITS - weight_x)[:, None] + part.take(right, 1) * weight_x[:, None])
    top, bottom = (rows >> 4 for rows in blended)
    weight = weight_y[:, None, None]
    total = (((2**_BITS - weight) * top) >> 16) + ((weight * bottom) >> 16)
    return ((total + 2) >> 2).astype(np.uint8)


def _find_neighbours(length: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each output pixel of an axis, its two input pixels and the weight of the second, from 0 to 2**11."""
    centre = ((np.arange(side) + 0.5) * (length / side) - 0.5).astype(np.float32)
    first = np.floor(centre).astype(int)
    weight = np.rint((centre - first.astype(np.float32)) * np.float32(2**_BITS)).astype(np.int32)
    return first.clip(0, length - 1), (first + 1).clip(0, length - 1), weight
