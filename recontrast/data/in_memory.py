"""Images from a caller (paths, PIL images or arrays), converted to the same pixels as from a file."""

import os
from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from recontrast.data.decode import apply_orientation, decoded_samples
from recontrast.data.encoded_image import ImagePage
from recontrast.data.images import MAX_PIXELS, Size, fit_picture, fit_samples, parse_size, read_image
from recontrast.data.samples import read_stored
from recontrast.data.system import count_cpus
from recontrast.data.window import Window, parse_window, pixel_dtype

ACCEPTED = "a sequence of paths or PIL images, or an array (n, h, w, 3) or (n, h, w) of uint8, or of floats in [0, 1]"
TOLERANCE = 1e-6  # float arrays can exceed [0, 1] by the rounding errors of float32


class InMemoryImages:
    """Images from a caller, decoded and resized to one size on access, on threads.

    A path, the PIL image opened from it and the array of its upright RGB pixels give identical pixels
    (`recontrast.data.images.fit_picture`).

    Args:
        images: Sequence of paths (str or os.PathLike), PIL images of any mode, and arrays (h, w, 3) or (h, w), which
            can differ in kind and size; or one array (n, h, w, 3) or (n, h, w). Arrays are RGB or grey, uint8 or floats
            in [0, 1]; floats are rounded to 256 levels before resizing. With a window they hold samples of more than 8
            bits, as in a file.
        size: Size after resizing, in pixels: (height, width), or one number for a square.
        crop: Size of the centre crop after resizing, in pixels. None keeps the whole image.
        bits: Bits that the camera uses of 16-bit samples, as in `recontrast.data.images.read_image`.
        window: Values that become 0 and 1, as in `recontrast.data.images.read_image`.

    Attributes:
        shape: (n, H, W, 3).

    Raises:
        ValueError: If ``images`` is empty or of another kind, or if ``size`` or ``crop`` is invalid.
    """

    def __init__(
        self, images: Any, size: Size, crop: Size | None = None, bits: int | None = None, window: Window = None
    ) -> None:
        self._items = as_image_list(images)
        self._size, self._crop = parse_size(size, "size"), None if crop is None else parse_size(crop, "crop")
        self._bits, self._window = bits, window
        self.shape = (len(self._items), *(self._crop or self._size), 3)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._items)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Decode images.

        Args:
            index: Array of positions, (n,).

        Returns:
            (n, H, W, 3), uint8, or float32 with a window.

        Raises:
            OSError: If a file does not exist or cannot be opened.
            ValueError: If an image cannot be decoded.
        """
        positions = np.asarray(index, np.intp)
        batch = np.empty((len(positions), *self.shape[1:]), pixel_dtype(self._window))
        with ThreadPoolExecutor(min(count_cpus(), max(len(positions), 1))) as pool:
            for i, pixels in enumerate(pool.map(self._read, positions.tolist())):
                batch[i] = pixels
        return batch

    def _read(self, position: int) -> np.ndarray:
        """Decode one image."""
        item = self._items[position]
        if isinstance(item, str | os.PathLike | ImagePage):
            return read_image(item, size=self._size, crop=self._crop, bits=self._bits, window=self._window)
        name = f"image {position}"
        return fit_given(item, size=self._size, crop=self._crop, bits=self._bits, window=self._window, name=name)


def fit_given(
    item: Image.Image | np.ndarray, *, size: Size | None = None, crop: Size | None = None, bits: int | None = None,
    window: Window = None, name: str = "image",
) -> np.ndarray:  # fmt: skip
    """Convert an image from a caller to the pixels of its file.

    Args:
        item: PIL image, or array (h, w, 3) or (h, w).
        size: Size after resizing, as in `recontrast.data.images.read_image`.
        crop: Size of the centre crop, as there.
        bits: Bits that the camera uses of 16-bit samples of a PIL image, as there.
        window: Values that become 0 and 1, as there.
        name: Name of the image in error messages.

    Returns:
        (H, W, 3), RGB: uint8, or float32 in [0, 1] with a window.

    Raises:
        ValueError: If the image is invalid.
    """
    if isinstance(item, np.ndarray) and (limits := parse_window(window)) is not None:
        check_shape(item, name)
        return fit_samples(item, limits, size=size, crop=crop, name=name)
    picture = apply_orientation(item) if isinstance(item, Image.Image) else Image.fromarray(to_uint8(item, name))
    return fit_picture(picture, size=size, crop=crop, bits=bits, window=window, name=name)


def read_given(item: Any, take: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Take some of the samples of an image from a caller as they are, for a window.

    Args:
        item: Path, PIL image, or array (h, w, 3) or (h, w).
        take: Function of the samples, (h, w) or (h, w, 3), of any dtype; uint8 for a file or a PIL image of 8 bits.
            While it runs, those of a file count towards `recontrast.data.decode_budget.BUDGET`: the result must be no
            view of them.

    Returns:
        The result of ``take``.

    Raises:
        OSError: If a file cannot be opened.
        ValueError: If the image cannot be decoded.
    """
    if isinstance(item, Image.Image):
        return take(read_stored("image", apply_orientation(item)))
    if isinstance(item, np.ndarray):
        return take(item)
    with decoded_samples(item, MAX_PIXELS) as samples:
        taken = take(samples)
        del samples  # before its memory is free for others
    return taken


