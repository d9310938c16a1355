"""Images that clients send: found in the body of a request, checked, and decoded by the readers of this package."""

import email.parser
import email.policy
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data.decode import read_upright_size
from recontrast.data.encoded_image import EncodedImage, ImagePage, SeveralImagesError, TooManyPixelsError
from recontrast.data.formats import HEAD_BYTES, NAMES, detect_format
from recontrast.data.image_files import ImageFiles
from recontrast.data.images import read_image
from recontrast.data.views import PAGES, Views, divide_path
from recontrast.data.window import Window
from recontrast.service.messages import RequestError

_PART_HEAD_BYTES = 1 << 13  # largest headers of one part of a multipart body
_MOST_PARTS = 20  # of a multipart body, besides the views of a part


@dataclass(frozen=True)
class ReadOptions:
    """How a detector reads its images: the arguments of `recontrast.data.images.read_image`."""

    size: Any
    crop: Any
    bits: int | None
    window: Window = None

    def read(self, image: EncodedImage | ImagePage) -> NDArray[Any]:
        """Read an image, (H, W, 3), uint8, or float32 with a window; see `recontrast.data.images.read_image`."""
        return read_image(image, size=self.size, crop=self.crop, bits=self.bits, window=self.window)


@dataclass(frozen=True)
class Upload:
    """An image or a part that was sent, decoded as a detector reads it.

    Attributes:
        sources: The file as it was sent; of a part, its views in their order.
        shape: Height and width of the upright image, in pixels; all views have one size.
        options: How the pixels were read.
        pixels: (H, W, 3), or (views, H, W, 3) of a part; uint8, or float32 with a window.
    """

    sources: Sequence[EncodedImage | ImagePage]
    shape: tuple[int, int]
    options: ReadOptions
    pixels: NDArray[Any]

    @property
    def image(self) -> EncodedImage | ImagePage:
        """The image that is shown; of a part, its first view."""
        return self.sources[0]


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
        return upload.pixels if options == upload.options else options.read(upload.image)

    def _decode_views(
        self, position: int, size: Any, crop: Any, bits: int | None, window: Window, views: Views
    ) -> NDArray[Any]:  # fmt: skip
        upload, options = self.uploads[position], ReadOptions(size, crop, bits, window)
        self.asked.append(options)
        return upload.pixels if options == upload.options else np.stack(list(map(options.read, upload.sources)))

    def shape(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image in pixels, after applying its EXIF orientation."""
        return self.uploads[index].shape

    def _count_pixels(self, position: int) -> int:
        height, width = self.uploads[position].shape
        return height * width


def decode_upload(
    content: bytes | Sequence[bytes], options: ReadOptions, max_pixels: int, views: Views | None = None
) -> Upload:  # fmt: skip
    """Decode an image or a part that a client sent.

    Args:
        content: The file; of a part whose views are files, these in their order.
        options: How the detector reads its images.
        max_pixels: Largest number of pixels, of all views together.
        views: Views of the part; None for a single image.

    Returns:
        The decoded image.

    Raises:
        RequestError: If the bytes are no whole image, several images, or too many pixels; or if a part lacks a view, or
            its views differ in size.
    """
    contents = [content] if isinstance(content, bytes) else list(content)
    names = ["image"] if views is None or views.source == PAGES else views.names
    sources: list[EncodedImage | ImagePage] = []
    for name, one in zip(names, contents, strict=True):
        if not one:
            raise RequestError(400, f"{name}: wanted the bytes of an image file, got an empty body")
        if detect_format(one[:HEAD_BYTES]) is None:
            raise RequestError(415, f"{name}: wanted a {NAMES} image, got a file that starts with {one[:8]!r}")
        sources.append(EncodedImage(one, name))
    try:
        if views is not None and views.source == PAGES:
            sources = views.locate_pages(EncodedImage(contents[0]))
        shape = _read_size(sources, max_pixels)
        pixels = np.stack(list(map(options.read, sources))) if views is not None else options.read(sources[0])
    except TooManyPixelsError as error:
        name, got = str(error).partition(": ")[0], str(error).rpartition("got ")[2].partition(" =")[0]
        limit = f"{max_pixels:,} pixels"
        if len(sources) > 1:
            limit = f"{max_pixels // len(sources):,} pixels in each of {len(sources)} views"
        raise RequestError(413, f"{name}: wanted at most {limit}, got {got}") from None
    except SeveralImagesError as error:
        raise RequestError(422, str(error)) from None
    except ValueError as error:
        raise RequestError(422, " ".join(str(error).split())) from None
    return Upload(sources, shape, options, pixels)


def _read_size(sources: Sequence[EncodedImage | ImagePage], max_pixels: int) -> tuple[int, int]:
    """Return the height and width of all views; raise ValueError if they differ or have too many pixels together."""
    shapes = [read_upright_size(source, max_pixels // len(sources)) for source in sources]
    for source, shape in zip(sources, shapes, strict=True):
        if shape != shapes[0]:
            wanted, got = (f"{height} x {width}" for height, width in (shapes[0], shape))
            raise ValueError(f"{source}: wanted a view of the size of {sources[0]}, {wanted}, got {got}")
    return shapes[0]


def find_images(body: bytes, content_type: str | None, views: Views | None) -> list[bytes]:
    """Return the images in the body of a request, of which a part whose views are files has several.

    Args:
        body: The body, see `find_image`; of such a part a form with one file for each view. The name of the field, or
            of the file as in training, is that of the view.
        content_type: Header Content-Type; None counts as application/octet-stream.
        views: Views of the parts; None for single images.

    Returns:
        The bytes of the image file, or of those of all views in their order.

    Raises:
        RequestError: As `find_image` raises it, or if a view is missing, sent twice or unknown.
    """
    if views is None or views.source == PAGES:
        return [find_image(body, content_type)]
    kind, parameters = parse_header(content_type or "application/octet-stream")
    wanted = f"one file for each of the views {views.describe()} (multipart/form-data)"
    if kind != "multipart/form-data":
        raise RequestError(415, f"Content-Type: wanted {wanted}, got {kind[:80]}")
    found: dict[str, bytes] = {}
    for field, name, content in _split_form(body, parameters.get("boundary", ""), _MOST_PARTS + len(views)):
        if name is None:
            continue
        view = field if field in views.names else _find_view(field or "", name, views)
        if view is None or view in found:
            got = f"{view} twice" if view else f"{name[:40]!r} in the field {str(field)[:40]!r}, which names none"
            raise RequestError(400, f"form: wanted {wanted}, got {got}")
        found[view] = content
    if missing := tuple(name for name in views.names if name not in found):
        raise RequestError(400, f"form: wanted {wanted}, got no {Views(views.source, missing).describe()}")
    return [found[name] for name in views.names]


def _find_view(field: str, file: str, views: Views) -> str | None:
    """Return the view that the name of a field, or else that of a file states; None if they state none."""
    names = {_normalise(view): view for view in views.names}
    if (view := names.get(_normalise(field))) is not None:
        return view
    path = file.replace("\\", "/").lstrip("/")
    with suppress(ValueError):
        return views.divide(Path("/", path))[1]
    with suppress(ValueError):
        return names.get(divide_path(views.source, Path("/", _normalise(path)))[1])
    return None


def _normalise(name: str) -> str:
    """Return a name in composed Unicode (macOS decomposes it), with the characters that browsers escape in forms."""
    for escaped, character in (("%22", '"'), ("%0D", "\r"), ("%0A", "\n")):
        name = name.replace(escaped, character)
    return unicodedata.normalize("NFC", name)


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
        files = [file for _, name, file in _split_form(body, parameters.get("boundary", "")) if name is not None]
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


def _split_form(
    body: bytes, boundary: str, most: int = _MOST_PARTS
) -> list[tuple[str | None, str | None, bytes]]:  # fmt: skip
    """Return the names of field and file, and the content of each part of a form (RFC 2046).

    The name of the file is None for a part that is no file.
    """
    if not 1 <= len(boundary) <= 70 or not boundary.isascii():
        raise RequestError(400, "form: wanted a boundary of 1 to 70 characters in Content-Type, got none or another")
    delimiter = b"\r\n--" + boundary.encode("ascii")
    pieces = (b"\r\n" + body).split(delimiter, most + 1)
    parts: list[tuple[str | None, str | None, bytes]] = []
    for piece in pieces[1:]:
        if piece.startswith(b"--"):
            return parts
        rest = piece.lstrip(b" \t")
        head, blank, content = rest.partition(b"\r\n\r\n")
        if not rest.startswith(b"\r\n") or not blank or len(head) > _PART_HEAD_BYTES:
            raise RequestError(400, "form: wanted parts with headers, got a part without them")
        text = head[2:].decode("utf-8", "replace")  # as RFC 7578 recommends, and clients send it
        headers = email.parser.HeaderParser(policy=email.policy.compat32).parsestr(text + "\r\n\r\n")
        kind, parameters = parse_header(str(headers.get("Content-Disposition", "")))
        if kind != "form-data":
            raise RequestError(400, "form: wanted Content-Disposition: form-data in each part, got another")
        parts.append((parameters.get("name"), parameters.get("filename", parameters.get("filename*")), content))
    raise RequestError(400, "form: wanted a complete form, got one that is cut off or has too many parts")


def start_decoders(count: int) -> ThreadPoolExecutor:
    """Return the threads that decode images and draw pictures."""
    return ThreadPoolExecutor(count, thread_name_prefix="recontrast-decode")
