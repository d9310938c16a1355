"""Image formats that are read: their names, file name suffixes and first bytes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ImageFormat:
    """An image format that is read.

    Attributes:
        name: Name in error messages.
        suffixes: Usual suffixes of file names, in lower case. They select the files of a folder; the first bytes of a
            file decide what it contains.
        starts: Offset and value of the first bytes, one pair for each variant.
    """

    name: str
    suffixes: tuple[str, ...]
    starts: tuple[tuple[int, bytes], ...]


FORMATS = (
    ImageFormat("PNG", (".png", ".apng"), ((0, b"\x89PNG\r\n\x1a\n"),)),
    ImageFormat("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi", ".pjpeg", ".pjp"), ((0, b"\xff\xd8\xff"),)),
    ImageFormat("BMP", (".bmp", ".dib"), ((0, b"BM"),)),
    ImageFormat(
        "TIFF", (".tif", ".tiff", ".btf", ".tf8"), ((0, b"II*\0"), (0, b"MM\0*"), (0, b"II+\0"), (0, b"MM\0+"))
    ),
    ImageFormat("WebP", (".webp",), ((8, b"WEBP"),)),
    ImageFormat("GIF", (".gif",), ((0, b"GIF87a"), (0, b"GIF89a"))),
    ImageFormat(
        "Netpbm",
        (".pgm", ".ppm", ".pbm", ".pnm"),
        tuple(
            (0, b"P" + digit + space)
            for digit in (b"1", b"2", b"3", b"4", b"5", b"6")
            for space in (b"\n", b" ", b"\t", b"\r", b"#")
        ),
    ),
    ImageFormat(
        "JPEG 2000",
        (".jp2", ".j2k", ".jpx", ".j2c", ".jpc"),
        ((0, b"\0\0\0\x0cjP  \r\n\x87\n"), (0, b"\xff\x4f\xff\x51")),
    ),
    ImageFormat("AVIF", (".avif",), ((4, b"ftypavif"), (4, b"ftypavis"))),
    ImageFormat("DICOM", (".dcm", ".dicom"), ((128, b"DICM"),)),
)
"""The formats, in the order in which messages name them."""

SUFFIXES = tuple(sorted(suffix for image_format in FORMATS for suffix in image_format.suffixes))
"""All suffixes, in lower case."""

_STARTS = [(offset, value, image_format.name) for image_format in FORMATS for offset, value in image_format.starts]

HEAD_BYTES = 132
"""Bytes at the start of a file that `detect_format` needs."""

NAMES = ", ".join(image_format.name for image_format in FORMATS[:-1]) + " or " + FORMATS[-1].name
"""Names of the formats for messages."""


def detect_format(head: bytes) -> str | None:
    """Return the name of the format of a file.

    Args:
        head: First `HEAD_BYTES` bytes of the file.

    Returns:
        The name of one of `FORMATS`; None for other files.
    """
    for offset, value, name in _STARTS:
        if head.startswith(value, offset):
            return name
    return None
