"""Resize, crop and convert PIL images of mode L or RGB, with the pixels of torchvision's transforms."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from recontrast.data.encoded_image import ImageSource
from recontrast.data.memory import allocate_pixels

_STRIP_PIXELS = 1 << 22  # pixels copied at a time

Size = int | Sequence[int]  # (height, width), or one number for a square


def parse_size(value: Size, name: str) -> tuple[int, int]:
    """Convert a size to height and width.

    Args:
        value: Size in pixels: (height, width), or one number for a square.
        name: Name of the value in error messages.

    Returns:
        Height and width, in pixels.

    Raises:
        ValueError: If ``value`` is not a positive integer or two of them.
    """
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) and v > 0 for v in pair):
        raise ValueError(f"{name}: wanted a positive number of pixels or two of them, (height, width), got {value!r}")
    return int(pair[0]), int(pair[1])


def resize(image: Image.Image, size: Size | None) -> Image.Image:
    """Resize with antialiased bilinear interpolation, as torchvision's Resize does on a PIL image.

    Pillow before version 13 resizes horizontally, then vertically, and rounds to 8 bits after each pass. Later versions
    start vertically if the height shrinks more, which changes a fifth of the pixels of a tall image by one level.
    Scores and thresholds must not depend on the version of Pillow, so the passes are called one by one.
    """
    if size is None:
        return image
    height, width = parse_size(size, "size")
    horizontal = image.resize((width, image.height), Image.Resampling.BILINEAR)
    return horizontal.resize((width, height), Image.Resampling.BILINEAR)


def crop_centre(path: ImageSource, image: Image.Image, crop: Size | None) -> Image.Image:
    """Cut out the centre; margins are rounded half to even, as in torchvision."""
    if crop is None:
        return image
    height, width = parse_size(crop, "crop")
    if height > image.height or width > image.width:
        raise ValueError(
            f"{path}: crop: wanted at most the size of the image, {image.height} x {image.width}, "
            f"got {height} x {width}"
        )
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return _cut(image, left, top, width, height)


def _cut(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    """Cut out a part of an image of mode L or RGB. Image.crop would enforce PIL's pixel limit."""
    return image.resize((width, height), Image.Resampling.NEAREST, box=(left, top, left + width, top + height))


def to_rgb_array(image: Image.Image) -> np.ndarray:
    """Convert an image of mode L or RGB to (H, W, 3) uint8, in strips: np.asarray would need twice the memory."""
    pixels = allocate_pixels((image.height, image.width, 3))
    step = max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, step):
        strip = np.asarray(_cut(image, 0, top, image.width, min(step, image.height - top)))
        pixels[top : top + step] = strip if strip.ndim == 3 else strip[:, :, None]  # grey: same value in all channels
    return pixels
