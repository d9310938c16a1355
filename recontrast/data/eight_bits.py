"""Convert PIL images of any mode to 8 bits."""

from PIL import Image

from recontrast.data.decode import convert_decoder_errors, warn_of_range
from recontrast.data.encoded_image import ImageSource
from recontrast.data.samples import read_deep, scale_to_eight_bits, to_full_scale


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
