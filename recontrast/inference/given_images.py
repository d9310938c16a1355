"""Images given as paths, folders, PIL images and arrays, as one list."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recontrast.data.decode import apply_orientation
from recontrast.data.encoded_image import ImagePage
from recontrast.data.image_files import ImageFiles
from recontrast.data.images import image_size, read_image
from recontrast.data.in_memory import check_item, check_shape, fit_given, refuse_container
from recontrast.data.listing import list_images
from recontrast.data.views import Views, group_paths
from recontrast.data.window import Window, to_levels

ACCEPTED = (
    "an image or a list of images: paths, folders, PIL images, arrays (h, w) or (h, w, 3), or one array (n, h, w, 3)"
)


class GivenImages(ImageFiles):
    """Paths, PIL images and arrays, mixed, with the interface of `ImageFiles`.

    Args:
        images: One image or several, see `list_given`.
        pool: Threads that decode, see `ImageFiles`.
        views: Views of each part, whose paths are then joined; None for single images.

    Attributes:
        names: Name of each image: its path, or "image N" with its index.
        sources: Path, PIL image or array of each image.

    Raises:
        ValueError: If there is no image, or an item of another type; with views, if one is no path of a view.
        FileNotFoundError: If a path does not exist.
    """

    def __init__(self, images: Any, pool: ThreadPoolExecutor | None = None, views: Views | None = None) -> None:
        super().__init__([], pool)
        self.sources = list_given(images)
        if views is not None:
            for source in self.sources:
                if not isinstance(source, Path):
                    wanted = f"paths of parts with the views {views.describe()}"
                    raise ValueError(f"images: wanted {wanted}, got {type(source).__name__}")
            self.sources = group_paths(self.sources, views)
        self.names = [
            str(source) if isinstance(source, Path) else f"image {index}" for index, source in enumerate(self.sources)
        ]
        self.paths = [Path(name) for name in self.names]

    def _decode(self, index: int, size: Any, crop: Any, bits: int | None = None, window: Window = None) -> NDArray[Any]:
        source = self.sources[index]
        if isinstance(source, Path):
            return read_image(source, size=size, crop=crop, bits=bits, window=window)
        return fit_given(source, size=size, crop=crop, bits=bits, window=window, name=self.names[index])

    def _count_pixels(self, index: int) -> int:
        try:
            height, width = self.shape(index)
        except (OSError, ValueError):
            return 0
        return height * width

    def shape(self, index: int) -> tuple[int, int]:
        """Return the height and width of an image in pixels, after applying its EXIF orientation.

        Args:
            index: Index of the image.

        Returns:
            Height and width.
        """
        return measure_given(self.sources[index])


def measure_given(source: Any) -> tuple[int, int]:
    """Return the height and width of an image in pixels, after applying its EXIF orientation.

    Args:
        source: Path, page, PIL image or array.

    Returns:
        Height and width.
    """
    if isinstance(source, Path | ImagePage):
        return image_size(source)
    if isinstance(source, np.ndarray):
        return source.shape[0], source.shape[1]
    picture = apply_orientation(source)
    return picture.height, picture.width


def list_given(images: Any) -> list[Any]:
    """Return images of any kind as one list.

    Args:
        images: One image, or a sequence of images that may mix kinds: paths of files, paths of folders (searched
            recursively), PIL images, arrays (h, w) or (h, w, 3), uint8 or floats in [0, 1]; or one array (n, h, w, 3).

    Returns:
        Paths of files, PIL images and arrays.

    Raises:
        ValueError: If there is no image, or an item of another type.
        FileNotFoundError: If a path does not exist.
    """
    refuse_container(images)
    if isinstance(images, np.ndarray):
        if images.dtype.kind in "OU" and images.ndim != 1:
            raise ValueError(f"images: wanted {ACCEPTED}, got an array {images.shape} of {images.dtype}")
        if images.ndim == 2:
            images = [images]
        elif images.ndim == 3:
            if 4 < images.shape[0] and 4 < images.shape[2]:
                got = f"an array {images.shape}: pass list(images) for a stack of grey images"
                raise ValueError(f"images: wanted {ACCEPTED}, got {got}")
            check_shape(images, "images")
            images = [images]
        elif images.ndim != 4 and images.dtype.kind not in "OU":
            raise ValueError(f"images: wanted {ACCEPTED}, got an array {images.shape}")
    elif isinstance(images, str | Path | Image.Image) or hasattr(images, "__fspath__"):
        images = [images]
    elif not hasattr(images, "__iter__"):
        raise ValueError(f"images: wanted {ACCEPTED}, got {type(images).__name__}")
    listed: list[Any] = []
    for index, image in enumerate(images):
        check_item(image, index)
        if isinstance(image, str) or hasattr(image, "__fspath__"):
            listed += list_images(image)
        else:
            listed.append(image)
    if not listed:
        raise ValueError(f"images: wanted {ACCEPTED}, got none")
    return listed


def read_pixels(source: Any, name: str, bits: int | None = None, window: Window = None) -> NDArray[np.uint8]:
    """Read an image in its own size.

    Args:
        source: Path, page, PIL image or array.
        name: Name of the image in error messages.
        bits: Bits that the camera uses of 16-bit samples, as in `recontrast.data.images.read_image`.
        window: Values that become 0 and 1, as in `recontrast.data.images.read_image`.

    Returns:
        Pixels (H, W, 3), uint8; with a window rounded to 256 levels.

    Raises:
        ValueError: If the image cannot be read.
    """
    if isinstance(source, Path | ImagePage):
        return to_levels(read_image(source, bits=bits, window=window))
    return to_levels(fit_given(source, bits=bits, window=window, name=name))
