"""Decode images to RGB uint8 and masks to bool, and convert batches to network input.

The pixels are bit-identical to those of the reference pipeline (torchvision's ``Resize``, ``CenterCrop``, ``ToTensor``
and ``Normalize`` on PIL images, as in ``get_data_transforms``). Upstream depends on details of PIL. Here, the
same picture gives the same array in every file format:

* PNG, JPEG, BMP, TIFF and WebP are read; of a file with several images, the first. The content decides, not the suffix.
* Grey, palette, 1-bit, CMYK and other modes become RGB. Transparency is dropped, not composited.
* 16-bit grey is divided by 257 and rounded (PIL's own conversion clips at 255). Of 16-bit colour, and of 16-bit grey
  with alpha, Pillow only returns the high byte, which differs from the rounded value by at most one level.
* Float samples and integers beyond 16 bits have no known scale and raise an error.
* The EXIF orientation is applied; masks use their own EXIF data.
* `MAX_PIXELS` replaces PIL's pixel limit, without changing it; only PIL's WebP decoder still enforces its own.
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
"""Largest number of pixels of an image, 1.5 GB as RGB; a header that states more is damaged or malicious."""

_STRIP_PIXELS = 1 << 22  # pixels copied at a time

Size = int | Sequence[int]  # (height, width), or one number for a square


def read_image(path: PathLike, *, size: Size | None = None, crop: Size | None = None) -> np.ndarray:
    """Decode an image file.

    Args:
        path: PNG, JPEG, BMP, TIFF or WebP file.
        size: Size after resizing, in pixels: (height, width), or one number for a square. The aspect ratio is not
            kept, as upstream. None keeps the size.
        crop: Size of the centre crop after resizing, in pixels. None keeps the whole image.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not a complete image of these formats, has more than `MAX_PIXELS` pixels or samples
            of unknown scale, or if ``size`` or ``crop`` is invalid.
    """
    return fit_picture(decode(path, MAX_PIXELS), size=size, crop=crop, name=path)


def fit_picture(
    picture: Image.Image, *, size: Size | None = None, crop: Size | None = None, name: PathLike = "image"
) -> np.ndarray:
    """Convert a decoded image to the pixels that `read_image` returns for its file.

    Args:
        picture: PIL image of any mode, with its EXIF orientation applied.
        size: Size after resizing, as in `read_image`.
        crop: Size of the centre crop, as in `read_image`.
        name: Name of the image in error messages.

    Returns:
        (H, W, 3) uint8, RGB.

    Raises:
        ValueError: If the samples have no known scale, or if ``size`` or ``crop`` is invalid.
    """
    return _to_rgb_array(_crop_centre(name, _resize(_to_eight_bits(name, picture), size), crop))


def read_mask(
    path: PathLike,
    *,
    size: Size | None = None,
    crop: Size | None = None,
    rule: str = "any",
    image: PathLike | None = None,
) -> np.ndarray:
    """Decode a mask file; pixels that are not black are anomalous.

    Grey values pass through PIL's bilinear resize, as upstream. A mask in colour, or one whose maximum is below half of
    full scale (0/1 or class numbers), contains class labels: all its pixels other than black count as full scale.

    Args:
        path: PNG, JPEG, BMP, TIFF or WebP file of any bit depth.
        size: Size after resizing, as in `read_image`.
        crop: Size of the centre crop, as in `read_image`.
        rule: Pixels that are anomalous after resizing. "any": above 0, as upstream, which grows the mask by about one
            pixel. "half": at least half of full scale.
        image: Image of the mask; its upright size must be the same. None skips the check.

    Returns:
        (H, W) bool.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If ``rule`` is unknown, the mask and its image differ in size, or for the reasons of `read_image`.
    """
    if rule not in ("any", "half"):
        raise ValueError(f"read_mask: rule must be 'any' or 'half', got {rule!r}")
    decoded = decode(path, MAX_PIXELS)
    if image is not None:
        height, width = image_size(image)
        if (height, width) != (decoded.height, decoded.width):
            raise ValueError(
                f"{path}: wanted a mask of the size of its image {image}, {height} x {width} (height x width, "
                f"upright), got {decoded.height} x {decoded.width}"
            )
    levels = _crop_centre(path, _resize(Image.fromarray(_mask_levels(path, decoded)), size), crop)
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


def image_size(path: PathLike) -> tuple[int, int]:
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


def normalise(
    batch: torch.Tensor | np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> torch.Tensor:
    """Normalise a batch of images: (x / 255 - mean) / std, bit-identical to torchvision's ToTensor and Normalize.

    Args:
        batch: Images, (N, H, W, 3) uint8.
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel, in [0, 1].
        device: Device of the result; the uint8 batch is moved there first. None keeps the device of the batch.
        dtype: Dtype of the result; the computation is in float32.
        channels_last: Whether the result is in channels-last memory format, which needs no reordering.

    Returns:
        (N, 3, H, W), in ``dtype``.

    Raises:
        ValueError: If ``batch`` has another shape or dtype.
    """
    if isinstance(batch, np.ndarray):
        batch = torch.from_numpy(np.require(batch, requirements=["C", "W"]))
    if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[3] != 3:
        raise ValueError(f"normalise: batch must be uint8 (N, H, W, 3), got {batch.dtype} {tuple(batch.shape)}")
    n, height, width, _ = batch.shape
    rows = batch.to(device or batch.device).to(torch.float32, memory_format=torch.contiguous_format)
    full, centre, scale = _build_normalisation(tuple(mean), tuple(std), width, rows.device)
    rows = rows.view(n * height, width * 3).div_(full).sub_(centre).div_(scale)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return rows.view(n, height, width, 3).permute(0, 3, 1, 2).to(dtype, memory_format=layout)


@lru_cache(maxsize=16)  # copying them to the device for each batch would block
def _build_normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Return 255, mean and std repeated for each value of a row of pixels, each (width * 3,) float32.

    Broadcasting over whole rows is faster than broadcasting (3, 1, 1) over channels-last pixels. 255 is a tensor too,
    because CUDA replaces division by a Python number by multiplication, which rounds differently.
    """
    with torch.inference_mode(False):  # the cached tensors must also work in training
        return tuple(torch.tensor(v, device=device).repeat(width) for v in ((255.0,) * 3, mean, std))


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
        raise ValueError(f"{name} must be a positive number of pixels or two of them, (height, width), got {value!r}")
    return int(pair[0]), int(pair[1])