def as_image_list(images: Any) -> list[Any]:
    """Convert the argument of `InMemoryImages` to a list of paths, PIL images and arrays, without decoding them.

    Args:
        images: Images, as in `InMemoryImages`.

    Returns:
        One item for each image.

    Raises:
        ValueError: If ``images`` is empty, of another kind, or one image instead of several.
    """
    refuse_container(images)
    if isinstance(images, str | os.PathLike | Image.Image) or not hasattr(images, "__len__"):
        raise ValueError(f"images: wanted {ACCEPTED}, got {_describe_kind(images)}")
    if isinstance(images, np.ndarray):
        _check_array(images)
    items = list(images)
    if not items:
        raise ValueError(f"images: wanted {ACCEPTED}, got an empty one")
    for position, item in enumerate(items):
        check_item(item, position)
    return items


def refuse_container(images: Any) -> None:
    """Raise an error if ``images`` holds images in a way that leaves open which they are, or in what order.

    Iterating over a table gives the names of its columns, over a dictionary its keys, and over a set any order.

    Args:
        images: Argument of a caller.

    Raises:
        ValueError: If it is a table, a dictionary, a set, a tensor or bytes.
    """
    got = None
    if hasattr(images, "columns") and hasattr(images, "shape"):
        got = f"a table ({type(images).__name__}): pass the column of the paths, as in list(table['path'])"
    elif isinstance(images, Mapping):
        got = "a dictionary: pass list(images.values())"
    elif isinstance(images, Set):
        got = "a set, which has no order: pass a sorted list"
    elif _is_tensor(images):
        got = _describe_tensor(images.ndim)
    elif isinstance(images, bytes | bytearray | memoryview):
        got = "bytes: pass paths, or images opened with PIL.Image.open"
    if got is not None:
        raise ValueError(f"images: wanted {ACCEPTED}, got {got}")


def check_item(item: Any, position: int) -> None:
    """Raise an error if an item of a sequence is not an image.

    Args:
        item: Item of a sequence of images.
        position: Position of the item, for the error message.

    Raises:
        ValueError: If it is not a path, a PIL image or an array of numbers of the shape of an image.
    """
    if not isinstance(item, str | os.PathLike | ImagePage | Image.Image | np.ndarray):
        got = _describe_tensor(item.ndim) if _is_tensor(item) else type(item).__name__
        raise ValueError(f"images: wanted {ACCEPTED}, got {got} at position {position}")
    if isinstance(item, np.ndarray):
        check_shape(item, f"image {position}")


