"""Several aligned images of one part, its views: files named by a pattern, or the pages of a TIFF file.

A part is one item of all lists, metrics and calibrations, and has the path of its first view. The network sees each
view by itself; `combine_views` joins their maps. `recontrast.data.part_samples` joins the samples of the views.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data.encoded_image import EncodedImage, ImagePage, ImageSource
from recontrast.data.images import Size, image_size, read_image
from recontrast.data.listing import natural_sort_key
from recontrast.data.tiff_tags import count_file_pages
from recontrast.data.window import Window

PAGES = "pages"
"""Source of views that are the pages of one TIFF file."""

_NAMED = 8  # views that a message names


@dataclass(frozen=True)
class Views:
    """Where the views of a part are found.

    Attributes:
        source: `PAGES`, or a regular expression with one pair of parentheses, around the name of the view in a path.
        names: Names of the views, in their order; of pages their numbers.
    """

    source: str
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of views of a part."""
        return len(self.names)

    def describe(self) -> str:
        """Return the names of the views for a message; of many views, the first ones and the number of the others."""
        named = ", ".join(self.names[:_NAMED])
        return named if len(self) <= _NAMED else f"{named} and {len(self) - _NAMED} others"

    def divide(self, path: Path) -> tuple[str, str, str]:
        """Divide the path of a view, see `divide_path`.

        Args:
            path: Path of an image.

        Returns:
            What precedes the name of the view, the name, and what follows it.

        Raises:
            ValueError: If the path has no name of a view, or that of none of these.
        """
        before, name, after = divide_path(self.source, path)
        if name not in self.names:
            raise ValueError(f"{path}: wanted one of the views {self.describe()} as in training, got {name!r}")
        return before, name, after

    def locate(self, path: Path) -> list[ImageSource]:
        """Return the images of a part, in the order of ``names``.

        Args:
            path: Path of the part.

        Returns:
            Paths, or pages of a file. Their files may be missing.

        Raises:
            OSError: If a file of pages cannot be read.
            ValueError: If it has another number of pages, or the pattern does not match the path.
        """
        if self.source == PAGES:
            return [*self.locate_pages(path)]
        before, _, after = divide_path(self.source, path)
        return [Path(before + name + after) for name in self.names]

    def locate_pages(self, file: Path | EncodedImage) -> list[EncodedImage | ImagePage]:
        """Return the pages of a file, see `locate`.

        Args:
            file: Path of a TIFF file, or its content.

        Returns:
            The pages.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it has another number of pages.
        """
        count = count_file_pages(file)
        if count != len(self):
            raise ValueError(f"{file}: wanted {len(self)} pages as in training, got {count}")
        return [ImagePage(file, page) for page in range(count)]

    def read(
        self, path: Path, *, size: Size | None = None, crop: Size | None = None, bits: int | None = None,
        window: Window = None,
    ) -> NDArray[Any]:  # fmt: skip
        """Read all views of a part.

        Args:
            path: Path of the part.
            size: Size after resizing, as in `recontrast.data.images.read_image`, as the other arguments.
            crop: Size of the centre crop after resizing.
            bits: Bits that the camera uses of 16-bit samples.
            window: Values that become 0 and 1.

        Returns:
            (views, H, W, 3): uint8, or float32 with a window.

        Raises:
            OSError: If a file cannot be read.
            ValueError: If a view is missing or no image, or the views differ in size.
        """
        sources = self.locate(path)
        shapes = [self._read_size(source) for source in sources]
        for source, shape in zip(sources, shapes, strict=True):
            if shape != shapes[0]:
                wanted, got = (f"{height} x {width}" for height, width in (shapes[0], shape))
                raise ValueError(f"{source}: wanted a view of the size of {sources[0]}, {wanted}, got {got}")
        return np.stack([read_image(source, size=size, crop=crop, bits=bits, window=window) for source in sources])

    def _read_size(self, source: ImageSource) -> tuple[int, int]:
        """Return the height and width of a view."""
        try:
            return image_size(source)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{source}: wanted the views {self.describe()} of each part, got no such file"
            ) from None

    def first(self, path: Path) -> ImageSource:
        """Return the view that is shown of a part; a file of pages may have any number of them."""
        return ImagePage(path, 0) if self.source == PAGES else path


def list_views(path: Path, views: Views | None) -> list[ImageSource]:
    """Return the images of a part, see `Views.locate`; without views, the path itself."""
    return [path] if views is None else views.locate(path)


def list_view_files(path: Path, views: Views | None) -> list[Path]:
    """Return the files of a part, which may be missing; without views, and for pages of a file, the path itself.

    Raises:
        ValueError: If the pattern of the views does not match the path.
    """
    if views is None or views.source == PAGES:
        return [path]
    return [file for file in views.locate(path) if isinstance(file, Path)]


