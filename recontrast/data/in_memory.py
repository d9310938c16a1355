"""Images from a caller (paths, PIL images or arrays), converted to the same pixels as from a file."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from recontrast.data.decode import apply_orientation
from recontrast.data.images import Size, fit_picture, parse_size, read_image

ACCEPTED = "a sequence of paths or PIL images, or an array (n, h, w, 3) or (n, h, w) of uint8, or of floats in [0, 1]"
TOLERANCE = 1e-6  # float arrays can exceed [0, 1] by the rounding errors of float32


class InMemoryImages:
    """Images from a caller, decoded and resized to one size on access, on threads.

    A path, the PIL image opened from it and the array of its upright RGB pixels give identical pixels
    (`recontrast.data.images.fit_picture`).

    Args:
        images: Sequence of paths (str or os.PathLike), PIL images of any mode, and arrays (h, w, 3) or (h, w), which
            can differ in kind and size; or one array (n, h, w, 3) or (n, h, w). Arrays are RGB or grey, uint8 or floats
            in [0, 1]; floats are rounded to 256 levels before resizing.
        size: Size after resizing, in pixels: (height, width), or one number for a square.
        crop: Size of the centre crop after resizing, in pixels. None keeps the whole image.
        bits: Bits that the camera uses of 16-bit samples, as in `recontrast.data.images.read_image`.

    Attributes:
        shape: (n, H, W, 3).

    Raises:
        ValueError: If ``images`` is empty or of another kind, or if ``size`` or ``crop`` is invalid.
    """

    def __init__(self, images: Any, size: Size, crop: Size | None = None, bits: int | None = None) -> None:
        self._items = as_image_list(images)
        self._size, self._crop = parse_size(size, "size"), None if crop is None else parse_size(crop, "crop")
        self._bits = bits
        self.shape = (len(self._items), *(self._crop or self._size), 3)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._items)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Decode images.

        Args:
            index: Array of positions, (n,).

        Returns:
            (n, H, W, 3) uint8.

        Raises:
            OSError: If a file does not exist or cannot be opened.
            ValueError: If an image cannot be decoded.
        """
        positions = np.asarray(index, np.intp)
        batch = np.empty((len(positions), *self.shape[1:]), np.uint8)
        with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), max(len(positions), 1))) as pool:
            for i, pixels in enumerate(pool.map(self._read, positions.tolist())):
                batch[i] = pixels
        return batch

    def _read(self, position: int) -> np.ndarray:
        """Decode one image."""
        item = self._items[position]
        if isinstance(item, str | os.PathLike):
            return read_image(item, size=self._size, crop=self._crop, bits=self._bits)
        name = f"image {position}"
        picture = apply_orientation(item) if isinstance(item, Image.Image) else Image.fromarray(to_uint8(item, name))
        return fit_picture(picture, size=self._size, crop=self._crop, bits=self._bits, name=name)


def as_image_list(images: Any) -> list[Any]:
    """Convert the argument of `InMemoryImages` to a list of paths, PIL images and arrays, without decoding them.

    Args:
        images: Images, as in `InMemoryImages`.

    Returns:
        One item for each image.

    Raises:
        ValueError: If ``images`` is empty or of another kind.
    """
    if isinstance(images, str | os.PathLike | Image.Image) or not hasattr(images, "__len__"):
        raise ValueError(f"images: wanted {ACCEPTED}, got {_describe_kind(images)}")
    if isinstance(images, np.ndarray) and images.dtype.kind not in "OU" and images.ndim not in (3, 4):
        raise ValueError(f"images: wanted {ACCEPTED}, got an array {images.shape} of {images.dtype}")
    items = list(images)
    if not items:
        raise ValueError(f"images: wanted {ACCEPTED}, got an empty one")
    for position, item in enumerate(items):
        if not isinstance(item, str | os.PathLike | Image.Image | np.ndarray):
            raise ValueError(f"images: wanted {ACCEPTED}, got {_describe_kind(item)} at position {position}")
    return items


def to_uint8(pixels: np.ndarray, name: str) -> np.ndarray:
    """Convert an image array to uint8.

    Args:
        pixels: (h, w, 3) or (h, w), uint8 or floats in [0, 1].
        name: Name of the image in error messages.

    Returns:
        Array of the same shape, uint8.

    Raises:
        ValueError: If the shape, the dtype or a value is invalid.
    """
    if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,)) or 0 in pixels.shape:
        raise ValueError(f"{name}: wanted an array (h, w, 3) or (h, w), got {pixels.shape}")
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype.kind != "f":
        raise ValueError(f"{name}: wanted uint8, or floats in [0, 1], got {pixels.dtype}")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also catches NaN
        got = f"{low:g} to {high:g}" if np.isfinite([low, high]).all() else "NaN or infinity"
        raise ValueError(f"{name}: wanted floats in [0, 1] (divide by 255, or pass uint8), got {got}")
    return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)


def _describe_kind(value: Any) -> str:
    """Describe a wrong argument for an error message."""
    if isinstance(value, str | os.PathLike):
        return f"one path, {os.fspath(value)[:80]!r}: put it into a list"
    return "one PIL image: put it into a list" if isinstance(value, Image.Image) else type(value).__name__
