"""Parts with several views from a caller: paths, or sequences of their views as paths, PIL images and arrays."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from recontrast.data.in_memory import check_item, refuse_container
from recontrast.data.sources import Images
from recontrast.data.views import PAGES, Views, find_views

ACCEPTED = (
    "a sequence of parts: paths, of one of their views or of files of pages, or for each part a sequence of its views "
    "as paths, PIL images or arrays"
)


class PartImages:
    """Images of parts that are decoded already, the views of a part in sequence; see `FileImages`.

    Args:
        images: Images of all views.
        positions: Positions of the parts among all parts, (n,).
        views: Number of views of a part.

    Attributes:
        offsets: Position of the first view of each part, followed by the number of images.
    """

    def __init__(self, images: Images, positions: NDArray[np.int64], views: int) -> None:
        self.images = images
        self.rows = (np.asarray(positions)[:, None] * views + np.arange(views)).ravel()
        self.offsets: Sequence[int] = range(0, len(self.rows) + 1, views)

    def __len__(self) -> int:
        """Number of images of all views."""
        return len(self.rows)

    def __getitem__(self, index: Any) -> NDArray[np.uint8]:
        """Return the images at the positions ``index`` (n,): (n, H, W, 3), uint8, or float32 with a window."""
        return self.images[self.rows[index]]


def list_parts(parts: Any, source: str, names: Sequence[str] = ()) -> tuple[Views, list[Any]]:
    """List the views of parts.

    Args:
        parts: See `ACCEPTED`; or one array (n, views, h, w, 3) or (n, views, h, w).
        source: Where the views of a part are found, see `Views`.
        names: Names of the views. Empty: those that the paths have, the pages of the first file, or numbers for
            ``source`` "pages".

    Returns:
        The views, and the images of all parts, those of a part in sequence: paths, pages, PIL images and arrays.

    Raises:
        OSError: If a file of pages cannot be read.
        ValueError: If there are no parts, they are of another kind, the views are not known, or a part has another
            number of views, lacks one or has one twice.
    """
    refuse_container(parts)
    if isinstance(parts, str | os.PathLike | Image.Image) or not hasattr(parts, "__len__") or not len(parts):
        got = "none" if hasattr(parts, "__len__") and not len(parts) else type(parts).__name__
        raise ValueError(f"images: wanted {ACCEPTED}, got {got}")
    items = [Path(item) if isinstance(item, str | os.PathLike) else item for item in parts]
    views = Views(source, tuple(names) or _find_names(items, source))
    images: list[Any] = []
    for position, item in enumerate(items):
        images += views.locate(item) if isinstance(item, Path) else _list_views(item, position, views)
    return views, images


def _list_views(item: Any, position: int, views: Views) -> list[Any]:
    """Return the views of a part that is given as a sequence."""
    if isinstance(item, Image.Image) or not hasattr(item, "__len__"):
        raise ValueError(f"images: wanted {ACCEPTED}, got {type(item).__name__} at position {position}")
    if len(item) != len(views):
        wanted = f"{len(views)} views ({views.describe()})"
        raise ValueError(f"image {position}: wanted a part with {wanted}, got {len(item)}")
    for view in item:
        check_item(view, position)
    return _sort_views([Path(view) if isinstance(view, str | os.PathLike) else view for view in item], position, views)


def _sort_views(given: list[Any], position: int, views: Views) -> list[Any]:
    """Return the views of a part in their order if they are paths that name them; else as they are."""
    if views.source == PAGES or not all(isinstance(view, Path) for view in given):
        return given
    try:
        names = [views.divide(path)[1] for path in given]
    except ValueError:  # of files with other names, the order is that of the caller
        return given
    if twice := [name for name in views.names if names.count(name) > 1]:
        raise ValueError(f"image {position}: wanted each of the views {views.describe()} once, got {twice[0]} again")
    return [given[names.index(name)] for name in views.names]


def _find_names(items: Sequence[Any], source: str) -> tuple[str, ...]:
    """Find the names of the views, as training does."""
    if isinstance(items[0], Path) and source == PAGES:
        return find_views(source, [items[0]]).names
    whole = [item for item in items if not isinstance(item, Path) and hasattr(item, "__len__")]
    paths = [Path(view) for item in whole for view in item if isinstance(view, str | os.PathLike)]
    if source != PAGES and paths:
        return find_views(source, paths).names
    if source != PAGES or not whole:
        raise ValueError(
            "images: wanted each part as a sequence of the paths of its views, or the recipe field view_names, to find "
            f"the views by {source!r}, got neither"
        )
    return tuple(str(number + 1) for number in range(len(whole[0])))
