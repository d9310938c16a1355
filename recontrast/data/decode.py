"""Decode image files to upright PIL images, with a pixel limit and one-sentence errors."""

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BytesIO
from typing import IO, Any

from numpy.typing import NDArray
from PIL import (
    Image,
    TiffImagePlugin,
)

from recontrast.data import tiff_tags
from recontrast.data.decode_budget import BUDGET
from recontrast.data.encoded_image import (
    EncodedImage,
    ImagePage,
    ImageSource,
    SeveralImagesError,
    TooManyPixelsError,
)
from recontrast.data.formats import HEAD_BYTES, NAMES, detect_format
from recontrast.data.memory import trim_memory
from recontrast.data.notices import warn_once
from recontrast.data.open_image import OpenImage, read_header, read_orientation, turn_upright
from recontrast.data.pillow_warnings import ignore_pillow_warnings
from recontrast.data.regular_file import open_regular
from recontrast.data.samples import LARGEST_KEY, WINDOW_KEY, SampleError

_TRIM_BYTES = 1 << 27  # the allocator keeps the memory of a smaller image for the next one of the thread

LARGEST_OF_FEWER_BITS = 16383
"""Largest sample of 14 bits: an image of 16 bits without larger samples is dark, or its camera has fewer bits."""


@contextmanager
def decoded(path: ImageSource, max_pixels: int, full: int | None = None) -> Iterator[Image.Image]:
    """Decode the first image of a file and apply its EXIF orientation.

    Within the ``with`` block, the memory of the image counts towards `recontrast.data.decode_budget.BUDGET`. The image
    is closed at its end.

    Args:
        path: File of one of `recontrast.data.formats.FORMATS`, or its content as an `EncodedImage`.
        max_pixels: Largest number of pixels.
        full: Sample value that becomes white in colour files of 16 bits, in which larger values become white too. None
            is 65535. Grey samples are not scaled.

    Yields:
        The image, loaded, in the mode of the file. For grey samples of other full scale than 255 or 65535, ``info``
        holds it by the key `recontrast.data.samples.FULL_SCALE_KEY`.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not a complete image of these formats, or has too many pixels or samples of unknown
            scale.
    """
    with _load(path, max_pixels, full) as (picture, size):
        try:
            yield picture
        finally:
            picture.close()
            if size >= _TRIM_BYTES:
                trim_memory()


@contextmanager
def decoded_samples(path: ImageSource, max_pixels: int) -> Iterator[NDArray[Any]]:
    """Decode the first image of a file as it is stored, and apply its orientation: for a window, of any scale.

    Within the ``with`` block, the memory of the image counts towards `recontrast.data.decode_budget.BUDGET`.

    Args:
        path: File of one of `recontrast.data.formats.FORMATS`, or its content as an `EncodedImage`.
        max_pixels: Largest number of pixels.

    Yields:
        (H, W) for grey, (H, W, 3) for RGB: integers or floats; uint8 for any image of 8 bits, which has no window.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not a complete image of these formats, or has too many pixels.
    """
    with ExitStack() as stack:
        with _open(path, max_pixels, any_scale=True) as image:
            size = image.width * image.height * image.pixel_bytes
            stack.enter_context(BUDGET.reserve(size))
            with convert_decoder_errors(path):
                samples = image.read_samples()
            _warn_of_unused_parts(path, image, None)
        yield samples
        del samples
        if size >= _TRIM_BYTES:
            trim_memory()


def decode(path: ImageSource, max_pixels: int, full: int | None = None) -> Image.Image:
    """Decode the first image of a file and apply its EXIF orientation.

    Args:
        path: File of one of `recontrast.data.formats.FORMATS`, or its content as an `EncodedImage`.
        max_pixels: Largest number of pixels.
        full: Full scale of colour files of 16 bits, see `decoded`.

    Returns:
        The image, as in `decoded`.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not a complete image, see `decoded`.
    """
    with _load(path, max_pixels, full) as (picture, _):
        return picture


def apply_orientation(image: Image.Image) -> Image.Image:
    """Load ``image`` and apply its EXIF orientation; without one, return ``image`` itself.

    Raises:
        ValueError: If the image was opened from a TIFF file whose samples Pillow misreads.
    """
    _refuse_misread_samples(image)
    image.load()
    return turn_upright(image, read_orientation(image), None)


