"""Regions of interest: which pixels of an image to look at.

A region is a mask, an image whose black pixels are outside and whose others, of one value, are inside; or rectangles
and polygons in JSON. It belongs to all images of a category, or a folder holds one for each image. `encode_mask` makes
a mask the text that a recipe stores.
"""

import base64
import functools
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data.decode import decoded
from recontrast.data.eight_bits import to_eight_bits
from recontrast.data.images import MAX_PIXELS, image_size
from recontrast.data.listing import PathLike
from recontrast.data.notices import warn_once
from recontrast.data.resize import Size, parse_size
from recontrast.data.roi_shapes import read_shapes
from recontrast.data.samples import read_deep

EACH = "each"
"""Value of the recipe field ``roi`` if each image has a mask of its own."""
LONGEST = 3 << 18  # characters of an encoded mask, which a recipe of 1 MiB holds
_ENCODED = re.compile(r"(\d{1,9})x(\d{1,9}) ([A-Za-z0-9_=-]+)", re.ASCII)

Mask = NDArray[np.bool_]


def read_roi(path: PathLike) -> Mask:
    """Read a region of interest from a mask image, or from rectangles and polygons in JSON.

    Args:
        path: Image file, or a file with the suffix ``.json``, see `recontrast.data.roi_shapes`.

    Returns:
        Mask (H, W), True inside.

    Raises:
        OSError: If the file does not exist or cannot be opened.
        ValueError: If it is not an image or not JSON, a shape is outside the image, the mask has more than two values
            or none that is black, or no pixel is inside.
    """
    if Path(path).suffix.lower() == ".json":
        return check_mask(read_shapes(path), str(path))
    with decoded(path, MAX_PIXELS) as picture:
        deep = read_deep(path, picture)
        values = np.asarray(to_eight_bits(path, picture)) if deep is None else deep[0]
    grey = values.max(axis=2) if values.ndim == 3 else values
    found = np.unique(grey)
    if len(found) > 2 or (len(found) == 2 and found[0] != 0):
        got = f"{len(found)} values" if len(found) > 2 else f"the values {found[0]} and {found[1]}"
        raise ValueError(f"{path}: wanted a mask of two values, black outside the region of interest, got {got}")
    return check_mask(grey != 0, str(path))


def check_mask(mask: Mask, name: str) -> Mask:
    """Return a mask if a pixel is inside.

    Args:
        mask: Mask (H, W), bool.
        name: Name of the mask in the error message.

    Returns:
        The mask.

    Raises:
        ValueError: If no pixel is inside.
    """
    if not mask.any():
        raise ValueError(f"{name}: wanted a region of interest with at least one pixel, got an empty one")
    return mask


def encode_mask(mask: Mask) -> str:
    """Encode a mask as a text: its height and width, and its compressed bits in the alphabet of base64.

    Args:
        mask: Mask (H, W), bool, with a pixel inside.

    Returns:
        The text.

    Raises:
        ValueError: If the border of the region is so long that the text exceeds 786,432 characters.
    """
    bits = base64.urlsafe_b64encode(zlib.compress(np.packbits(mask).tobytes(), 9)).decode()
    if len(bits) > LONGEST:
        raise ValueError(
            f"roi: wanted a region whose mask takes at most {LONGEST} characters, got one of {len(bits)}: draw it "
            "smaller or simpler"
        )
    return f"{mask.shape[0]}x{mask.shape[1]} {bits}"


