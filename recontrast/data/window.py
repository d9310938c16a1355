"""Windows of sample values: images of more than 8 bits become numbers from 0 to 1, not 256 levels.

Values below the window become 0 and values above it 1. Between them nothing is rounded but to float32. Without a
window, samples are scaled to 8 bits, see `recontrast.data.eight_bits`.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from recontrast.data.encoded_image import ImagePage
from recontrast.data.system import count_cpus

AUTO = "auto"
"""Window that training finds from its good images, see `find_window`."""

PERCENTILES = (0.1, 99.9)
"""Percentiles that are the window `AUTO`: of the samples of all good images, evenly spaced ones if they are many."""

Window = Sequence[float] | str | None  # lowest and highest value, in the unit of the samples; or `AUTO`, or none

_SAMPLES = 1 << 24  # samples of all images from which the percentiles are computed
_LEAST = 1 << 10  # samples of each image


def is_window(value: Any) -> bool:
    """Return whether a value is two finite numbers, the lower one first."""
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 2**64 for v in value)
        and bool(np.float32(value[0]) < np.float32(value[1]))
    )


def parse_window(window: Window) -> tuple[float, float] | None:
    """Check a window.

    Args:
        window: Lowest and highest value, or None.

    Returns:
        Both values, or None.

    Raises:
        ValueError: If the window is not two finite numbers, the lower one first.
    """
    if window is None:
        return None
    if not is_window(window):
        hint = ", which training finds" if window == AUTO else ""
        raise ValueError(f"window: wanted two numbers LOW < HIGH, got {window!r}{hint}")
    return float(window[0]), float(window[1])


def pixel_dtype(window: Window) -> np.dtype[Any]:
    """Return the dtype of the pixels of images: uint8, or float32 with a window."""
    return np.dtype(np.uint8 if window is None else np.float32)


def describe_window(window: Window) -> str:
    """Describe a window in a few words.

    Args:
        window: Lowest and highest value, "auto", or None.

    Returns:
        A clause such as "120 to 3900"; "8 bits" without a window.
    """
    if window is None:
        return "8 bits"
    return window if isinstance(window, str) else f"{window[0]:.10g} to {window[1]:.10g}"


def apply_window(samples: NDArray[Any], window: tuple[float, float], name: Any = "image") -> NDArray[np.float32]:
    """Scale samples from a window to [0, 1]; values outside are clipped.

    Args:
        samples: Array of any shape, of integers of more than 8 bits or of floats.
        window: Values that become 0 and 1.
        name: Name of the image in error messages.

    Returns:
        Array of the same shape, float32.

    Raises:
        ValueError: If the samples have 8 bits, or one is NaN or infinite.
    """
    check_samples(samples, describe_window(window), name)
    low, high = window
    is_wide = samples.dtype.kind in "iu" and samples.dtype.itemsize > 2  # float32 holds integers up to 2**24
    values: NDArray[Any] = samples.astype(np.float64 if is_wide or samples.dtype == np.float64 else np.float32)
    values -= low
    values /= high - low
    return np.clip(values, 0, 1, out=values).astype(np.float32, copy=False)


def check_samples(samples: NDArray[Any], window: str, name: Any = "image") -> None:
    """Raise an error if samples cannot be scaled by a window.

    Args:
        samples: Array of any shape.
        window: Description of the window, for the error message.
        name: Name of the image.

    Raises:
        ValueError: If the samples have 8 bits, or one is NaN or infinite.
    """
    if samples.dtype.kind not in "iuf" or samples.dtype.itemsize == 1:
        raise ValueError(f"{name}: wanted samples of more than 8 bits for the window {window}, got 8 bits")
    if samples.dtype.kind == "f" and not np.isfinite(samples.sum(dtype=np.float64)):
        wrong = int(np.count_nonzero(~np.isfinite(samples)))
        if wrong:
            raise ValueError(f"{name}: wanted finite samples, got NaN or infinity in {wrong} of {samples.size}")


def to_levels(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Round pixels to 8 bits for a picture; the scores never depend on it.

    Args:
        pixels: Array of any shape, uint8 or floats in [0, 1].

    Returns:
        Array of the same shape, uint8; ``pixels`` themselves if they are uint8.
    """
    if pixels.dtype == np.uint8:
        return pixels
    result = np.empty(pixels.shape, np.uint8)
    for row, levels in zip(pixels, result, strict=True):  # no second float copy of a large image
        levels[...] = np.rint(row * 255)
    return result


def from_levels(levels: NDArray[np.uint8], window: Window) -> NDArray[Any]:
    """Return a drawn picture as pixels of images with or without a window.

    Args:
        levels: Array of any shape, uint8.
        window: Window of the images, or None.

    Returns:
        The levels themselves without a window; else float32 in [0, 1].
    """
    return levels if window is None else levels.astype(np.float32) / np.float32(255)


def find_window(items: Sequence[Any], read: Any) -> tuple[float, float]:
    """Find the window `AUTO`: percentiles of the samples of all good images.

    From images of more than 2**24 samples in all, about as many are taken, as many of each: at even distances.

    Args:
        items: Good images.
        read: Function of an image and of another function, which takes some of its samples, (H, W) or (H, W, 3); see
            `recontrast.data.in_memory.read_given`.

    Returns:
        Values of the `PERCENTILES`.

    Raises:
        ValueError: If an image has 8 bits or samples that are not finite, or all images have one value.
    """
    most = max(_SAMPLES // max(len(items), 1), _LEAST)

    def choose(position: int) -> NDArray[Any]:
        def take(samples: NDArray[Any]) -> NDArray[Any]:
            check_samples(samples, AUTO, name_item(items[position], position))
            flat = samples.reshape(-1)
            return flat[:: max(math.ceil(flat.size / most) | 1, 1)].copy()  # odd: not the same columns of each row

        return cast("NDArray[Any]", read(items[position], take))

    with ThreadPoolExecutor(count_cpus()) as pool:
        values = np.concatenate(list(pool.map(choose, range(len(items)))))
    low, high = (float(value) for value in np.percentile(values, PERCENTILES, method="nearest"))
    if not is_window((low, high)):
        first = name_item(items[0], 0)
        raise ValueError(f"{first}: wanted images of different values for the window auto, got {low:g} in nearly all")
    return low, high


def name_item(item: Any, position: int) -> str:
    """Return the name of an image for messages: its path, or its position."""
    return str(item) if isinstance(item, str | ImagePage) or hasattr(item, "__fspath__") else f"image {position}"
