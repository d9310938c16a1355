"""Any image file to RGB uint8, its mask to bool, and a batch of them to the network's input.

The pixels are those of the reference pipeline (torchvision's ``Resize``, ``CenterCrop``, ``ToTensor``, ``Normalize`` on
PIL images, as in upstream's ``get_data_transforms``), to the bit. Where upstream takes what PIL happens to do, one
picture gives one array here, whatever file it is stored in:

* PNG, JPEG, BMP, TIFF, WebP; the first picture of a file that holds several. The content decides, not the suffix.
* grey, palette, 1-bit, CMYK and the like become RGB; transparency is dropped, not composited.
* 16-bit grey is divided by 257 and rounded (PIL's own conversion clips at 255). 16-bit colour, and grey with alpha, is
  cut to its high byte by Pillow before anything can be done about it: at most one level from the rounded value.
* float samples, and integers beyond 16 bits, have no known scale: an error.
* the EXIF orientation is applied, to masks by their own EXIF.
* `MAX_PIXELS` replaces PIL's pixel limit; PIL's own is not changed, and only its WebP decoder still obeys it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from recontrast.data.decode import convert_decoder_errors, decode, read_upright_size
from recontrast.data.listing import IMAGE_SUFFIXES, PathLike, list_images
from recontrast.data.memory import allocate_pixels

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "fit_picture",
    "image_size",
    "list_images",
    "normalise",
    "read_image",
    "read_mask",
    "read_pair",
]

MAX_PIXELS = 512_000_000
"""Most pixels of an image, 1.5 GB as RGB: a larger header is damage or an attack before it is a photograph."""

_STRIP = 1 << 22  # pixels copied at once

Size = int | Sequence[int]


def read_image(path: PathLike, *, size: Size | None = None, crop: Size | None = None) -> np.ndarray:
    """Decode an image file.

    Args:
        path: PNG, JPEG, BMP, TIFF or WebP.
        size: pixels, (h, w), or one number for a square; the aspect is not kept, as upstream. None keeps the size.
        crop: pixels of the centre crop after it, (h, w) or one number. None keeps all.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        ValueError: no whole image of these kinds, more than `MAX_PIXELS`, samples without a known scale, or a size or
            crop that is none.
    """
    return fit_picture(decode(path, MAX_PIXELS), size=size, crop=crop, name=path)


def fit_picture(
    picture: Image.Image, *, size: Size | None = None, crop: Size | None = None, name: PathLike = "image"
) -> np.ndarray:
    """What `read_image` makes of a decoded picture: the same pixels as of the file that it was opened from.

    Args:
        picture: of any mode; turned upright already (`decode.upright`).
        size: as in `read_image`.
        crop: as in `read_image`.
        name: begins the sentence of an error.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        ValueError: samples without a known scale, or a size or crop that is none.
    """
    return _rgb(_centre(name, _resize(_eight_bits(name, picture), size), crop))


def read_mask(
    path: PathLike,
    *,
    size: Size | None = None,
    crop: Size | None = None,
    rule: str = "any",
    image: PathLike | None = None,
) -> np.ndarray:
    """Decode a mask file; anomalous is what is not black.

    Grey values are kept through PIL's bilinear resize, as upstream. A mask with colours, or one that nowhere reaches
    half of its full scale (0/1, class numbers), holds classes: there, every pixel that is not black counts as full.

    Args:
        path: PNG, JPEG, BMP, TIFF or WebP, of any depth.
        size: as in `read_image`.
        crop: as in `read_image`.
        rule: "any" (greater than 0 after the resize: upstream, grows the mask by about a pixel) or "half" (at least
            half of full scale).
        image: the mask's image, whose upright size it must have. None checks nothing.

    Returns:
        (H, W) bool.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        ValueError: as in `read_image`; another rule; or another size than the image's.
    """
    if rule not in ("any", "half"):
        raise ValueError(f"read_mask: rule must be 'any' or 'half', got {rule!r}")
    decoded = decode(path, MAX_PIXELS)
    if image is not None:
        wanted = image_size(image)
        if wanted != (decoded.height, decoded.width):
            raise ValueError(
                f"{path}: wanted a mask of the size of its image {image}, {wanted[0]} x {wanted[1]} (height x width, "
                f"upright), got {decoded.height} x {decoded.width}"
            )
    levels = _centre(path, _resize(Image.fromarray(_mask_levels(path, decoded)), size), crop)
    return np.asarray(levels) >= (1 if rule == "any" else 128)  # 128: the first level above 255 / 2


def read_pair(
    sample: Any, size: Size | None = None, crop: Size | None = None, rule: str = "any"
) -> tuple[np.ndarray, np.ndarray | None]:
    """Read the image and the mask of a `datasets.Sample`.

    Args:
        sample: has `path` and `mask` (None where there is none).
        size: as in `read_image`.
        crop: as in `read_image`.
        rule: as in `read_mask`.

    Returns:
        Image (H, W, 3) uint8, and mask (H, W) bool or None.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        ValueError: as in `read_image` and `read_mask`.
    """
    image = read_image(sample.path, size=size, crop=crop)
    if sample.mask is None:
        return image, None
    return image, read_mask(sample.mask, size=size, crop=crop, rule=rule, image=sample.path)


def image_size(path: PathLike) -> tuple[int, int]:
    """The upright height and width of the image at ``path``, in pixels, from the file's header.

    Raises:
        OSError: there is no such file, or it cannot be opened.
        ValueError: no image of these kinds, or more than `MAX_PIXELS`.
    """
    return read_upright_size(path, MAX_PIXELS)


def normalise(
    batch: torch.Tensor | np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> torch.Tensor:
    """Bytes to network input, (x / 255 - mean) / std, with the roundings of torchvision's ToTensor and Normalize.

    Args:
        batch: (N, H, W, 3) uint8.
        mean: of the three channels, in [0, 1].
        std: of the three channels, in [0, 1].
        device: where to compute; the bytes are moved, not the floats. None stays.
        dtype: of the result; computed in float32.
        channels_last: memory layout of the result; True needs no reordering.

    Returns:
        (N, 3, H, W), in ``dtype``.

    Raises:
        ValueError: a batch of another shape or dtype.
    """
    if isinstance(batch, np.ndarray):
        batch = torch.from_numpy(np.require(batch, requirements=["C", "W"]))
    if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[3] != 3:
        raise ValueError(f"normalise: batch must be uint8 (N, H, W, 3), got {batch.dtype} {tuple(batch.shape)}")
    n, height, width, _ = batch.shape
    rows = batch.to(device or batch.device).to(torch.float32, memory_format=torch.contiguous_format)
    full, centre, scale = _statistics(tuple(mean), tuple(std), width, rows.device)
    rows = rows.view(n * height, width * 3).div_(full).sub_(centre).div_(scale)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return rows.view(n, height, width, 3).permute(0, 3, 1, 2).to(dtype, memory_format=layout)


@lru_cache(maxsize=16)  # to send them anew for each batch would wait for the device
def _statistics(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """255, mean and std for each number of a row of pixels, (width * 3,) float32.

    Rows with repeated statistics run in long loops, (3, 1, 1) over channels_last does not. All are tensors on the
    device: CUDA turns a division by a Python number into a product, which rounds otherwise.
    """
    with torch.inference_mode(False):  # whoever asks first
        return tuple(torch.tensor(v, device=device).repeat(width) for v in ((255.0,) * 3, mean, std))


def parse_size(value: Size, name: str) -> tuple[int, int]:
    """A size in pixels as (h, w), checked.

    Args:
        value: a whole number above 0, or two of them.
        name: begins the sentence of an error.

    Returns:
        Height and width.

    Raises:
        ValueError: it is none.
    """
    pair = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(pair) != 2 or not all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) and v > 0 for v in pair):
        raise ValueError(f"{name} must be a positive number of pixels or two of them, (height, width), got {value!r}")
    return int(pair[0]), int(pair[1])


def _deep(path: PathLike, image: Image.Image) -> tuple[np.ndarray, int] | None:
    """Values and full scale of an image of more than 8 bits; None of any other."""
    if image.mode == "F":
        raise ValueError(f"{path}: wanted integer samples of 8 or 16 bits, got floats, whose scale is unknown")
    if not image.mode.startswith("I"):
        return None
    tags = getattr(image, "tag_v2", {})  # of TIFF, gone after a transposition by EXIF of other formats
    full = 4095 if image.mode != "I" and tags.get(258) == (12,) else 65535
    values = np.asarray(image).astype(np.int32)
    return (full - values if image.mode != "I" and tags.get(262) == 0 else values), full  # 262: 0 is white


def _eight_bits(path: PathLike, image: Image.Image) -> Image.Image:
    """Image of mode L or RGB."""
    deep = _deep(path, image)
    if deep is not None:
        values, full = deep
        if values.min() < 0 or values.max() > full:
            raise ValueError(f"{path}: wanted samples from 0 to {full} (16 bits), got {values.min()} to {values.max()}")
        return Image.fromarray(((values * 255 + full // 2) // full).astype(np.uint8))  # (v + 128) // 257 for 16 bits
    with convert_decoder_errors(path):
        if "transparency" in image.info:  # PIL warns, or looks for a replacement colour, where one is set
            image = image.copy()  # it may be the caller's
            del image.info["transparency"]
        if image.mode == "La":
            image = image.convert("LA")
        mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
        return image if image.mode == mode else image.convert(mode)  # PIL would copy


def _mask_levels(path: PathLike, image: Image.Image) -> np.ndarray:
    """(H, W) uint8, 0 normal to 255 anomalous."""
    values, full = _deep(path, image) or (np.asarray(_eight_bits(path, image)), 255)
    coloured = False
    if values.ndim == 3:
        coloured = bool((values != values[:, :, :1]).any())
        values = values.max(axis=2)
    low, high = int(values.min()), int(values.max())
    if coloured or 2 * high < full or high > full or low < 0:
        return np.where(values != 0, np.uint8(255), np.uint8(0))
    if full == 255:
        return values
    return np.maximum((values * 255 + full // 2) // full, values != 0).astype(np.uint8)  # nothing is rounded away


def _resize(image: Image.Image, size: Size | None) -> Image.Image:
    """Antialiased bilinear resize, as torchvision's Resize on a PIL image.

    First across, then down, each rounded to 8 bits, as Pillow has it before version 13; from then on it begins with the
    height where an image loses more of that, and a fifth of the pixels of a tall image differ by one level. Scores and
    thresholds must not depend on Pillow's version, so the passes are asked for one by one.
    """
    if size is None:
        return image
    height, width = parse_size(size, "size")
    across = image.resize((width, image.height), Image.Resampling.BILINEAR)
    return across.resize((width, height), Image.Resampling.BILINEAR)


def _centre(path: PathLike, image: Image.Image, crop: Size | None) -> Image.Image:
    """Centre crop with torchvision's rounding (half to even) of the margins."""
    if crop is None:
        return image
    height, width = parse_size(crop, "crop")
    if height > image.height or width > image.width:
        raise ValueError(
            f"{path}: crop must fit into the image, wanted {height} x {width} of {image.height} x {image.width}"
        )
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return _cut(image, left, top, width, height)


def _cut(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    """A part of an image of mode L or RGB, pixel for pixel; PIL's own crop holds it against PIL's limit."""
    return image.resize((width, height), Image.Resampling.NEAREST, box=(left, top, left + width, top + height))


def _rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of an image of mode L or RGB; strip by strip, as PIL's own way takes twice the memory."""
    pixels = allocate_pixels((image.height, image.width, 3))
    step = max(_STRIP // image.width, 1)
    for top in range(0, image.height, step):
        strip = np.asarray(_cut(image, 0, top, image.width, min(step, image.height - top)))
        pixels[top : top + step] = strip if strip.ndim == 3 else strip[:, :, None]  # grey: thrice the same
    return pixels
