"""Images that clients send: found in the body of a request, checked, and decoded by the readers of this package."""

import email.parser
import email.policy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from recontrast.data.decode import read_upright_size
from recontrast.data.encoded_image import EncodedImage, SeveralImagesError, TooManyPixelsError
from recontrast.data.formats import HEAD_BYTES, NAMES, detect_format
from recontrast.data.image_files import ImageFiles
from recontrast.data.images import read_image
from recontrast.data.window import Window
from recontrast.service.messages import RequestError

_PART_HEAD_BYTES = 1 << 13  # largest headers of one part of a multipart body
_MOST_PARTS = 20


@dataclass(frozen=True)
class ReadOptions:
    """How a detector reads its images: the arguments of `recontrast.data.images.read_image`."""

    size: Any
    crop: Any
    bits: int | None
    window: Window = None


@dataclass(frozen=True)
class Upload:
    """An image that was sent, decoded as a detector reads it.

    Attributes:
        image: The file as it was sent.
        shape: Height and width of the upright image, in pixels.
        options: How the pixels were read.
        pixels: (H, W, 3), uint8, or float32 with a window.
    """

    image: EncodedImage
    shape: tuple[int, int]
    options: ReadOptions
    pixels: NDArray[Any]


class UploadedImages(ImageFiles):
    """Uploads with the interface of `ImageFiles`, for `recontrast.inference.protocol.Detector.run`.

    Args:
        uploads: The images.

    Attributes:
        asked: How the detector read the images, in the order of its calls.
    """

    def __init__(self, uploads: list[Upload]) -> None:
        super().__init__([])
        self.paths = [Path(f"image {index}") for index in range(len(uploads))]
        self.uploads = uploads
        self.asked: list[ReadOptions] = []

    def _decode(
        self, position: int, size: Any, crop: Any, bits: int | None = None, window: Window = None
    ) -> NDArray[Any]:
        upload, options = self.uploads[position], ReadOptions(size, crop, bits, window)
        self.asked.append(options)
        if options == upload.options:
            return upload.pixels
        return read_image(upload.image, size=size, crop=crop, bits=bits, window=window)

    def _count_pixels(self, position: int) -> int:
        height, width = self.uploads[position].shape
        return height * width


def decode_upload(content: bytes, options: ReadOptions, max_pixels: int) -> Upload:
    """Decode an image that a client sent.

    Args:
        content: The file.
        options: How the detector reads its images.
        max_pixels: Largest number of pixels.

    Returns:
        The decoded image.

    Raises:
        RequestError: If the bytes are no whole image, several images, or too many pixels.
    """
    image = EncodedImage(content)
    if not content:
        raise RequestError(400, "image: wanted the bytes of an image file, got an empty body")
    if detect_format(content[:HEAD_BYTES]) is None:
        raise RequestError(415, f"image: wanted a {NAMES} image, got a file that starts with {content[:8]!r}")
    try:
        shape = read_upright_size(image, max_pixels)
        pixels = read_image(image, size=options.size, crop=options.crop, bits=options.bits, window=options.window)
    except TooManyPixelsError as error:
        got = str(error).rpartition("got ")[2].partition(" =")[0]
        raise RequestError(413, f"image: wanted at most {max_pixels:,} pixels, got {got}") from None
    except SeveralImagesError as error:
        raise RequestError(422, str(error)) from None
    except ValueError as error:
        raise RequestError(422, " ".join(str(error).split())) from None
    return Upload(image, shape, options, pixels)


def find_image(body: bytes, content_type: str | None) -> bytes:
    """Return the image in the body of a request.

    Args:
        body: The body: the image itself, or a form (multipart/form-data, RFC 7578) with one file.
        content_type: Header Content-Type; None counts as application/octet-stream.

    Returns:
        The bytes of the image file.

    Raises:
        RequestError: If the media type is another, or the form is damaged or holds no file or several.
    """
    kind, parameters = parse_header(content_type or "application/octet-stream")
    if kind == "multipart/form-data":
        files = [content for name, content in _split_form(body, parameters.get("boundary", "")) if name is not None]
        if len(files) != 1:
            raise RequestError(400, f"form: wanted one file, got {len(files) or 'none'}")
        return files[0]
    if kind.startswith("image/") or kind == "application/octet-stream":
        return body
    wanted = "image/* or application/octet-stream (the file itself), or multipart/form-data with one file"
    raise RequestError(415, f"Content-Type: wanted {wanted}, got {kind[:80]}")


def parse_header(text: str) -> tuple[str, dict[str, str]]:
    """Return the value of a header in lower case, and its parameters."""
    message = email.message_from_string(f"Content-Type: {text[:1000]}\n\n", policy=email.policy.compat32)
    pairs = message.get_params(failobj=[], unquote=True)
    kind = str(pairs[0][0]).strip().lower() if pairs else ""
    return kind, {str(name).lower(): _join_parameter(value) for name, value in pairs[1:]}


def _join_parameter(value: Any) -> str:
    """Return a parameter as text; those of RFC 2231 consist of character set, language and text."""
    return str(value[2]) if isinstance(value, tuple) else str(value)


def _split_form(body: bytes, boundary: str) -> list[tuple[str | None, bytes]]:
    """Return the file name and the content of each part of a form (RFC 2046); None for a part that is no file."""
    if not 1 <= len(boundary) <= 70 or not boundary.isascii():
        raise RequestError(400, "form: wanted a boundary of 1 to 70 characters in Content-Type, got none or another")
    delimiter = b"\r\n--" + boundary.encode("ascii")
    pieces = (b"\r\n" + body).split(delimiter, _MOST_PARTS + 1)
    parts: list[tuple[str | None, bytes]] = []
    for piece in pieces[1:]:
        if piece.startswith(b"--"):
            return parts
        rest = piece.lstrip(b" \t")
        head, blank, content = rest.partition(b"\r\n\r\n")
        if not rest.startswith(b"\r\n") or not blank or len(head) > _PART_HEAD_BYTES:
            raise RequestError(400, "form: wanted parts with headers, got a part without them")
        headers = email.parser.BytesHeaderParser(policy=email.policy.compat32).parsebytes(head[2:] + b"\r\n\r\n")
        kind, parameters = parse_header(str(headers.get("Content-Disposition", "")))
        if kind != "form-data":
            raise RequestError(400, "form: wanted Content-Disposition: form-data in each part, got another")
        parts.append((parameters.get("filename", parameters.get("filename*")), content))
    raise RequestError(400, "form: wanted a complete form, got one that is cut off or has too many parts")


def start_decoders(count: int) -> ThreadPoolExecutor:
    """Return the threads that decode images and draw pictures."""
    return ThreadPoolExecutor(count, thread_name_prefix="recontrast-decode")
