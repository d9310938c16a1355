"""Samples of more or fewer than 8 bits: read them from a decoded image, and scale them to 8 bits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recontrast.data.encoded_image import ImageSource

LARGEST_KEY = "largest_sample"  # in Image.info: largest sample of 16-bit colour, which the image itself no longer has
FULL_SCALE_KEY = "full_scale"  # in Image.info: largest value of a grey sample, if it is not that of the mode
WINDOW_KEY = "window"  # in Image.info: window in the file by which its samples were scaled to 8 bits
UNKNOWN_SCALE = "whose scale is unknown: train with --window"  # end of the message about such samples
_BLOCK_SAMPLES = 1 << 22  # samples that are scaled at a time


class SampleError(ValueError):
    """Samples that cannot be converted to 8 bits without guessing.

    Args:
        got: The samples, for the error message.
        wanted: What can be converted.
    """

    def __init__(self, got: str, wanted: str = "unsigned integer samples of 1 to 16 bits") -> None:
        super().__init__(got)
        self.wanted = wanted


def scale_to_eight_bits(values: NDArray[Any], full: int) -> NDArray[np.uint8]:
    """Scale samples from [0, full] to [0, 255], rounded to nearest; values above ``full`` become 255.

    Args:
        values: Samples of any integer dtype, not negative.
        full: Value of the brightest sample.

    Returns:
        Array of the same shape, uint8.
    """
    if full == 255 and values.dtype == np.uint8:
        return values
    result = np.empty(values.shape, np.uint8)
    step = max(_BLOCK_SAMPLES // max(int(np.prod(values.shape[1:])), 1), 1)
    for top in range(0, len(values), step):
        block = np.minimum(values[top : top + step], full).astype(np.int32)
        block *= 255
        block += full // 2
        block //= full
        result[top : top + step] = block
    return result


def to_full_scale(bits: int | None) -> int | None:
    """Return the largest sample that a camera can write.

    Args:
        bits: Bits that the camera uses of 16-bit samples, from 8 to 16; None is 16.

    Returns:
        ``2**bits - 1``; None for 16 bits, whose samples need no scaling.

    Raises:
        ValueError: If ``bits`` is out of range.
    """
    if bits is None or bits == 16:
        return None
    if isinstance(bits, bool) or not isinstance(bits, int) or not 8 <= bits <= 16:
        raise ValueError(f"bits: wanted None or a whole number from 8 to 16, got {bits!r}")
    return (1 << bits) - 1


def read_deep(path: ImageSource, image: Image.Image) -> tuple[NDArray[Any], int] | None:
    """Read the samples of an image with more than 8 bits.

    Args:
        path: Name of the image in error messages.
        image: Decoded image.

    Returns:
        The samples, (H, W) uint16 or int32, and their full scale; None for images of 8 bits.

    Raises:
        ValueError: If the samples are floating-point numbers.
    """
    if image.mode == "F":
        got = f"floating-point samples, {UNKNOWN_SCALE}"
        raise ValueError(f"{path}: wanted unsigned integer samples of 1 to 16 bits, got {got}")
    if not image.mode.startswith("I"):
        return None
    values = np.asarray(image)
    if values.dtype.byteorder == ">":
        values = values.astype(values.dtype.newbyteorder("="))
    if FULL_SCALE_KEY in image.info:
        return values, int(image.info[FULL_SCALE_KEY])
    tags = getattr(image, "tag_v2", {})  # of a TIFF file that a caller opened by Pillow
    full = 4095 if image.mode != "I" and tags.get(258) == (12,) else 65535
    return (full - values if image.mode != "I" and tags.get(262) == 0 else values), full  # tag 262, value 0: white is 0


def read_stored(path: ImageSource, image: Image.Image) -> NDArray[Any]:
    """Read the samples of an image as they are, for a window.

    Args:
        path: Name of the image in error messages.
        image: Decoded image.

    Returns:
        (H, W), of uint16, int32 or float32; (H, W) uint8 for any image of 8 bits, which has no window.
    """
    if image.mode == "F":
        return np.asarray(image)
    deep = read_deep(path, image)
    return np.zeros((image.height, image.width), np.uint8) if deep is None else deep[0]