def read_upright_size(path: ImageSource, max_pixels: int) -> tuple[int, int]:
    """Read the height and width of the image that `decode` returns, from the header of the file.

    Args:
        path: File of one of `recontrast.data.formats.FORMATS`, or its content as an `EncodedImage`.
        max_pixels: Largest number of pixels.

    Returns:
        Height and width after applying the EXIF orientation, in pixels.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not an image of these formats, or has too many pixels.
    """
    with _open(path, max_pixels, any_scale=True) as image:
        with ignore_pillow_warnings():
            turned = image.read_orientation() in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def read_bits(path: ImageSource, max_pixels: int) -> int:
    """Read the bits of the samples of an image, from the header of the file.

    Args:
        path: File of one of `recontrast.data.formats.FORMATS`, or its content as an `EncodedImage`.
        max_pixels: Largest number of pixels.

    Returns:
        16 if the samples have 16 bits and the camera may have used fewer; else 8.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not an image of these formats, or has too many pixels.
    """
    with _open(path, max_pixels) as image:
        return image.bits


def warn_of_range(path: ImageSource, largest: int, full: int | None) -> None:
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
def convert_decoder_errors(path: ImageSource) -> Iterator[None]:
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
def _load(path: ImageSource, max_pixels: int, full: int | None) -> Iterator[tuple[Image.Image, int]]:
    """Decode an image; yield it and the bytes of the budget that the block holds."""
    with ExitStack() as stack:
        with _open(path, max_pixels, full) as image:
            size = image.width * image.height * image.pixel_bytes
            stack.enter_context(BUDGET.reserve(size))
            with convert_decoder_errors(path):
                picture = image.load()
            _warn_of_unused_parts(path, image, picture)
        if LARGEST_KEY in picture.info:
            warn_of_range(path, picture.info[LARGEST_KEY], full)
        if WINDOW_KEY in picture.info:
            low, high = picture.info[WINDOW_KEY]
            text = f"is scaled to 8 bits by the window in the file, {low:g} to {high:g}, as others are by theirs"
            warn_once("window", path, f"{text}: --window in training fixes one for all")
        yield picture, size


@contextmanager
def _open(
    path: ImageSource, max_pixels: int, full: int | None = None, *, any_scale: bool = False
) -> Iterator[OpenImage]:
    """Open an image file, read its header and check the number of pixels."""
    with _open_source(path) as file:
        head = file.read(HEAD_BYTES)
        image_format = detect_format(head)
        if image_format is None:
            got = f"a file that starts with {head[:8]!r}" if head else "an empty file"
            raise ValueError(f"{path}: wanted a {NAMES} image, got {got}")
        file.seek(0)
        with convert_decoder_errors(path):
            page = path.page if isinstance(path, ImagePage) else 0
            image = read_header(file, image_format, full, any_scale=any_scale, page=page)
        if image.width * image.height > max_pixels:
            raise TooManyPixelsError(
                f"{path}: wanted at most {max_pixels} pixels (recontrast.data.images.MAX_PIXELS), "
                f"got {image.width} x {image.height} = {image.width * image.height}"
            )
        yield image


def _open_source(path: ImageSource) -> IO[bytes]:
    """Open the file of an image, or its content."""
    source = path.path if isinstance(path, ImagePage) else path
    return BytesIO(source.content) if isinstance(source, EncodedImage) else open_regular(source, "an image")


def _warn_of_unused_parts(path: ImageSource, image: OpenImage, picture: Image.Image | None) -> None:
    """Warn of further images in the file, and of EXIF data that cannot be read."""
    several = False
    with suppress(Exception):  # a damaged second image does not affect the first
        with ignore_pillow_warnings():
            several = image.several()
    if several and isinstance(path, EncodedImage):
        raise SeveralImagesError(f"{path}: wanted one image, got a file with several, such as an animation or pages")
    if several and not isinstance(path, ImagePage):
        warn_once("pages", path, "has several images: the first one is used, here and in other files")
    exif = None if picture is None else picture.info.get("exif")
    if isinstance(exif, bytes) and not _is_readable_exif(exif):
        warn_once("exif", path, "has damaged EXIF data: an orientation in it may be ignored, here and in other files")


def _is_readable_exif(exif: bytes) -> bool:
    """Return whether the first directory of EXIF data is complete."""
    try:
        tiff_tags.read_tags(BytesIO(exif.removeprefix(b"Exif\0\0")))
    except (ValueError, struct.error):
        return False
    return True


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
