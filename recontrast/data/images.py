"""Decode images to RGB uint8 and masks to bool, and convert batches to network input.

The pixels are bit-identical to those of the reference pipeline (torchvision's ``Resize``, ``CenterCrop``, ``ToTensor``
and ``Normalize`` on PIL images, as in ``get_data_transforms``). Upstream depends on details of PIL. Here, the
same picture gives the same array in every file format:

* PNG, JPEG, BMP, TIFF and WebP are read; of a file with several images, the first. The content decides, not the suffix.
* Grey, palette, 1-bit, CMYK and other modes become RGB. Transparency is dropped, not composited.
* 16-bit grey is divided by 257 and rounded (PIL's own conversion clips at 255). Of 16-bit colour, and of 16-bit grey
  with alpha, Pillow only returns the high byte, which differs from the rounded value by at most one level.
* Float samples and integers beyond 16 bits have no known scale and raise an error, unless a window gives it: then all
  images become floats in [0, 1] without a step through 8 bits.
* The EXIF orientation is applied; masks use their own EXIF data.
* `MAX_PIXELS` replaces PIL's pixel limit, without changing it; only PIL's WebP decoder still enforces its own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from recontrast.data.decode import decoded, decoded_samples, read_upright_size
from recontrast.data.decode_budget import BUDGET
from recontrast.data.eight_bits import to_eight_bits
from recontrast.data.encoded_image import ImageSource
from recontrast.data.listing import IMAGE_SUFFIXES, PathLike, list_images
from recontrast.data.masks import MaskNotes, is_compressed_with_loss, to_mask_levels
from recontrast.data.resize import Size, crop_centre, parse_size, resize, to_rgb_array
from recontrast.data.samples import read_stored, to_full_scale
from recontrast.data.window import Window, apply_window, parse_window

if TYPE_CHECKING:
    from recontrast.data.normalise import normalise

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "fit_picture",
    "fit_samples",
    "image_size",
    "list_images",
    "normalise",
    "parse_size",
    "read_image",
    "read_mask",
    "read_pair",
    "reserve_memory",
]

MAX_PIXELS = 512_000_000
"""Largest number of pixels of an image, 1.5 GB as RGB; a header that states more is damaged or malicious."""


def __getattr__(name: str) -> Any:
    """Import `normalise`, which needs PyTorch, when it is used: an exported detector runs without."""
    if name == "normalise":
        from recontrast.data.normalise import normalise

        return normalise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_FULL_SIZE_BYTES = 12  # of a pixel: the decoded image, its RGB copy and what a caller derives from it


def read_image(
    path: ImageSource, *, size: Size | None = None, crop: Size | None = None, bits: int | None = None,
    window: Window = None,
) -> np.ndarray:  # fmt: skip
    """Decode an image file.

    Args:
        path: Image file, or its content as a `recontrast.data.encoded_image.EncodedImage`.
        size: Size after resizing, in pixels: (height, width), or one number for a square. The aspect ratio is not
            kept, as upstream. None keeps the size.
        crop: Size of the centre crop after resizing, in pixels. None keeps the whole image.
        bits: Bits that the camera uses of 16-bit samples, from 8 to 16; larger samples become white. None is 16. Files
            with fewer than 16 bits are scaled by their own.
        window: Lowest and highest value of images of more than 8 bits, integers or floats, that become 0 and 1; values
            outside are clipped. The image is then resized in float32, and no level is lost. None: 8 bits.

    Returns:
        (H, W, 3), RGB: uint8, or float32 in [0, 1] with a window.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not a complete image of these formats, has more than `MAX_PIXELS` pixels, samples of
            unknown scale, or with a window of 8 bits or not finite, or if ``size``, ``crop`` or ``window`` is invalid.
    """
    if (limits := parse_window(window)) is not None:
        with decoded_samples(path, MAX_PIXELS) as samples:
            return fit_samples(samples, limits, size=size, crop=crop, name=path)
    with decoded(path, MAX_PIXELS, to_full_scale(bits)) as picture:
        return fit_picture(picture, size=size, crop=crop, bits=bits, name=path)


def fit_picture(
    picture: Image.Image,
    *,
    size: Size | None = None,
    crop: Size | None = None,
    bits: int | None = None,
    window: Window = None,
    name: ImageSource = "image",
) -> np.ndarray:
    """Convert a decoded image to the pixels that `read_image` returns for its file.

    Args:
        picture: PIL image of any mode, with its EXIF orientation applied.
        size: Size after resizing, as in `read_image`.
        crop: Size of the centre crop, as in `read_image`.
        bits: Bits that the camera uses of 16-bit samples, as in `read_image`.
        window: Values that become 0 and 1, as in `read_image`.
        name: Name of the image in error messages.

    Returns:
        (H, W, 3), RGB: uint8, or float32 in [0, 1] with a window.

    Raises:
        ValueError: If the samples have no known scale, or with a window 8 bits, or if ``size``, ``crop`` or ``window``
            is invalid.
    """
    if (limits := parse_window(window)) is not None:
        return fit_samples(read_stored(name, picture), limits, size=size, crop=crop, name=name)
    return to_rgb_array(crop_centre(name, resize(to_eight_bits(name, picture, bits), size), crop))


def fit_samples(
    samples: np.ndarray,
    window: tuple[float, float],
    *,
    size: Size | None = None,
    crop: Size | None = None,
    name: ImageSource = "image",
) -> np.ndarray:
    """Convert the samples of an image to the pixels that `read_image` returns for its file with a window.

    Args:
        samples: (H, W) or (H, W, 3), integers of more than 8 bits or floats.
        window: Values that become 0 and 1.
        size: Size after resizing, as in `read_image`.
        crop: Size of the centre crop, as in `read_image`.
        name: Name of the image in error messages.

    Returns:
        (H, W, 3) float32 in [0, 1], RGB.

    Raises:
        ValueError: If the samples have 8 bits or are not finite, or if ``size`` or ``crop`` is invalid.
    """
    scaled = apply_window(samples, window, name)
    planes = [scaled] if scaled.ndim == 2 else [scaled[:, :, channel] for channel in range(3)]
    for channel, plane in enumerate(planes):
        resized = np.asarray(crop_centre(name, resize(Image.fromarray(plane), size), crop))
        if channel == 0:
            pixels = np.empty((*resized.shape, 3), np.float32)
        pixels[:, :, channel:] = resized[:, :, None]  # grey: the same value in all channels
    return np.clip(pixels, 0, 1, out=pixels)  # the rounding of a weighted mean can exceed the window


@contextmanager
def reserve_memory(path: ImageSource) -> Iterator[None]:
    """Hold the memory of an image at its original size within a ``with`` block.

    Threads that keep such images after `read_image` then hold no more together than
    `recontrast.data.decode_budget.BYTES_IN_FLIGHT`, or one larger image.

    Args:
        path: Path of the image.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not an image, or has more than `MAX_PIXELS` pixels.
    """
    height, width = image_size(path)
    with BUDGET.reserve(height * width * _FULL_SIZE_BYTES):
        yield


def read_mask(
    path: PathLike,
    *,
    size: Size | None = None,
    crop: Size | None = None,
    rule: str = "any",
    image: PathLike | None = None,
    notes: MaskNotes | None = None,
) -> np.ndarray:
    """Decode a mask file; pixels that are not black are anomalous.

    Grey values pass through PIL's bilinear resize, as upstream. A mask in colour, or one whose maximum is below half of
    full scale (0/1 or class numbers), contains class labels: all its pixels other than black count as full scale.
    Traces of lossy compression, masks drawn by transparency and a background that is not black are repaired with a
    note, see `recontrast.data.masks`.

    Args:
        path: PNG, JPEG, BMP, TIFF or WebP file of any bit depth.
        size: Size after resizing, as in `read_image`.
        crop: Size of the centre crop, as in `read_image`.
        rule: Pixels that are anomalous after resizing. "any": above 0, as upstream, which grows the mask by about one
            pixel. "half": at least half of full scale.
        image: Image of the mask; its upright size must be the same. None skips the check.
        notes: Collects notes on unusual masks. None warns of the first of each kind.

    Returns:
        (H, W) bool.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If ``rule`` is unknown, the picture cannot be a mask, the mask and its image differ in size, or for
            the reasons of `read_image`.
    """
    if rule not in ("any", "half"):
        raise ValueError(f"read_mask: rule: wanted 'any' or 'half', got {rule!r}")
    with decoded(path, MAX_PIXELS) as picture:
        if image is not None:
            height, width = image_size(image)
            if (height, width) != (picture.height, picture.width):
                raise ValueError(
                    f"{path}: wanted a mask of the size of its image {image}, {height} x {width} (height x width, "
                    f"upright), got {picture.height} x {picture.width}"
                )
        full_levels = to_mask_levels(path, picture, is_compressed_with_loss(path), notes)
        levels = crop_centre(path, resize(Image.fromarray(full_levels), size), crop)
    return np.asarray(levels) >= (1 if rule == "any" else 128)  # 128 is the first level above 255 / 2


def read_pair(
    sample: Any, size: Size | None = None, crop: Size | None = None, rule: str = "any"
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the image and the mask of a `datasets.Sample`.

    Args:
        sample: Sample with the attributes ``path`` and ``mask``.
        size: Size after resizing, as in `read_image`.
        crop: Size of the centre crop, as in `read_image`.
        rule: Rule for anomalous pixels, as in `read_mask`.

    Returns:
        The image, (H, W, 3) uint8, and the mask, (H, W) bool; None for samples without a mask.

    Raises:
        OSError: If a file does not exist or cannot be opened.
        ValueError: For the reasons of `read_image` and `read_mask`.
    """
    image = read_image(sample.path, size=size, crop=crop)
    if sample.mask is None:
        return image, None
    return image, read_mask(sample.mask, size=size, crop=crop, rule=rule, image=sample.path)


def image_size(path: ImageSource) -> tuple[int, int]:
    """Read the size of an image from the header of its file.

    Args:
        path: Path of the image.

    Returns:
        Height and width in pixels, after applying the EXIF orientation.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not an image of a known format, or has more than `MAX_PIXELS` pixels.
    """
    return read_upright_size(path, MAX_PIXELS)
