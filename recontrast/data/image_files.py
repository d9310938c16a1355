"""Image files to score: decoded on access, with unreadable files recorded instead of raised."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from recontrast.data.decode_budget import BYTES_IN_FLIGHT
from recontrast.data.images import Size, image_size, parse_size, read_image
from recontrast.data.views import Views, list_sources
from recontrast.data.window import Window, pixel_dtype

IMAGE_ERRORS = (OSError, ValueError, MemoryError, RuntimeError)  # that concern one image, and not the run


class ImageFiles:
    """Image files, indexed by position; a file that is listed twice counts once.

    Args:
        paths: Paths of the files.
        pool: Threads for decoding. None decodes on the calling thread.

    Attributes:
        paths: Paths without duplicates, in the order given.
        errors: Error message of each file that could not be read, by position. Filled while files are read.
        check_shape: Function that raises ValueError for an image of a shape (H, W) that is not accepted, and gets its
            name; None leaves it to the detector, which sets it to compare images with its region of interest.
    """

    def __init__(self, paths: Sequence[Path], pool: ThreadPoolExecutor | None = None) -> None:
        unique = {os.path.abspath(path): path for path in reversed(paths)}
        self.paths = list(reversed(unique.values()))
        self.errors: dict[int, str] = {}
        self.check_shape: Callable[[tuple[int, int], str], None] | None = None
        self._map: Any = map if pool is None else pool.map

    def __len__(self) -> int:
        return len(self.paths)

    def resized(
        self, size: Size, crop: Size | None = None, bits: int | None = None, window: Window = None,
        views: Views | None = None,
    ) -> "ResizedImages":  # fmt: skip
        """Return all images resized to one size, for `recontrast.inference.infer.infer`.

        Args:
            size: Size after resizing, in pixels.
            crop: Size of the centre crop after resizing, in pixels. None keeps the whole image.
            bits: Bits that the camera uses of 16-bit samples, as in `recontrast.data.images.read_image`.
            window: Values that become 0 and 1, as in `recontrast.data.images.read_image`.
            views: Views of each part, which are images in sequence; None: each file is one image.

        Returns:
            The images; they are read on access.
        """
        return ResizedImages(self, size, crop, bits, window, views)

    def read(
        self, position: int, size: Size | None = None, crop: Size | None = None, bits: int | None = None,
        window: Window = None, views: Views | None = None,
    ) -> np.ndarray | None:  # fmt: skip
        """Read one image. If it fails, store the reason in ``errors``.

        Args:
            position: Position of the file in ``paths``.
            size: Size after resizing, in pixels. None keeps the size.
            crop: Size of the centre crop after resizing, in pixels. None keeps the whole image.
            bits: Bits that the camera uses of 16-bit samples, as in `recontrast.data.images.read_image`.
            window: Values that become 0 and 1, as in `recontrast.data.images.read_image`.
            views: Views of a part; None for a single image.

        Returns:
            (H, W, 3), uint8, or float32 with a window; (views, H, W, 3) for a part. None if a file cannot be read.
        """
        try:
            if self.check_shape is not None:
                self.check_shape(self.shape(position), str(self.paths[position]))
            if views is not None:
                return self._decode_views(position, size, crop, bits, window, views)
            return self._decode(position, size, crop, bits, window)
        except OSError as error:
            self.errors[position] = f"{self.paths[position]}: {error.strerror or error}"
        except ValueError as error:
            self.errors[position] = str(error)
        return None

    def read_many(
        self, positions: Sequence[int], bits: int | None = None, window: Window = None, views: Views | None = None
    ) -> list[np.ndarray | None]:
        """Read several images at their original sizes.

        Args:
            positions: Positions of the files in ``paths``.
            bits: Bits that the camera uses of 16-bit samples, as in `recontrast.data.images.read_image`.
            window: Values that become 0 and 1, as in `recontrast.data.images.read_image`.
            views: Views of each part; None: each file is one image.

        Returns:
            The result of `read` for each position.
        """
        return list(self._map(lambda position: self.read(position, bits=bits, window=window, views=views), positions))

    def group(self, count: int, window: Window = None, views: int = 1) -> Iterator[range]:
        """Divide the files into groups that can be in memory together at their original sizes.

        Args:
            count: Largest number of images in a group.
            window: Window of the images, whose pixels then have 4 times the bytes.
            views: Number of views of each part, which are in memory together.

        Yields:
            Positions of consecutive images, at most `recontrast.data.decode_budget.BYTES_IN_FLIGHT` bytes as RGB; or
            the position of one larger image.
        """
        start, total = 0, 0
        for position in range(len(self)):
            size = 3 * views * pixel_dtype(window).itemsize * self._count_pixels(position)
            if position > start and (position - start >= count or total + size > BYTES_IN_FLIGHT):
                yield range(start, position)
                start, total = position, 0
            total += size
        if start < len(self):
            yield range(start, len(self))

    def shape(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image in pixels, after applying its EXIF orientation."""
        return image_size(self.paths[index])

    def _count_pixels(self, position: int) -> int:
        """Return the number of pixels of an image; 0 if its file cannot be read, which `read` reports."""
        try:
            height, width = self.shape(position)
        except (OSError, ValueError):
            return 0
        return height * width

    def _decode(
        self, position: int, size: Size | None, crop: Size | None, bits: int | None = None, window: Window = None
    ) -> np.ndarray:
        """Decode one image; subclasses override this to read from other sources."""
        return read_image(self.paths[position], size=size, crop=crop, bits=bits, window=window)

    def _decode_views(
        self, position: int, size: Size | None, crop: Size | None, bits: int | None, window: Window, views: Views
    ) -> np.ndarray:
        """Decode all views of a part; subclasses override this to read from other sources."""
        return views.read(self.paths[position], size=size, crop=crop, bits=bits, window=window)


