"""The content of an image file that is in memory, such as one that a client sent, where functions take a path."""

import os
from dataclasses import dataclass, field


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


ImageSource = str | os.PathLike[str] | EncodedImage


class TooManyPixelsError(ValueError):
    """The header of an image states more pixels than are allowed."""


class SeveralImagesError(ValueError):
    """Several images where one is wanted: frames of an animation, or pages."""
