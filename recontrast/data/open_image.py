"""Read the header of an image file, and choose the decoder of its format."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
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

from recontrast.data import dicom, netpbm, tiff, tiff_tags
from recontrast.data.decode_budget import BUDGET
from recontrast.data.samples import FULL_SCALE_KEY, LARGEST_KEY, SampleError, read_stored

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
_TURN_BY_ORIENTATION: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {  # the same for arrays
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a.swapaxes(0, 1)[::-1],
}
_OWN_PIXEL_BYTES = 12  # of TIFF and Netpbm: samples of up to 16 bits and 4 channels, and 8-bit RGB
_DICOM_PIXEL_BYTES = 24  # the file, its samples, and their values in float64

_JPEG_2000_HEAD = 1 << 20  # bytes before the codestream: metadata


@dataclass
class OpenImage:
    """An image file whose header has been read.

    Attributes:
        width: Width of the stored image, in pixels.
        height: Height of the stored image, in pixels.
        read_orientation: Returns the orientation of the stored image, from 1 to 8; called instead of ``load``.
        load: Decodes the image and applies the orientation.
        several: Returns whether the file has further images; called after ``load``.
        pixel_bytes: Memory that decoding and converting to RGB need for each pixel, in bytes.
        read_samples: Decodes the samples as they are stored, and applies the orientation; called instead of ``load``.
            (H, W) or (H, W, 3), uint8 for an image that has no more than 8 bits.
        bits: Bits of a sample: 16 if `decode` can scale them by another full scale, else 8.
    """

    width: int
    height: int
    read_orientation: Callable[[], int]
    load: Callable[[], Image.Image]
    several: Callable[[], bool]
    pixel_bytes: int
    read_samples: Callable[[], NDArray[Any]]
    bits: int = 8


def read_header(
    file: IO[bytes], image_format: str, full: int | None, *, any_scale: bool = False, page: int = 0
) -> OpenImage:
    """Read the header of a file, and choose its decoder.

    Args:
        file: Image file, at its start.
        image_format: Name of its format.
        full: Sample value that should become white in colour files of 16 bits; None is 65535.
        any_scale: Whether samples of unknown scale are accepted, for a window.
        page: Number of the page of a TIFF file, counted from 0; other formats have one.

    Returns:
        Size, orientation and decoder of the image.

    Raises:
        SampleError: If the samples have no known scale.
        Exception: Any exception of the decoders, if the header is damaged.
    """
    if image_format == "Netpbm":
        header = netpbm.read_header(file)
        read = partial(netpbm.read_picture, file, header, full)
        bits, stored = 16 if header.full == 65535 else 8, partial(netpbm.read_samples, file, header)
        return OpenImage(header.width, header.height, partial(int, 1), read, bool, _OWN_PIXEL_BYTES, stored, bits)
    if image_format == "DICOM":
        return _read_dicom_header(file)
    if image_format == "TIFF":
        return _read_tiff_header(file, full, any_scale, page)
    scale = _read_jpeg_2000_scale(file) if image_format == "JPEG 2000" else None
    # Without a file name, PIL does not memory-map the file, which could be truncated later.
    image = _PLUGINS[image_format](file, "")
    load = partial(_load, image, scale, full)
    several = partial(_is_animated, image)
    bits = 16 if image.mode.startswith("I") and scale in (None, 65535) else 8
    pixel_bytes = 4 if image.mode in ("1", "L") else 8
    orientation = partial(_read_png_orientation if image_format == "PNG" else read_orientation, image)
    stored = partial(_load_samples, image, scale)
    return OpenImage(*image.size, orientation, load, several, pixel_bytes, stored, bits)


def _read_dicom_header(file: IO[bytes]) -> OpenImage:
    """Read the header of a DICOM file, see `read_header`."""
    data = dicom.read_header(file)
    load, stored = partial(dicom.read_picture, file, data), partial(dicom.read_samples, file, data)
    size, bits = (int(data.Columns), int(data.Rows)), 16 if dicom.count_bits(data) > 8 else 8
    return OpenImage(*size, partial(int, 1), load, bool, _DICOM_PIXEL_BYTES, stored, bits)


def _read_tiff_header(file: IO[bytes], full: int | None, any_scale: bool, number: int) -> OpenImage:
    """Read the header of a TIFF file, see `read_header`."""
    page = tiff_tags.read_tags(file, number)
    file.seek(0)
    image = None if page.needs_own_reader else _open_tiff_by_pillow(file, page, number)
    if image is not None:
        load = partial(_load, image)
    else:
        if not any_scale:
            tiff.check_layout(page)
        load = partial(_load_unusual_tiff, file, page, full)
    bits, several = 16 if page.bits[0] == 16 else 8, partial(bool, page.pages > 1)
    orientation, stored = partial(int, page.orientation), partial(_load_tiff_samples, file, page)
    pixel_bytes = max(_OWN_PIXEL_BYTES, max(page.bits) // 2 * min(page.samples, 3))  # with a copy as float32
    return OpenImage(page.width, page.height, orientation, load, several, pixel_bytes, stored, bits)


def _open_tiff_by_pillow(
    file: IO[bytes], page: tiff_tags.TiffPage, number: int
) -> TiffImagePlugin.TiffImageFile | None:
    """Open a page of a TIFF file by Pillow; None if Pillow does not know its layout, but our reader does."""
    try:
        image = TiffImagePlugin.TiffImageFile(file, "")
        if number:
            image.seek(number)
        return image
    except Exception:
        try:
            tiff.check_layout(page)
        except SampleError:
            pass
        else:
            return None
        raise


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
    picture: Image.Image = image
    if isinstance(image, GifImagePlugin.GifImageFile):
        picture = image.copy()  # looking for further images drops the pixels of ``image``
    if deep_colour:
        picture.info[LARGEST_KEY] = max(high for _, high in image.getextrema()) << 8 | 255  # type: ignore[misc]
    return turn_upright(picture, read_orientation(picture), scale)


def _load_samples(image: ImageFile.ImageFile, scale: int | None) -> NDArray[Any]:
    """Decode an image by Pillow as it is stored.

    Args:
        image: Image whose header has been read.
        scale: Full scale of its grey samples of JPEG 2000, whose low bits Pillow fills with zeros.
    """
    samples = read_stored("image", _load(image, scale, 65535))
    return samples if scale is None else samples >> (16 - scale.bit_count())


def _load_tiff_samples(file: IO[bytes], page: tiff_tags.TiffPage) -> NDArray[Any]:
    """Decode a TIFF page by our own reader as it is stored, and apply its orientation."""
    if page.sample_format in (1, 4) and max(page.bits) <= 8:
        return np.zeros((page.height, page.width), np.uint8)  # of any kind that Pillow reads
    samples = tiff.read_samples(file, page)
    return _TURN_BY_ORIENTATION.get(page.orientation, np.asarray)(samples)


def _is_animated(image: Image.Image) -> bool:
    """Return whether an image opened by Pillow has several frames."""
    return bool(getattr(image, "is_animated", False))


def _load_unusual_tiff(file: IO[bytes], page: tiff_tags.TiffPage, full: int | None) -> Image.Image:
    """Decode a TIFF page by our own reader."""
    picture = tiff.read_page(file, page, full)
    return turn_upright(picture, page.orientation, picture.info.get(FULL_SCALE_KEY))


def turn_upright(image: Image.Image, orientation: int, scale: int | None) -> Image.Image:
    """Apply an orientation, and note the full scale of the samples.

    Args:
        image: Decoded image.
        orientation: EXIF orientation, from 1 to 8.
        scale: Full scale of grey samples; None if it is that of the mode.

    Returns:
        The upright image; ``image`` itself if it is upright.
    """
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


def _read_png_orientation(image: ImageFile.ImageFile) -> int:
    """Read the orientation of a PNG image; decode it only if metadata follow the pixels."""
    file = image.fp
    if file is None:
        return 1
    position = file.tell()
    try:
        if _has_metadata_after_pixels(file):
            with BUDGET.reserve(image.width * image.height * 8):
                return read_orientation(image)
        return int(Image.Image.getexif(image).get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata do not affect the pixels
        return 1
    finally:
        file.seek(position)


def _has_metadata_after_pixels(file: IO[bytes]) -> bool:
    """Return whether a chunk of a PNG file after its pixels can hold EXIF data."""
    file.seek(8)
    pixels_seen = False
    while len(head := file.read(8)) == 8:
        kind = head[4:]
        if pixels_seen and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return True
        pixels_seen = pixels_seen or kind == b"IDAT"
        file.seek(int.from_bytes(head[:4], "big") + 4, io.SEEK_CUR)
    return False


def read_orientation(image: Image.Image) -> int:
    """Read the orientation of an image.

    Args:
        image: Image opened by Pillow.

    Returns:
        EXIF orientation, from 1 to 8; 1 if there is none.
    """
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged EXIF data does not affect the pixels
        return 1
