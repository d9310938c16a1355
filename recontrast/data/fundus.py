"""Fundus photographs cut to the eye, as the reference prepares APTOS 2019 (`fundus_crop` of its prepare_aptos.py).

The eye is the largest 8-connected region where the three channels sum to more than `DARK_LEVEL`. A square around its
centroid, with the longer side of its bounding box and `MARGIN` pixels more on each side, is cut out, black where it
leaves the photograph, and resized as OpenCV's ``INTER_LINEAR`` does it for bytes: no antialiasing, 11-bit weights,
roundings included. So the pixels are those that the published figures were measured on.
"""

import numpy as np

from recontrast.data.images import read_image
from recontrast.data.listing import PathLike

DARK_LEVEL = 30  # of 765: the sum of a pixel's channels that the black around the eye does not exceed
MARGIN = 5  # pixels
SIDE = 512  # pixels of the result
_BITS = 11  # of the weights, in OpenCV


def read_fundus(path: PathLike) -> np.ndarray:
    """Decode a fundus photograph, cut to the eye: (SIDE, SIDE, 3) uint8, RGB."""
    image = read_image(path)
    square = find_eye_square(image)
    if square is None:
        raise ValueError(f"{path}: wanted a fundus photograph, got one without a pixel brighter than {DARK_LEVEL}")
    return resize_linear(crop_with_padding(image, *square), SIDE)


def find_eye_square(image: np.ndarray) -> tuple[int, int, int, int] | None:
    """Where to cut.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        Top, left, bottom, right in pixels, which may lie outside the image; None where all is dark.
    """
    red, green, blue = (image[:, :, channel].astype(np.uint16) for channel in range(3))
    rows, starts, ends = find_largest_region(red + green + blue > DARK_LEVEL)
    if not len(rows):
        return None
    lengths = ends - starts
    area = int(lengths.sum())
    centroid = np.array([(rows * lengths).sum() / area, ((starts + ends - 1) * lengths).sum() / 2 / area])
    half = max(int(rows.max() - rows.min()) + 1, int(ends.max() - starts.min())) / 2
    low, high = np.trunc(centroid - half).astype(int), np.trunc(centroid + half).astype(int)  # towards zero, as there
    return (*(low - MARGIN).tolist(), *(high + MARGIN).tolist())


def find_largest_region(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest 8-connected region, of equals the first in reading order.

    Args:
        mask: (H, W) bool.

    Returns:
        Its runs, each (n,) int64: row, first column, and the column after the last.
    """
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    if not len(rows):
        return rows, starts, ends
    # Runs are in reading order, so those of the next row that touch a run, also at a corner, stand side by side.
    pitch = mask.shape[1] + 1
    first = np.searchsorted(rows * pitch + ends, (rows + 1) * pitch + starts, "left")
    after = np.searchsorted(rows * pitch + starts, (rows + 1) * pitch + ends, "right")
    touching = np.maximum(after - first, 0)
    above = np.repeat(np.arange(len(rows)), touching)
    below = np.repeat(first - np.cumsum(touching) + touching, touching) + np.arange(len(above))
    label = np.arange(len(rows))  # of each run that of an earlier one, in the end the first of its region
    while (label[above] != label[below]).any():
        low = np.minimum(label[above], label[below])
        np.minimum.at(label, label[above], low)
        np.minimum.at(label, label[below], low)
        while (label != label[label]).any():
            label = label[label]
    mine = label == np.bincount(label, ends - starts).argmax()
    return rows[mine], starts[mine], ends[mine]


def crop_with_padding(image: np.ndarray, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    """The part of (H, W, C) uint8 between these pixels, black where it leaves the image."""
    result = np.zeros((bottom - top, right - left, image.shape[2]), image.dtype)
    part = image[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    y, x = max(-top, 0), max(-left, 0)
    result[y : y + part.shape[0], x : x + part.shape[1]] = part
    return result


def resize_linear(image: np.ndarray, side: int) -> np.ndarray:
    """OpenCV's ``resize(image, (side, side))``: (H, W, C) uint8 -> (side, side, C) uint8."""
    height, width, _ = image.shape
    if height == width == 2 * side:  # there, exactly half the size is a mean of four
        quarters = image.reshape(side, 2, side, 2, -1).astype(np.uint16).sum((1, 3))
        return ((quarters + 2) >> 2).astype(np.uint8)
    upper, lower, wy = _neighbours(height, side)
    left, right, wx = _neighbours(width, side)
    wx[left == right] = 0  # at the border it sees one pixel of a row, but twice the same row: both terms are rounded
    mixed = []
    for rows in (upper, lower):
        part = image[rows].astype(np.int32)
        mixed.append(part.take(left, 1) * (2**_BITS - wx)[:, None] + part.take(right, 1) * wx[:, None])
    top, bottom = (rows >> 4 for rows in mixed)
    weight = wy[:, None, None]
    total = (((2**_BITS - weight) * top) >> 16) + ((weight * bottom) >> 16)
    return ((total + 2) >> 2).astype(np.uint8)


def _neighbours(length: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of ``side`` pixels the two of ``length`` around it, and the weight of the second, of 2**11."""
    place = ((np.arange(side) + 0.5) * (length / side) - 0.5).astype(np.float32)
    first = np.floor(place).astype(int)
    weight = np.rint((place - first.astype(np.float32)) * np.float32(2**_BITS)).astype(np.int32)
    return first.clip(0, length - 1), (first + 1).clip(0, length - 1), weight