def check_shape(pixels: np.ndarray, name: str) -> None:
    """Raise an error if an array does not have the shape of one image.

    Args:
        pixels: Array of a caller.
        name: Name of the image in error messages.

    Raises:
        ValueError: If the shape is not (h, w, 3) or (h, w), or a side is 0. The message names the conversion.
    """
    if pixels.ndim in (2, 3) and pixels.shape[2:] in ((), (3,)) and 0 not in pixels.shape:
        return
    hint = ""
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        hint = ": pass image[:, :, :3] to drop the alpha channel"
    elif pixels.ndim == 3 and pixels.shape[2] == 1:
        hint = ": pass image[:, :, 0] for a grey image"
    elif pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4):
        hint = ": pass image.transpose(1, 2, 0) if channels come first" if pixels.shape[0] > 1 else ": pass image[0]"
    elif pixels.ndim == 4:
        hint = ": pass a list of images, or one array of them all"
    raise ValueError(f"{name}: wanted an array (h, w, 3) or (h, w), got {pixels.shape}{hint}")


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
    check_shape(pixels, name)
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    if pixels.dtype.kind != "f":
        raise ValueError(f"{name}: wanted uint8, or floats in [0, 1], got {pixels.dtype}{_explain_dtype(pixels)}")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -TOLERANCE and high <= 1 + TOLERANCE):  # also catches NaN
        got = f"{low:g} to {high:g}" if np.isfinite([low, high]).all() else "NaN or infinity"
        raise ValueError(f"{name}: wanted floats in [0, 1] (divide by 255, or pass uint8), got {got}")
    return np.rint(pixels.clip(0, 1) * 255).astype(np.uint8)


def _check_array(images: np.ndarray) -> None:
    """Raise an error if an array cannot hold several images."""
    hint = ""
    if images.dtype.kind in "OU":
        if images.ndim == 1:
            return
        hint = ": pass one column of it"
    elif images.ndim == 4 and images.shape[3] == 3:
        return
    elif images.ndim == 4 and images.shape[1] in (3, 4) and images.shape[3] not in (1, 4):
        hint = ": pass images.transpose(0, 2, 3, 1) if channels come first"
    elif images.ndim == 4 and images.shape[3] == 4:
        hint = ": pass images[..., :3] to drop the alpha channel"
    elif images.ndim == 4 and images.shape[3] == 1:
        hint = ": pass images[..., 0] for grey images"
    elif images.ndim == 4 and images.shape[1] == 1:
        hint = ": pass images[:, 0] for grey images"
    elif images.ndim == 3 and images.shape[2] in (1, 3, 4):
        hint = ", which is one image: pass [image]; for grey images of that width pass list(images)"
    elif images.ndim == 3 and images.shape[0] == 3 and min(images.shape[1:]) > 3:
        hint = (
            ", which is one image with its channels first or three grey images: pass [image.transpose(1, 2, 0)] or "
            "list(images)"
        )
    elif images.ndim == 2:
        hint = ", which is one grey image: pass [image]"
    elif images.ndim == 3:
        return
    raise ValueError(f"images: wanted {ACCEPTED}, got an array {images.shape} of {images.dtype}{hint}")


def _explain_dtype(pixels: np.ndarray) -> str:
    """Return the conversion to uint8 for an error message."""
    if pixels.dtype == bool:
        return ": pass image.astype(np.uint8) * 255"
    if pixels.dtype.kind in "iu":
        low, high = int(pixels.min()), int(pixels.max())
        if low >= 0 and high <= 255:
            return ": pass image.astype(np.uint8)"
        return f" with values from {low} to {high}: divide by the largest possible value"
    return ""


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] in ("torch", "tensorflow", "jax", "jaxlib", "cupy")


def _describe_tensor(dimensions: int) -> str:
    """Describe a tensor for an error message, with its conversion to an array."""
    order = {3: ".permute(1, 2, 0)", 4: ".permute(0, 2, 3, 1)"}.get(dimensions, "")
    return f"a tensor: pass an array with the channels last, as in tensor.cpu(){order}.numpy()"


def _describe_kind(value: Any) -> str:
    """Describe a wrong argument for an error message."""
    if isinstance(value, str | os.PathLike):
        return f"one path, {os.fspath(value)[:80]!r}: put it into a list"
    if isinstance(value, Image.Image):
        return "one PIL image: put it into a list"
    if isinstance(value, Iterable):
        return f"an iterator ({type(value).__name__}): pass list(images)"
    return type(value).__name__
