"""What functions take in place of the path of an image: the content of a file in memory, or a page of a file."""

import os
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class EncodedImage:
    """An image file in memory. `recontrast.data.images.read_image` and others take it in place of a path.

    It is no path, so that nothing that a client sends can be opened as a file. Of a file with several images the first
    one is used with a warning, but an `EncodedImage` with several images is refused.

    Attributes:
        content: The bytes of the file, of one of `recontrast.data.formats.FORMATS`.
        name: Name in error messages.
    """

    content: bytes = field(repr=False)
    name: str = "image"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class ImagePage:
    """One page of a TIFF file.

    Attributes:
        path: Path of the file, or its content.
        page: Number of the page, counted from 0.
    """

    path: Path | EncodedImage
    page: int

    def __str__(self) -> str:
        return str(self.path) if not self.page else f"{self.path} (page {self.page + 1})"


ImageSource = str | os.PathLike[str] | EncodedImage | ImagePage


class TooManyPixelsError(ValueError):
    """The header of an image states more pixels than are allowed."""


class SeveralImagesError(ValueError):
    """Several images where one is wanted: frames of an animation, or pages."""
