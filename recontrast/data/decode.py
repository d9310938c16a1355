"""Image files to upright PIL images in their own mode; a stated pixel limit, and errors in one sentence."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

from PIL import BmpImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from recontrast.data.listing import PathLike

# The plugins are called directly: Image.open warns above 89 and refuses above 179 megapixels by a process-wide setting.
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
_ORIENTATION = 0x0112  # the tag of EXIF and TIFF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(path: PathLike, max_pixels: int) -> Image.Image:
    """All pixels of the first picture of a file, turned upright by its EXIF orientation, in the file's own mode."""
    with _opened(path, max_pixels) as image, convert_decoder_errors(path):
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            # its load() checks PIL's limit, but only where it makes the memory itself
            image.im = Image.new(image.mode, getattr(image, "_tile_size", image.size)).im
        return apply_orientation(image)


def apply_orientation(image: Image.Image) -> Image.Image:
    """The picture turned by its EXIF orientation, loaded; itself where it has none."""
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def read_upright_size(path: PathLike, max_pixels: int) -> tuple[int, int]:
    """Height and width that `decode` would give, from the header alone."""
    with _opened(path, max_pixels) as image, convert_decoder_errors(path):
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # whether .size is upright depends on Pillow's version
            width, height, turned = (int(image.tag_v2.get(tag, 1)) for tag in (256, 257, _ORIENTATION))
        else:
            (width, height), turned = image.size, _orientation(image)
        return (width, height) if turned in (5, 6, 7, 8) else (height, width)


@contextmanager
def convert_decoder_errors(path: PathLike) -> Iterator[None]:
    """Turn whatever a decoder of PIL raises (OSError, SyntaxError, struct.error, ...) into a ValueError."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"{path}: wanted a whole image, got a file that cannot be decoded ({reason})") from error


@contextmanager
def _opened(path: PathLike, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """Read the header, check the number of pixels; the file stays open for the body."""
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
            image = plugin(file, "")  # without a name PIL does not map the file, which could shrink meanwhile
        if image.width * image.height > max_pixels:
            raise ValueError(
                f"{path}: wanted at most {max_pixels} pixels (recontrast.data.images.MAX_PIXELS), "
                f"got {image.width} x {image.height} = {image.width * image.height}"
            )
        yield image


def _orientation(image: Image.Image) -> int:
    """Orientation 1 to 8 by EXIF; 1 where there is none, or none that can be read: the pixels are whole."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return 1