class ResizedImages:
    """Images of `ImageFiles`, resized to one size; unreadable files give black images.

    Args:
        files: Image files.
        size: Size after resizing, in pixels.
        crop: Size of the centre crop after resizing, in pixels. None keeps the whole image.
        bits: Bits that the camera uses of 16-bit samples, as in `recontrast.data.images.read_image`.
        window: Values that become 0 and 1, as in `recontrast.data.images.read_image`.
        views: Views of each part, which are images in sequence; None: each file is one image.
    """

    def __init__(
        self, files: ImageFiles, size: Size, crop: Size | None, bits: int | None = None, window: Window = None,
        views: Views | None = None,
    ) -> None:  # fmt: skip
        self.views = views
        self.files, self.size, self.crop, self.bits, self.window = files, size, crop, bits, window
        self.out = parse_size(size if crop is None else crop, "size")

    def __len__(self) -> int:
        return len(self.files) * (1 if self.views is None else len(self.views))

    def __getitem__(self, index: Any) -> np.ndarray:
        """Return the images at the indices ``index``, (n, H, W, 3) uint8, or float32 with a window."""
        if self.views is None:
            return np.stack(list(self.files._map(self._read, index)))
        return read_parts(self._read, index, len(self.views), self.files._map)

    def _read(self, position: int) -> np.ndarray:
        """Read one image, (H, W, 3), or the views of a part; black if a file cannot be read."""
        pixels = self.files.read(position, self.size, self.crop, self.bits, self.window, self.views)
        shape = (*self.out, 3) if self.views is None else (len(self.views), *self.out, 3)
        return np.zeros(shape, pixel_dtype(self.window)) if pixels is None else pixels


def read_parts(read: Callable[[int], np.ndarray], index: Any, views: int, mapping: Any = map) -> np.ndarray:
    """Return views of parts by their positions among all views, and read each part once.

    Args:
        read: Function that returns the views (views, H, W, 3) of a part by its position.
        index: Positions of views, (n,), ascending.
        views: Number of views of a part.
        mapping: Function such as ``map``.

    Returns:
        The views, (n, H, W, 3).
    """
    index = np.asarray(index, np.int64)
    parts, inverse = np.unique(index // views, return_inverse=True)
    pixels = np.stack(list(mapping(read, parts.tolist())))
    return pixels[inverse, index % views]


def describe_image_error(path: str, error: BaseException, views: Views | None = None) -> str:
    """Describe an error about an image in one sentence that names the image once.

    Args:
        path: Path of the image or part.
        error: Error of reading the image or its mask, or of writing its results.
        views: Views of the part, whose paths name it too; None for a single image.

    Returns:
        The sentence.
    """
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    names = [path, *map(str, list_sources([path], views))]
    return text if any(name in text for name in names) else f"{path}: {text or type(error).__name__}"


def assign_result_names(paths: Sequence[Path]) -> list[Path]:
    """Return a unique path below the output folder for the results of each image.

    The path repeats the subfolders below the common parent of all files. The suffix is dropped, unless two files differ
    only in it (``a.png`` and ``a.jpg``).

    Args:
        paths: Paths of the images, without duplicates.

    Returns:
        One relative path for each image.
    """
    full = [Path(os.path.abspath(path)) for path in paths]
    shared = os.path.commonpath([path.parent for path in full])
    relative = [path.relative_to(shared) for path in full]
    count = Counter(path.with_suffix("") for path in relative)
    names = [path if count[path.with_suffix("")] > 1 else path.with_suffix("") for path in relative]
    return names if len(set(names)) == len(names) else relative
