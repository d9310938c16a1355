"""Rectangles and polygons of a region of interest, read from JSON.

The file states the size of the image that the shapes were drawn on, and positions in its pixels, from the upper left
corner::

    {
      "width": 1024, "height": 768,
      "rectangles": [[100, 80, 400, 300]],
      "polygons": [[[600, 100], [900, 100], [750, 500]]],
      "ignore": {"rectangles": [[150, 120, 40, 40]]}
    }

A rectangle is left, top, width and height, a polygon a list of corners [x, y]. The region is what lies in one of the
shapes and in none of those to ignore; without shapes beside "ignore", it is the rest of the image. A pixel lies in a
shape if its centre does, by the even-odd rule.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.data.json_text import parse_json
from recontrast.data.listing import PathLike
from recontrast.data.regular_file import read_bytes

LARGEST = 1 << 24  # bytes of a file
LARGEST_SIDE = 1 << 16  # pixels
_WANTED = "a region of interest in JSON"
_SHAPES = ("rectangles", "polygons")


def read_shapes(path: PathLike) -> NDArray[np.bool_]:
    """Read a JSON file and draw its shapes.

    Args:
        path: Path of the file.

    Returns:
        Mask (height, width), True inside.

    Raises:
        OSError: If the file does not exist or cannot be read.
        ValueError: If it is not JSON, a value is of another type, or a shape is outside the image.
    """
    text = read_bytes(path, _WANTED, LARGEST)
    try:
        content = parse_json(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: wanted {_WANTED}, got a file of another kind") from error
    except ValueError as error:
        raise ValueError(f"{path}: wanted {_WANTED}, got a text that is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: wanted {_WANTED} with width, height and shapes, got {type(content).__name__}")
    _check_keys(path, content, ("width", "height", *_SHAPES, "ignore"), "")
    size = [content.get(name) for name in ("width", "height")]
    if any(type(side) is not int or not 0 < side <= LARGEST_SIDE for side in size):
        shown = "neither" if size == [None, None] else f"{size!r:.80}"
        raise ValueError(
            f"{path}: width and height: wanted those of the image that the shapes were drawn on, 1 to {LARGEST_SIDE} "
            f"px, got {shown}"
        )
    width, height = (int(side) for side in size if side is not None)
    ignored = content.get("ignore", {})
    if not isinstance(ignored, dict):
        raise ValueError(f"{path}: ignore: wanted rectangles and polygons, got {type(ignored).__name__}")
    _check_keys(path, ignored, _SHAPES, "ignore: ")
    given = any(name in content for name in _SHAPES)
    if not given and not ignored:
        raise ValueError(f"{path}: wanted rectangles, polygons or ignore, got none of them")
    mask = np.ones((height, width), bool)
    if given:
        mask = _draw(path, content, (height, width), "")
    return mask & ~_draw(path, ignored, (height, width), "ignore: ")


def _check_keys(path: PathLike, content: dict[Any, Any], known: tuple[str, ...], part: str) -> None:
    unknown = [key for key in content if key not in known]
    if unknown:
        raise ValueError(f"{path}: {part}wanted the keys {', '.join(known)}, got {unknown[0]!r:.80}")


def _draw(path: PathLike, content: dict[str, Any], shape: tuple[int, int], part: str) -> NDArray[np.bool_]:
    """Draw all shapes of one part of the file."""
    mask = np.zeros(shape, bool)
    for name in _SHAPES:
        shapes = content.get(name, [])
        if not isinstance(shapes, list):
            raise ValueError(f"{path}: {part}{name}: wanted a list, got {type(shapes).__name__}")
        for number, values in enumerate(shapes, 1):
            where = f"{path}: {part}{name}: number {number}"
            corners = _rectangle(where, values) if name == "rectangles" else _polygon(where, values)
            height, width = shape
            if (corners < 0).any() or (corners > (width, height)).any():
                x, y = corners[((corners < 0) | (corners > (width, height))).any(axis=1)][0]
                raise ValueError(f"{where}: wanted corners in the image of {width} x {height} px, got ({x:g}, {y:g})")
            mask |= fill_polygon(corners, shape)
    return mask


def _is_point(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(
        type(v) in (int, float) and abs(v) < 2**31 and math.isfinite(v) for v in value
    )  # fmt: skip


def _rectangle(where: str, values: Any) -> NDArray[np.float64]:
    if not _is_point(values, 4) or values[2] <= 0 or values[3] <= 0:
        raise ValueError(f"{where}: wanted left, top, and a width and a height above 0, got {values!r:.80}")
    left, top, width, height = values
    return np.array([[left, top], [left + width, top], [left + width, top + height], [left, top + height]], float)


def _polygon(where: str, values: Any) -> NDArray[np.float64]:
    if not isinstance(values, list) or len(values) < 3 or not all(_is_point(value, 2) for value in values):
        raise ValueError(f"{where}: wanted at least three corners [x, y], got {values!r:.80}")
    return np.array(values, float)


def fill_polygon(corners: NDArray[np.float64], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Find the pixels whose centre lies in a polygon, by the even-odd rule.

    Args:
        corners: Corners (x, y) in pixels, (n, 2); the last one is joined to the first.
        shape: Height and width of the mask.

    Returns:
        Mask of ``shape``, bool.
    """
    height, width = shape
    crossings = np.zeros((height, width + 1), np.int64)  # edges that cross the row left of each pixel's centre
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        (x0, y0), (x1, y1) = ((x0, y0), (x1, y1)) if y0 <= y1 else ((x1, y1), (x0, y0))
        rows = np.arange(max(math.ceil(y0 - 0.5), 0), min(math.ceil(y1 - 0.5), height))  # y0 <= row + 0.5 < y1
        if rows.size:
            x = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
            columns = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)  # the first pixel whose centre is not left
            np.add.at(crossings, (rows, columns), 1)
    return np.cumsum(crossings[:, :width], axis=1) % 2 == 1