def show_view(path: Any, views: Views | None) -> Any:
    """Return the image to show for a path; any other source of an image stays as it is."""
    return path if views is None or not isinstance(path, Path) else views.first(path)


def is_pattern(source: str) -> bool:
    """Return whether a text is a regular expression with one pair of parentheses."""
    try:
        return re.compile(source).groups == 1
    except (re.error, OverflowError, RecursionError):
        return False


def check_source(source: str | None, name: str) -> None:
    """Check where the views of a part are found.

    Args:
        source: As in `Views`; None for single images.
        name: Name of the option or argument, for the error message.

    Raises:
        ValueError: If it is neither `PAGES` nor a regular expression with one pair of parentheses.
    """
    if source is not None and source != PAGES and not is_pattern(source):
        wanted = f"{PAGES!r} or a regular expression with one pair of parentheses around the name of the view"
        raise ValueError(f"{name}: wanted {wanted}, got {source!r}")


def divide_path(pattern: str, path: Path) -> tuple[str, str, str]:
    """Divide a path at the last match of a pattern in the absolute path.

    Args:
        pattern: Regular expression with one pair of parentheses.
        path: Path of an image.

    Returns:
        What precedes the name of the view, the name, and what follows it: of the path as it is given; of the absolute
        path if the view is named in a folder above.

    Raises:
        ValueError: If there is no match, or its view has no name.
    """
    above = "" if path.is_absolute() else f"{Path.cwd().as_posix().rstrip('/')}/"
    text, last = above + path.as_posix(), None
    for match in re.finditer(pattern, text):
        last = match if match[1] else last
    if last is None:
        raise ValueError(f"{path}: wanted a path with the name of a view as {pattern!r} finds it, got one without")
    start, stop = last.span(1)
    return text[len(above) if start >= len(above) else 0 : start], text[start:stop], text[stop:]


def find_views(source: str, paths: Sequence[Path]) -> Views:
    """Find the views that parts have.

    Args:
        source: As in `Views`.
        paths: Image files of good parts.

    Returns:
        The views: in natural order, or as many pages as the first file has.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If there are fewer than two views, or a path has none.
    """
    if source == PAGES:
        names = [str(page + 1) for page in range(count_file_pages(paths[0]))] if paths else []
        where = f"{paths[0]}: " if paths else ""
        if len(names) < 2:
            raise ValueError(f"{where}wanted a file of at least 2 pages for the views of a part, got {len(names)}")
    else:
        names = sorted({divide_path(source, path)[1] for path in paths}, key=natural_sort_key)
        if len(names) < 2:
            got = f"{len(names)} ({', '.join(names)})" if names else "none"
            raise ValueError(f"views_from: wanted at least 2 views of each part as {source!r} finds them, got {got}")
    return Views(source, tuple(names))


def group_paths(paths: Sequence[Path], views: Views | None) -> list[Path]:
    """Return the paths of parts, in the order of their first files.

    Args:
        paths: Files of all views; a view may be missing.
        views: Views of the parts; None: each file is one.

    Returns:
        The path of the first view of each part, whose file may be missing.

    Raises:
        ValueError: If a path has no name of a view, or another one.
    """
    if views is None or views.source == PAGES:
        return list(paths)
    parts: dict[str, Path] = {}
    for before, _, after in map(views.divide, paths):
        part = Path(before + views.names[0] + after)
        parts.setdefault(os.path.abspath(part), part)
    return list(parts.values())


def list_part_names(paths: Sequence[Path], source: str | None) -> list[str]:
    """Return the name of the part of each image: the same for all its views, whose names need not be known.

    Args:
        paths: Files of all views.
        source: As in `Views`; None: each file is a part.

    Returns:
        One name for each path.

    Raises:
        ValueError: If a path has no name of a view.
    """
    if source is None or source == PAGES:
        return [os.path.abspath(path) for path in paths]
    divided = [divide_path(source, path) for path in paths]
    return [f"{os.path.abspath(before + '*')}{after}" for before, _, after in divided]


def combine_views(values: Any, views: int, how: str) -> Any:
    """Combine the values of the views of each part.

    Args:
        values: Tensor (parts * views, ...), floating point, the views of a part in sequence.
        views: Number of views of a part.
        how: "max" or "mean".

    Returns:
        Tensor (parts, ...): NaN where a value is.
    """
    values = values.unflatten(0, (-1, views))
    return values.amax(1) if how == "max" else values.mean(1)


def list_sources(paths: Sequence[str | os.PathLike[str]], views: Views | None) -> list[Any]:
    """Return the images of all parts, see `list_views`; a file of pages whose number is another one has none."""
    sources: list[Any] = []
    for path in paths:
        try:
            sources += list_views(Path(path), views)
        except (OSError, ValueError):  # reported where the image is read
            continue
    return sources
