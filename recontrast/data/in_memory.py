"""Images as a program holds them, paths, PIL images or arrays, to the pixels that a file of them would give."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from recontrast.data.decode import apply_orientation
from recontrast.data.images import Size, fit_picture, parse_size, read_image

WANTED = "a sequence of paths or PIL images, or an array (n, h, w, 3) or (n, h, w) of uint8, or of floats in [0, 1]"
ROUNDING = 1e-6  # beyond [0, 1] in float arrays: what arithmetic in float32 leaves


class InMemoryImages:
    """Images of one caller in one size, decoded when they are indexed, on threads.

    Every image goes the way of a file (`images.fit_picture`): the path of an image, `PIL.Image.open` of it and the
    array of its upright RGB pixels give the same bytes.

    Args:
        images: paths (str or os.PathLike), PIL images of any mode, arrays (h, w, 3) or (h, w), mixed as you like; or
            one array (n, h, w, 3) or (n, h, w). Arrays are uint8, RGB or grey, or floats in [0, 1], which are rounded
            to the nearest of 255 levels before the resize. Sizes may differ.
        size: pixels, (h, w), or one number for a square; as in `images.read_image`.
        crop: pixels of the centre crop after it; as in `images.read_image`.

    Attributes:
        shape: (n, H, W, 3).

    Raises:
        ValueError: none of these kinds, or no image.
    """

    def __init__(self, images: Any, size: Size, crop: Size | None = None) -> None:
        self._items = as_image_list(images)
        self._size, self._crop = parse_size(size, "size"), None if crop is None else parse_size(crop, "crop")
        self.shape = (len(self._items), *(self._crop or self._size), 3)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._items)

    def __getitem__(self, index: Any) -> np.ndarray:
        """The images of an array of whole numbers, (n, H, W, 3) uint8; what cannot be read is an error."""
        wanted = np.asarray(index, np.intp)
        pixels = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), max(len(wanted), 1))) as pool:
            for place, one in enumerate(pool.map(self._read, wanted.tolist())):
                pixels[place] = one
        return pixels

    def _read(self, place: int) -> np.ndarray:
        item = self._items[place]
        if isinstance(item, str | os.PathLike):
            return read_image(item, size=self._size, crop=self._crop)
        name = f"image {place}"
        picture = apply_orientation(item) if isinstance(item, Image.Image) else Image.fromarray(to_uint8(item, name))
        return fit_picture(picture, size=self._size, crop=self._crop, name=name)


def as_image_list(images: Any) -> list[Any]:
    """The images of whatever `InMemoryImages` takes, as a list of paths, PIL images and arrays; checks kinds only."""
    if isinstance(images, str | os.PathLike | Image.Image) or not hasattr(images, "__len__"):
        raise ValueError(f"images: wanted {WANTED}, got {_kind(images)}")
    if isinstance(images, np.ndarray) and images.dtype.kind not in "OU" and images.ndim not in (3, 4):
        raise ValueError(f"images: wanted {WANTED}, got an array {images.shape} of {images.dtype}")
    found = list(images)
    if not found:
        raise ValueError(f"images: wanted {WANTED}, got an empty one")
    for place, item in enumerate(found):
        if not isinstance(item, str | os.PathLike | Image.Image | np.ndarray):
            raise ValueError(f"images: wanted {WANTED}, got {_kind(item)} at place {place}")
    return found


def to_uint8(pixels: np.ndarray, name: str) -> np.ndarray:
    """An array (h, w, 3) or (h, w) as uint8; ``name`` begins the sentence of an error."""
    if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)) or 0 in pixels.shape:
        raise ValueError(f"{name}: wanted an array (h, w, 3) or (h, w), got {pixels.shape}")
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype.kind != "f":
        raise ValueError(f"{name}: wanted uint8, or floats in [0, 1], got {pixels.dtype}")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN too
        got = f"{low:g} to {high:g}" if np.isfinite([low, high]).all() else "NaN or infinity"
        raise ValueError(f"{name}: wanted floats in [0, 1] (divide by 255, or pass uint8), got {got}")
    return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)


def _kind(value: Any) -> str:
    if isinstance(value, str | os.PathLike):
        return f"one path, {os.fspath(value)[:80]!r}: put it into a list"
    return "one PIL image: put it into a list" if isinstance(value, Image.Image) else type(value).__name__
