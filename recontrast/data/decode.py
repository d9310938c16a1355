"""Decode image files to upright PIL images, with a pixel limit and one-sentence errors."""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import IO

from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from recontrast.data import netpbm, tiff, tiff_tags
from recontrast.data.formats import HEAD_BYTES, NAMES, detect_format
from recontrast.data.listing import PathLike
from recontrast.data.notices import warn_once
from recontrast.data.pillow_warnings import ignore_pillow_warnings
from recontrast.data.regular_file import open_regular
from recontrast.data.samples import FULL_SCALE_KEY, LARGEST_KEY, SampleError

# The plugins are called directly, because Image.open has a process-wide limit: it warns above 89 megapixels and fails
# above 179.
_PLUGINS: dict[str, Callable[[IO[bytes], str], ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "WebP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "JPEG 2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
}
_ORIENTATION_TAG = 0x0112  # in EXIF and TIFF
_TRANSPOSE_BY_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LARGEST_OF_FEWER_BITS = 16383
"""Largest sample of 14 bits: an image of 16 bits without larger samples is dark, or its camera has fewer bits."""

_JPEG_2000_HEAD = 1 << 20  # bytes before the codestream: metadata


@dataclass
class _OpenImage:
    """An image file whose header has been read.

    Attributes:
        width: Width of the stored image, in pixels.
        height: Height of the stored image, in pixels.
        orientation: Orientation of the stored image, from 1 to 8.
        load: Decodes the image and applies the orientation.
        several: Returns whether the file has further images; called after ``load``.
        bits: Bits of a sample: 16 if `decode` can scale them by another full scale, else 8.
    """

    width: int
    height: int
    orientation: int
    load: Callable[[], Image.Image]
    several: Callable[[], bool]
    bits: int = 8


def decode(path: PathLike, max_pixels: int, full: int | None = None) -> Image.Image:
    """Decode the first image of a file and apply its EXIF orientation.

    Args:
        path: File of one of `recontrast.data.formats.FORMATS`.
        max_pixels: Largest number of pixels.
        full: Sample value that becomes white in colour files of 16 bits, in which larger values become white too. None
            is 65535. Grey samples are not scaled.

    Returns:
        The image, loaded, in the mode of the file. For grey samples of other full scale than 255 or 65535, ``info``
        holds it by the key `recontrast.data.samples.FULL_SCALE_KEY`.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not a complete image of these formats, or has too many pixels or samples of unknown
            scale.
    """
    with _open(path, max_pixels, full) as image:
        with convert_decoder_errors(path):
            picture = image.load()
        _warn_of_unused_parts(path, image, picture)
        if LARGEST_KEY in picture.info:
            warn_of_range(path, picture.info[LARGEST_KEY], full)
        return picture


def apply_orientation(image: Image.Image) -> Image.Image:
    """Load ``image`` and apply its EXIF orientation; without one, return ``image`` itself.

    Raises:
        ValueError: If the image was opened from a TIFF file whose samples Pillow misreads.
    """
    _refuse_misread_samples(image)
    image.load()
    transpose = _TRANSPOSE_BY_ORIENTATION.get(_read_orientation(image))
    return image if transpose is None else image.transpose(transpose)


def read_upright_size(path: PathLike, max_pixels: int) -> tuple[int, int]:
    """Read the height and width of the image that `decode` returns, from the header of the file.

    Args:
        path: File of one of `recontrast.data.formats.FORMATS`.
        max_pixels: Largest number of pixels.

    Returns:
        Height and width after applying the EXIF orientation, in pixels.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not an image of these formats, or has too many pixels.
    """
    with _open(path, max_pixels) as image:
        turned = image.orientation in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def read_bits(path: PathLike, max_pixels: int) -> int:
    """Read the bits of the samples of an image, from the header of the file.

    Args:
        path: File of one of `recontrast.data.formats.FORMATS`.
        max_pixels: Largest number of pixels.

    Returns:
        16 if the samples have 16 bits and the camera may have used fewer; else 8.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not an image of these formats, or has too many pixels.
    """
    with _open(path, max_pixels) as image:
        return image.bits


def warn_of_range(path: PathLike, largest: int, full: int | None) -> None:
    """Warn if the samples of a 16-bit image use little of the scale, or exceed it.

    Args:
        path: Name of the image.
        largest: Its largest sample.
        full: Full scale of its detector; None is that of 16 bits.
    """
    if full is None and 0 < largest <= LARGEST_OF_FEWER_BITS:
        levels = largest // 257 + 1
        warn_once(
            "bits",
            path,
            f"has 16-bit samples of at most {largest}, which leaves {levels} of 256 grey levels: if the camera has "
            "fewer bits, say so by the recipe field bits (--set bits=12) or the argument bits",
        )
    elif full is not None and largest > full:
        text = f"has samples of up to {largest}, more than the {full} of {full.bit_length()} bits: they become white"
        warn_once("range", path, f"{text}, here and in other files")


@contextmanager
def convert_decoder_errors(path: PathLike) -> Iterator[None]:
    """Convert all exceptions of decoders (OSError, SyntaxError, struct.error and others) to ValueError.

    Args:
        path: File to name in the error message.

    Raises:
        ValueError: If the block raises an exception other than MemoryError.
    """
    try:
        with ignore_pillow_warnings():
            yield
    except MemoryError:
        raise
    except SampleError as error:
        raise ValueError(f"{path}: wanted {error.wanted}, got {error}") from None
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
        raise ValueError(f"{path}: wanted a complete image, got a file that cannot be decoded ({reason})") from error


@contextmanager
def _open(path: PathLike, max_pixels: int, full: int | None = None) -> Iterator[_OpenImage]:
    """Open an image file, read its header and check the number of pixels."""
    with open_regular(path, "an image") as file:
        head = file.read(HEAD_BYTES)
        image_format = detect_format(head)
        if image_format is None:
            got = f"a file that starts with {head[:8]!r}" if head else "an empty file"
            raise ValueError(f"{path}: wanted a {NAMES} image, got {got}")
        file.seek(0)
        with convert_decoder_errors(path):
            image = _read_header(file, image_format, full)
        if image.width * image.height > max_pixels:
            raise ValueError(
                f"{path}: wanted at most {max_pixels} pixels (recontrast.data.images.MAX_PIXELS), "
                f"got {image.width} x {image.height} = {image.width * image.height}"
            )
        yield image


def _warn_of_unused_parts(path: PathLike, image: _OpenImage, picture: Image.Image) -> None:
    """Warn of further images in the file, and of EXIF data that cannot be read."""
    several = False
    with suppress(Exception):  # a damaged second image does not affect the first
        with ignore_pillow_warnings():
            several = image.several()
    if several:
        warn_once("pages", path, "has several images: the first one is used, here and in other files")
    exif = picture.info.get("exif")
    if isinstance(exif, bytes) and not _is_readable_exif(exif):
        warn_once("exif", path, "has damaged EXIF data: an orientation in it may be ignored, here and in other files")


def _is_readable_exif(exif: bytes) -> bool:
    """Return whether the first directory of EXIF data is complete."""
    try:
        tiff_tags.read_tags(BytesIO(exif.removeprefix(b"Exif\0\0")))
    except (ValueError, struct.error):
        return False
    return True


def _read_header(file: IO[bytes], image_format: str, full: int | None) -> _OpenImage:
    """Read the header of a file, and choose its decoder."""
    if image_format == "Netpbm":
        header = netpbm.read_header(file)
        read = partial(netpbm.read_picture, file, header, full)
        return _OpenImage(header.width, header.height, 1, read, bool, 16 if header.full == 65535 else 8)
    if image_format == "TIFF":
        page = tiff_tags.read_tags(file)
        file.seek(0)
        if page.needs_own_reader:
            tiff.check_layout(page)
            load: Callable[[], Image.Image] = partial(_load_unusual_tiff, file, page, full)
        else:
            load = partial(_load, TiffImagePlugin.TiffImageFile(file, ""))
        several = partial(bool, page.pages > 1)
        return _OpenImage(page.width, page.height, page.orientation, load, several, 16 if page.bits[0] == 16 else 8)
    scale = _read_jpeg_2000_scale(file) if image_format == "JPEG 2000" else None
    # Without a file name, PIL does not memory-map the file, which could be truncated later.
    image = _PLUGINS[image_format](file, "")
    load = partial(_load, image, scale, full)
    several = partial(_is_animated, image)
    bits = 16 if image.mode.startswith("I") and scale in (None, 65535) else 8
    return _OpenImage(*image.size, _read_orientation(image), load, several, bits)


def _load(image: ImageFile.ImageFile, scale: int | None = None, full: int | None = None) -> Image.Image:
    """Decode an image by Pillow.

    Args:
        image: Image whose header has been read.
        scale: Full scale of its grey samples, if it is not that of the mode.
        full: Sample value that should become white in colour files of 16 bits.
    """
    deep_colour = any(";16" in str(tile[3]) for tile in image.tile) and not image.mode.startswith("I")
    if deep_colour and full is not None:
        raise SampleError("16-bit colour in PNG, of which only the high bytes can be read: use grey or TIFF")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # load() enforces PIL's pixel limit, but only if it allocates the memory itself
        image.im = Image.new(image.mode, getattr(image, "_tile_size", image.size)).im
    image.load()
    if deep_colour:
        image.info[LARGEST_KEY] = max(high for _, high in image.getextrema()) << 8 | 255  # type: ignore[misc]
    return _turn(image, _read_orientation(image), scale)


def _is_animated(image: Image.Image) -> bool:
    """Return whether an image opened by Pillow has several frames."""
    return bool(getattr(image, "is_animated", False))


def _load_unusual_tiff(file: IO[bytes], page: tiff_tags.TiffPage, full: int | None) -> Image.Image:
    """Decode a TIFF page by our own reader."""
    picture = tiff.read_page(file, page, full)
    return _turn(picture, page.orientation, picture.info.get(FULL_SCALE_KEY))


def _turn(image: Image.Image, orientation: int, scale: int | None) -> Image.Image:
    """Apply an orientation, and note the full scale of the samples."""
    transpose = _TRANSPOSE_BY_ORIENTATION.get(orientation)
    if transpose is not None:
        image = image.transpose(transpose)
    if scale is not None:
        image.info[FULL_SCALE_KEY] = scale
    return image


def _read_jpeg_2000_scale(file: IO[bytes]) -> int | None:
    """Return the full scale of grey samples of more than 8 bits, which Pillow shifts to 16 bits; None for 8 bits."""
    head = file.read(_JPEG_2000_HEAD)
    file.seek(0)
    start = head.find(b"\xff\x4f\xff\x51")
    count = int.from_bytes(head[start + 40 : start + 42], "big")
    samples = head[start + 42 : start + 42 + 3 * count : 3]
    if start < 0 or not samples:
        raise ValueError("no codestream")
    bits = samples[0] % 128 + 1
    if samples[0] >= 128 or not 8 <= bits <= 16 or set(samples) != {samples[0]}:
        sign = "signed " if samples[0] >= 128 else ""
        raise SampleError(f"{sign}samples of {', '.join(str(v % 128 + 1) for v in samples)} bits in JPEG 2000")
    return None if bits == 8 else ((1 << bits) - 1) << (16 - bits)


def _read_orientation(image: Image.Image) -> int:
    """Read the EXIF orientation, from 1 to 8; return 1 if there is none."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF data does not affect the pixels
        return 1


def _refuse_misread_samples(image: Image.Image) -> None:
    """Raise ValueError if a caller opened a TIFF file by Pillow whose samples it misreads."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    tags = image.tag_v2
    formats, bits = tags.get(339, (1,)), tags.get(258, (1,))
    signed = set(formats) != {1} and not (set(formats) == {2} and tuple(bits) == (32,))
    planes = tags.get(284, 1) == 2 and len(bits) > 1 and max(bits) > 8
    if signed or planes:
        got = "signed or floating-point samples" if signed else "planes of 16-bit colour, which Pillow misreads"
        name = os.fsdecode(image.filename) or "image"
        raise ValueError(f"{name}: wanted {SampleError('').wanted}, got {got}: pass its path")
