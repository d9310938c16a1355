"""Augmented copies of decoded images, as the protocols of few-shot detection make them.

The copies are made once, before the training, as in the public codes of both methods below: each is an image of its
own, with the same pixels in every epoch.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from recontrast.data.sources import Images

GREY = (0.299, 0.587, 0.114)  # weights of red, green and blue (ITU-R BT.601)


class View(NamedTuple):
    """One augmented copy of an image.

    Attributes:
        angle: Rotation about the centre, in degrees, counter-clockwise.
        shift: Translation to the right and downwards, in shares of width and height.
        mirror: Axes of (H, W) that are reversed.
        is_grey: Whether the colours become grey.
    """

    angle: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    mirror: tuple[int, ...] = ()
    is_grey: bool = False


_SMALL_ANGLES = (-45.0, -33.75, -22.5, -11.25, 11.25, 22.5, 33.75, 45.0)
_SHIFTS = [(side * x, side * y) for side in (0.1, 0.05) for x, y in ((1, 1), (-1, 1), (-1, -1), (1, -1))]
VIEWS: dict[str, tuple[View, ...]] = {
    "none": (View(),),
    # `augment_image` in src/utils.py of github.com/dammsi/AnomalyDINO (Damm et al., WACV 2025).
    "rotations": tuple(View(angle=45.0 * number) for number in range(8)),
    "flips": tuple(View(mirror=axes) for axes in ((), (1,), (0,), (0, 1))),
    # `augmentation` in utils.py of github.com/luow23/INP-Former (Luo et al., CVPR 2025): 22 copies. Its translations of
    # 0.2 and 0.1 are in units of half the image.
    "inp_former": (
        View(),
        *(View(angle=angle) for angle in _SMALL_ANGLES),
        *(View(shift=shift) for shift in _SHIFTS),
        View(mirror=(1,)),
        View(is_grey=True),
        *(View(angle=90.0 * number) for number in (1, 2, 3)),
    ),
}
"""Views of each image, the image itself first, by the names of the recipe field ``augment``."""


def count_views(name: str) -> int:
    """Return the number of views of an image, itself included.

    Args:
        name: Key of `VIEWS`.
    """
    return len(VIEWS[name])


def augment_images(images: Images, name: str) -> Images:
    """Return images followed by their augmented copies.

    Args:
        images: Decoded images, n of (H, W, 3) uint8.
        name: Key of `VIEWS`, with v views.

    Returns:
        The images themselves for "none". Else v * n images: position ``i`` is view ``i // n`` of image ``i % n``, so
        that the first n are the images.
    """
    return images if name == "none" else AugmentedImages(images, VIEWS[name])


class AugmentedImages:
    """Images and their augmented copies, which are computed when they are read.

    Args:
        images: Decoded images.
        views: Views of each image.
    """

    def __init__(self, images: Images, views: Sequence[View]) -> None:
        self.images, self.views = images, views

    def __len__(self) -> int:
        """Number of images and copies."""
        return len(self.images) * len(self.views)

    def __getitem__(self, index: Any) -> NDArray[np.uint8]:
        """Read images and copies.

        Args:
            index: Positions, (n,).

        Returns:
            (n, H, W, 3) uint8.
        """
        index = np.atleast_1d(np.asarray(index, np.int64))
        pixels = np.array(self.images[index % len(self.images)])  # a copy, which is changed below
        numbers = index // len(self.images)
        for number in np.unique(numbers).tolist():
            rows = np.flatnonzero(numbers == number)
            pixels[rows] = change_view(pixels[rows], self.views[number])
        return pixels


def change_view(pixels: NDArray[Any], view: View) -> NDArray[Any]:
    """Compute a view of images.

    Rotations and translations are bilinear; outside, the image is mirrored. Quarter turns of square images only move
    pixels.

    Args:
        pixels: (n, H, W, 3), uint8, or float32 in [0, 1].
        view: View to compute.

    Returns:
        (n, H, W, 3), of the same dtype.
    """
    height, width = pixels.shape[1:3]
    turns, rest = divmod(view.angle, 90.0)
    if view.angle and not rest and height == width:
        pixels = np.rot90(pixels, int(turns), axes=(1, 2))
    elif view.angle or any(view.shift):
        planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float()
        moved = F.grid_sample(planes, _make_grid(view, height, width).expand(len(pixels), -1, -1, -1),
                              padding_mode="reflection", align_corners=False)  # fmt: skip
        pixels = _round_like(moved.permute(0, 2, 3, 1).numpy(), pixels.dtype)
    if view.mirror:
        pixels = np.flip(pixels, tuple(axis + 1 for axis in view.mirror))
    if view.is_grey:
        grey = _round_like(pixels.astype(np.float32) @ np.array(GREY, np.float32), pixels.dtype)
        pixels = np.repeat(grey[..., None], 3, axis=-1)
    return np.ascontiguousarray(pixels)


def _round_like(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return float32 values as pixels of a dtype: rounded to levels for uint8, in [0, 1] for float32."""
    if dtype == np.uint8:
        return np.rint(values).clip(0, 255).astype(np.uint8)
    return values.clip(0, 1)


def _make_grid(view: View, height: int, width: int) -> Tensor:
    """Return the position that each pixel of a view is read from, (1, H, W, 2), in units of half the image."""
    angle = math.radians(view.angle)
    x, y = view.shift
    matrix = torch.tensor([
        [math.cos(angle), -math.sin(angle) * height / width, -2 * x],
        [math.sin(angle) * width / height, math.cos(angle), -2 * y],
    ])  # fmt: skip
    return F.affine_grid(matrix[None], [1, 3, height, width], align_corners=False)
