"""Convert PIL images of any mode to 8 bits."""

import numpy as np
from PIL import Image

from recontrast.data.decode import convert_decoder_errors, warn_of_range
from recontrast.data.encoded_image import ImageSource
from recontrast.data.samples import FULL_SCALE_KEY, scale_to_eight_bits, to_full_scale


def read_deep(path: ImageSource, image: Image.Image) -> tuple[np.ndarray, int] | None:
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
        got = "floating-point samples, whose scale is unknown"
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


def to_eight_bits(path: ImageSource, image: Image.Image, bits: int | None = None) -> Image.Image:
    """Convert an image to 8 bits.

    Args:
        path: Name of the image in error messages and warnings.
        image: Decoded image of any mode.
        bits: Bits that the camera uses of 16-bit samples; larger samples become white. None is 16.

    Returns:
        Image of mode "L" or "RGB".

    Raises:
        ValueError: If the samples have no known scale, or exceed it.
    """
    deep = read_deep(path, image)
    if deep is not None:
        values, full = deep
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > full:
            raise ValueError(f"{path}: wanted samples from 0 to {full} ({full.bit_length()} bits), got {low} to {high}")
        if full == 65535:
            scale = to_full_scale(bits)
            warn_of_range(path, high, scale)
            full = scale or full
        return Image.fromarray(scale_to_eight_bits(values, full))
    with convert_decoder_errors(path):
        if "transparency" in image.info:  # PIL would warn, or replace the transparent colour
            image = image.copy()  # the image can belong to the caller
            del image.info["transparency"]
        if image.mode == "La":
            image = image.convert("LA")
        mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
        return image if image.mode == mode else image.convert(mode)  # convert() always copies