def _read_deep(path: PathLike, image: Image.Image) -> tuple[np.ndarray, int] | None:
    """Return the values and the full scale of an image with more than 8 bits; None for other images."""
    if image.mode == "F":
        raise ValueError(f"{path}: wanted integer samples of 8 or 16 bits, got floats, whose scale is unknown")
    if not image.mode.startswith("I"):
        return None
    tags = getattr(image, "tag_v2", {})  # only TIFF images have tags
    full = 4095 if image.mode != "I" and tags.get(258) == (12,) else 65535
    values = np.asarray(image).astype(np.int32)
    return (full - values if image.mode != "I" and tags.get(262) == 0 else values), full  # tag 262, value 0: white is 0


def _to_eight_bits(path: PathLike, image: Image.Image) -> Image.Image:
    """Convert an image to mode L or RGB."""
    deep = _read_deep(path, image)
    if deep is not None:
        values, full = deep
        if values.min() < 0 or values.max() > full:
            raise ValueError(f"{path}: wanted samples from 0 to {full} (16 bits), got {values.min()} to {values.max()}")
        return Image.fromarray(((values * 255 + full // 2) // full).astype(np.uint8))  # (v + 128) // 257 for 16 bits
    with convert_decoder_errors(path):
        if "transparency" in image.info:  # PIL would warn, or replace the transparent colour
            image = image.copy()  # the image can belong to the caller
            del image.info["transparency"]
        if image.mode == "La":
            image = image.convert("LA")
        mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
        return image if image.mode == mode else image.convert(mode)  # convert() always copies


def _mask_levels(path: PathLike, image: Image.Image) -> np.ndarray:
    """Return a mask as (H, W) uint8, from 0 (normal) to 255 (anomalous)."""
    values, full = _read_deep(path, image) or (np.asarray(_to_eight_bits(path, image)), 255)
    coloured = False
    if values.ndim == 3:
        coloured = bool((values != values[:, :, :1]).any())
        values = values.max(axis=2)
    low, high = int(values.min()), int(values.max())
    if coloured or 2 * high < full or high > full or low < 0:
        return np.where(values != 0, np.uint8(255), np.uint8(0))
    if full == 255:
        return values
    return np.maximum((values * 255 + full // 2) // full, values != 0).astype(np.uint8)  # anomalous pixels stay above 0


def _resize(image: Image.Image, size: Size | None) -> Image.Image:
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


def _crop_centre(path: PathLike, image: Image.Image, crop: Size | None) -> Image.Image:
    """Cut out the centre; margins are rounded half to even, as in torchvision."""
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
    """Cut out a part of an image of mode L or RGB. Image.crop would enforce PIL's pixel limit."""
    return image.resize((width, height), Image.Resampling.NEAREST, box=(left, top, left + width, top + height))


def _to_rgb_array(image: Image.Image) -> np.ndarray:
    """Convert an image of mode L or RGB to (H, W, 3) uint8, in strips: np.asarray would need twice the memory."""
    pixels = allocate_pixels((image.height, image.width, 3))
    step = max(_STRIP_PIXELS // image.width, 1)
    for top in range(0, image.height, step):
        strip = np.asarray(_cut(image, 0, top, image.width, min(step, image.height - top)))
        pixels[top : top + step] = strip if strip.ndim == 3 else strip[:, :, None]  # grey: same value in all channels
    return pixels