@functools.lru_cache(maxsize=4)
def decode_mask(text: str) -> Mask:
    """Decode a mask, the inverse of `encode_mask`.

    Args:
        text: Result of `encode_mask`.

    Returns:
        Mask (H, W), bool, which cannot be written to.

    Raises:
        ValueError: If the text is not the result of `encode_mask`.
    """
    match = _ENCODED.fullmatch(text[: LONGEST + 32])
    if match is None:
        raise ValueError("roi: wanted height x width and the bits of a mask, got another text")
    height, width = int(match[1]), int(match[2])
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"roi: wanted a mask of 1 to {MAX_PIXELS} pixels, got {height} x {width}")
    count = (height * width + 7) // 8
    try:
        stream = zlib.decompressobj()
        content = stream.decompress(base64.urlsafe_b64decode(match[3]), count + 1)
    except (ValueError, zlib.error) as error:
        raise ValueError("roi: wanted the bits of a mask, got a damaged text") from error
    if len(content) != count or not stream.eof:
        raise ValueError(f"roi: wanted the {count} bytes of a mask of {height} x {width}, got others")
    mask = np.unpackbits(np.frombuffer(content, np.uint8), count=height * width).view(bool).reshape(height, width)
    mask.flags.writeable = False
    return check_mask(mask, "roi")


def describe_roi(roi: str | None) -> str:
    """Describe the recipe field ``roi`` in a few words.

    Args:
        roi: Value of the field: None, `EACH`, or an encoded mask.

    Returns:
        A clause such as "34.5 % of the image".
    """
    if roi is None:
        return "the whole image"
    if roi == EACH:
        return "a mask for each image"
    mask = decode_mask(roi)
    return f"{100 * mask.mean():.4g} % of the image ({mask.shape[1]} x {mask.shape[0]} px)"


def has_aspect(mask: Sequence[int], image: Sequence[int]) -> bool:
    """Return whether a mask has the aspect ratio of an image.

    The sides of the smaller one, enlarged, are then those of the larger one up to a pixel of the smaller one.

    Args:
        mask: Height and width of the mask.
        image: Height and width of the image.
    """
    (small_h, small_w), (large_h, large_w) = sorted([mask, image], key=lambda size: size[0] * size[1])
    return abs(small_h * large_w / large_h - small_w) < 1 or abs(small_w * large_h / large_w - small_h) < 1


def check_aspect(mask: Sequence[int], image: Sequence[int], mask_name: str, image_name: str) -> None:
    """Check that a mask can be laid over an image: both have one size, or sides of one ratio, see `has_aspect`.

    Warns once (`recontrast.data.notices.ImageWarning`) of a mask that is resized.

    Args:
        mask: Height and width of the mask.
        image: Height and width of the image.
        mask_name: Name of the mask in messages.
        image_name: Name of the image in messages.

    Raises:
        ValueError: If the ratios differ.
    """
    (h, w), (height, width) = mask, image
    if (h, w) == (height, width):
        return
    if not has_aspect(mask, image):
        raise ValueError(
            f"{mask_name}: wanted a mask of the size of {image_name}, {width} x {height} px, or of its aspect ratio, "
            f"got {w} x {h} px"
        )
    warn_once("roi size", mask_name, f"the mask of {w} x {h} px is resized to the images, {width} x {height} px here")


def resize_mask(mask: Mask, shape: Sequence[int]) -> Mask:
    """Resize a mask by nearest neighbours: each pixel takes the value at its centre.

    Args:
        mask: Mask (h, w), bool.
        shape: New height and width.

    Returns:
        Mask of ``shape``, bool; the mask itself if it has this shape.
    """
    if mask.shape == tuple(shape):
        return mask
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(shape, mask.shape, strict=True))
    return mask[np.ix_(rows, columns)]


def fit_mask(mask: Mask, size: Size | None, crop: Size | None, out: Sequence[int], name: str = "roi") -> Mask:
    """Resize and crop a mask as images are, to the size of their maps.

    Args:
        mask: Mask (h, w) of a whole image, bool.
        size: Size to which images are resized; None keeps the size.
        crop: Size of the centre crop, or None.
        out: Height and width of the map, which covers the resized or cropped image.
        name: Name of the mask in the error message.

    Returns:
        Mask of the map, bool.

    Raises:
        ValueError: If no pixel of the map is inside.
    """
    mask = mask if size is None else resize_mask(mask, parse_size(size, "size"))
    if crop is not None:
        height, width = parse_size(crop, "crop")
        top, left = round((mask.shape[0] - height) / 2), round((mask.shape[1] - width) / 2)
        mask = mask[top : top + height, left : left + width]
    mask = resize_mask(mask, out)
    if not mask.any():
        raise ValueError(
            f"{name}: wanted a region of interest with at least one pixel of the map of {out[1]} x {out[0]} px, got "
            "one that is too small or outside the crop"
        )
    return mask


