"""Decode image files to upright PIL images, with a pixel limit and one-sentence errors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from recontrast.data.listing import PathLike

# The plugins are called directly, because Image.open has a process-wide limit: it warns above 89 megapixels and fails
# above 179.
_PLUGINS: dict[bytes, Callable[[IO[bytes], str], ImageFile.ImageFile]] = {
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"BM": BmpImagePlugin.BmpImageFile,
    b"II*\x00": TiffImagePlugin.TiffImageFile,
    b"MM\x00*": TiffImagePlugin.TiffImageFile,
    b"II+\x00": TiffImagePlugin.TiffImageFile,
    b"MM\x00+": TiffImagePlugin.TiffImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
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


def decode(path: PathLike, max_pixels: int) -> Image.Image:
    """Decode the first image of a file and apply its EXIF orientation.

    Args:
        path: PNG, JPEG, BMP, TIFF or WebP file.
        max_pixels: Largest number of pixels.

    Returns:
        The image, loaded, in the mode of the file.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not a complete image of these formats, or has too many pixels.
    """
    with _open(path, max_pixels) as image, convert_decoder_errors(path):
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # load() enforces PIL's pixel limit, but only if it allocates the memory itself
            image.im = Image.new(image.mode, getattr(image, "_tile_size", image.size)).im
        return apply_orientation(image)


def apply_orientation(image: Image.Image) -> Image.Image:
    """Load ``image`` and apply its EXIF orientation; without one, return ``image`` itself."""
    image.load()
    transpose = _TRANSPOSE_BY_ORIENTATION.get(_read_orientation(image))
    return image if transpose is None else image.transpose(transpose)


def read_upright_size(path: PathLike, max_pixels: int) -> tuple[int, int]:
    """Read the height and width of the image that `decode` returns, from the header of the file.

    Args:
        path: PNG, JPEG, BMP, TIFF or WebP file.
        max_pixels: Largest number of pixels.

    Returns:
        Height and width after applying the EXIF orientation, in pixels.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If the file is not an image of these formats, or has too many pixels.
    """
    with _open(path, max_pixels) as image, convert_decoder_errors(path):
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # some Pillow versions apply the orientation to .size
            width, height, orientation = (int(image.tag_v2.get(tag, 1)) for tag in (256, 257, _ORIENTATION_TAG))
        else:
            (width, height), orientation = image.size, _read_orientation(image)
        return (width, height) if orientation in (5, 6, 7, 8) else (height, width)


@contextmanager
def convert_decoder_errors(path: PathLike) -> Iterator[None]:
    """Convert all exceptions of PIL's decoders (OSError, SyntaxError, struct.error and others) to ValueError.

    Args:
        path: File to name in the error message.

    Raises:
        ValueError: If the block raises an exception other than MemoryError.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"{path}: wanted a complete image, got a file that cannot be decoded ({reason})") from error


@contextmanager
def _open(path: PathLike, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """Open an image file, read its header and check the number of pixels."""
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: wanted an image, got no such file") from None
    with file:
        start = file.read(8)
        plugin = next((plugin for magic, plugin in _PLUGINS.items() if start.startswith(magic)), None)
        if plugin is None:
            got = f"a file that starts with {start!r}" if start else "an empty file"
            raise ValueError(f"{path}: wanted a PNG, JPEG, BMP, TIFF or WebP image, got {got}")
        file.seek(0)
        with convert_decoder_errors(path):
            image = plugin(
                file, ""
            )  # without a file name, PIL does not memory-map the file, which could be truncated later
        if image.width * image.height > max_pixels:
            raise ValueError(
                f"{path}: wanted at most {max_pixels} pixels (recontrast.data.images.MAX_PIXELS), "
                f"got {image.width} x {image.height} = {image.width * image.height}"
            )
        yield image


def _read_orientation(image: Image.Image) -> int:
    """Read the EXIF orientation, from 1 to 8; return 1 if there is none."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF data does not affect the pixels
        return 1