class RoiFolder:
    """Folder with a mask or a JSON file for each image.

    A file belongs to an image if its path below the folder, without suffix, is the end of the path of the image. The
    name may end in ``_mask``. Among several the longest path counts.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it holds no file, or two that differ only in their suffix.
    """

    def __init__(self, folder: PathLike) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder}: wanted a folder of masks, got none")
        self._files: dict[tuple[str, ...], Path] = {}
        for path in sorted(self.folder.rglob("*")):
            if path.name.startswith(".") or not path.is_file():
                continue
            parts = path.relative_to(self.folder).with_suffix("").parts
            key = (*parts[:-1], parts[-1].removesuffix("_mask"))
            if key in self._files:
                raise ValueError(f"{path}: wanted one mask of this name, got {self._files[key].name} as well")
            self._files[key] = path
        if not self._files:
            raise ValueError(f"{folder}: wanted a folder with a mask for each image, got an empty one")

    def find(self, image: PathLike) -> Path:
        """Return the file that belongs to an image.

        Args:
            image: Path of the image.

        Returns:
            Path of the mask or JSON file.

        Raises:
            ValueError: If there is none.
        """
        parts = Path(image).absolute().with_suffix("").parts
        for start in range(len(parts)):
            if parts[start:] in self._files:
                return self._files[parts[start:]]
        raise ValueError(f"{self.folder}: wanted a mask for each image, got none named {parts[-1]} for {image}")

    def list_for(self, images: Iterable[PathLike]) -> list[Path]:
        """Return the files of images, in their order; raise ValueError if one is missing."""
        return [self.find(image) for image in images]


class RoiList:
    """Mask or JSON file of each image, with the interface of `RoiFolder`.

    Args:
        files: Path of the mask by path of the image.
    """

    def __init__(self, files: Mapping[Path, Path]) -> None:
        self._files = dict(files)

    def find(self, image: PathLike) -> Path:
        """Return the file that belongs to an image; raise ValueError if there is none."""
        if Path(image) not in self._files:
            raise ValueError(f"{image}: wanted a region of interest for each image, got none for this one")
        return self._files[Path(image)]

    def list_for(self, images: Iterable[PathLike]) -> list[Path]:
        """Return the files of images, in their order; raise ValueError if one is missing."""
        return [self.find(image) for image in images]


class ImageRois:
    """Masks of images that each have their own, at the size of their maps, read on access.

    Args:
        masks: Mask or JSON file of each image.
        images: Path of each image, whose size is compared; None skips the comparison.
        size: Size to which images are resized, as in `fit_mask`; None keeps the size.
        crop: Size of the centre crop, or None.
        out: Height and width of the maps.
    """

    def __init__(
        self, masks: Sequence[Path], images: Sequence[Path] | None, size: Size | None, crop: Size | None,
        out: Sequence[int],
    ) -> None:  # fmt: skip
        self.masks, self.images, self.size, self.crop, self.out = masks, images, size, crop, out

    def __len__(self) -> int:
        """Number of images."""
        return len(self.masks)

    def read(self, position: int) -> Mask:
        """Read a mask at the size of its image, (H, W) bool, or at its own where no images are given."""
        mask = read_roi(self.masks[position])
        if self.images is None:
            return mask
        shape = image_size(self.images[position])
        check_aspect(mask.shape, shape, str(self.masks[position]), str(self.images[position]))
        return resize_mask(mask, shape)

    def __getitem__(self, index: Any) -> Mask:
        """Return the masks of the maps at the positions ``index``, (n, H, W) bool."""
        return np.stack([
            fit_mask(self.read(int(i)), self.size, self.crop, self.out, str(self.masks[int(i)]))
            for i in np.atleast_1d(index)
        ])  # fmt: skip
