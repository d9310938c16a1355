"""Levels of ground-truth masks: black is normal, everything else anomalous, in whatever way the mask was stored.

Masks come as 0/255, as 0/1 or several labels, in colour, with soft borders, as transparency, and with the traces of
lossy compression. What is not plainly a mask is repaired with a note, or refused by name.
"""

import threading
import warnings
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from recontrast.data.eight_bits import to_eight_bits
from recontrast.data.formats import HEAD_BYTES
from recontrast.data.listing import DataWarning, PathLike
from recontrast.data.notices import warn_once
from recontrast.data.regular_file import open_regular
from recontrast.data.samples import read_deep, scale_to_eight_bits

MOST_LABELS = 8  # a grey mask with more values has soft borders, or traces of lossy compression
_SOFT_BORDER = 3  # pixels
_RINGING = 0.2  # of the largest value; what is brighter, away from bright areas, was drawn: thin soft lines
_MOST_GREY = 0.2  # share of pixels of medium grey above which the file is a picture
_INVERTED_SHARE = 0.9  # of anomalous pixels, with a hole inside and the whole border anomalous

NOTES = {
    "lossy": "has traces of lossy compression: pixels of at least half of full scale are anomalous",
    "alpha": "is drawn by its transparency: pixels that are not transparent are anomalous",
    "palette": "has a palette of one colour: all indices but 0 are anomalous",
    "background": "has a background that is not black: the darkest value is normal",
    "empty": "marks no pixel of an image with a defect: all its pixels count as normal",
    "full": "marks every pixel as anomalous",
    "large": "marks most pixels and nearly the whole border as anomalous: check that it is not inverted",
}
"""Text of each kind of note, after the name of the mask."""


class MaskNotes:
    """Masks that were repaired or look unusual, collected by several threads to be named in one warning a kind."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._paths: dict[str, list[Path]] = {}

    def add(self, kind: str, path: PathLike) -> None:
        """Note a mask.

        Args:
            kind: Key of `NOTES`.
            path: Path of the mask.
        """
        with self._lock:
            paths = self._paths.setdefault(kind, [])
            if Path(path) not in paths:
                paths.append(Path(path))

    def warn(self, most: int = 5) -> None:
        """Give one warning for each kind of note, with the number of masks and the first paths.

        Args:
            most: Number of paths to name.
        """
        with self._lock:
            noted, self._paths = self._paths, {}
        for kind, paths in sorted(noted.items()):
            names = ", ".join(map(str, sorted(paths)[:most])) + (f" and {len(paths) - most} more" * (len(paths) > most))
            subject = "mask" if len(paths) == 1 else f"{len(paths)} masks, each of which"
            warnings.warn(f"{subject} {NOTES[kind]}: {names}", DataWarning, stacklevel=2)


def note_mask(kind: str, path: PathLike, notes: MaskNotes | None) -> None:
    """Add a note, or warn about the first mask of this kind if notes are not collected.

    Args:
        kind: Key of `NOTES`.
        path: Path of the mask.
        notes: Collected notes, or None.
    """
    if notes is None:
        warn_once(f"mask {kind}", path, NOTES[kind])
    else:
        notes.add(kind, path)


def to_mask_levels(
    path: PathLike, image: Image.Image, is_lossy: bool = False, notes: MaskNotes | None = None
) -> NDArray[np.uint8]:
    """Convert a decoded mask to levels.

    Args:
        path: Name of the mask in error messages and notes.
        image: Decoded mask of any mode.
        is_lossy: Whether the file is compressed with loss.
        notes: Collects what was repaired; None warns.

    Returns:
        (H, W) uint8, from 0 (normal) to 255 (anomalous).

    Raises:
        ValueError: If the picture cannot be a mask: it is inverted, has no background, or is a photograph.
    """
    deep = read_deep(path, image)
    values, full = deep or (np.asarray(to_eight_bits(path, image)), 255)
    kinds = set()
    if deep is None:
        values, kind = _apply_alpha(image, values)
        kinds.add(kind)
    is_coloured = values.ndim == 3 and bool((values != values[:, :, :1]).any())
    grey = values.max(axis=2) if values.ndim == 3 else values
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > full:
        levels = np.where(grey != 0, np.uint8(255), np.uint8(0))
    elif is_lossy and high >= full // 16:
        _refuse_picture(path, grey, high)
        levels = np.where(2 * grey.astype(np.int64) >= low + high + 1, np.uint8(255), np.uint8(0))
        if ((levels != 0) != (grey != 0)).any():
            kinds.add("lossy")
    elif is_coloured:
        levels, kind = _convert_colours(path, grey)
        kinds.add(kind)
    else:
        levels, kind = _convert_grey(path, grey, full)
        kinds.add(kind)
    kinds.add(_check_coverage(path, levels))
    for kind in sorted(kinds - {""}):
        note_mask(kind, path, notes)
    return levels


def is_compressed_with_loss(path: PathLike) -> bool:
    """Return whether a file is a JPEG, an AVIF or a lossy WebP image."""
    with open_regular(path, "a mask") as file:
        head = file.read(HEAD_BYTES)
    return head.startswith(b"\xff\xd8\xff") or head[4:8] == b"ftyp" or head[8:16] == b"WEBPVP8 "


def _apply_alpha(image: Image.Image, colours: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], str]:
    """Return the colours (H, W) or (H, W, 3) with transparent pixels black, and the kind of note or ""."""
    if image.mode == "P" and not _varies(colours):
        indices = np.asarray(image)
        if "transparency" not in image.info and _varies(indices) and not indices.all():
            return np.where(indices != 0, np.uint8(255), np.uint8(0)), "palette"
    if image.mode not in ("LA", "La", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return colours, ""
    alpha = np.asarray(image.convert("RGBA"))[:, :, 3]
    if not _varies(alpha):
        return colours, ""
    visible = alpha != 0
    shown = np.where(visible if colours.ndim == 2 else visible[:, :, None], colours, 0).astype(np.uint8)
    if not _varies(colours) or not shown.any():
        return alpha, "alpha"
    return shown, "" if (shown == colours).all() else "alpha"


def _varies(pixels: NDArray[np.uint8]) -> bool:
    """Return whether not all pixels are equal."""
    return bool((pixels != pixels[:1, :1]).any())


def _convert_colours(path: PathLike, grey: NDArray[np.integer]) -> tuple[NDArray[np.uint8], str]:
    """Return the levels of a mask in colour, whose colours are labels; ``grey`` is the largest channel."""
    if grey.all():
        _refuse(path, "a picture in colour without any black pixel")
    _refuse_picture(path, grey, int(grey.max()))
    if len(np.unique(grey)) > 4 * MOST_LABELS and _has_ringing(grey, int(grey.max())):
        return np.where(2 * grey.astype(np.int64) > int(grey.max()), np.uint8(255), np.uint8(0)), "lossy"
    return np.where(grey != 0, np.uint8(255), np.uint8(0)), ""


def _convert_grey(path: PathLike, grey: NDArray[np.integer], full: int) -> tuple[NDArray[np.uint8], str]:
    """Return the levels of a grey mask, and the kind of note or ""."""
    low, high = int(grey.min()), int(grey.max())
    values, counts = np.unique(grey, return_counts=True)
    if low > 0 and low < high:
        background = int(values[counts.argmax()])
        if 2 * background > low + high:
            _refuse(path, f"one whose background has the value {background} and whose smallest value is {low}")
        limit = background + 1 if len(values) <= MOST_LABELS else (low + high + 1) // 2
        _refuse_picture(path, grey, high)
        return np.where(grey >= limit, np.uint8(255), np.uint8(0)), "background"
    if low == high and 1 < high < full / 2:
        _refuse(path, f"one whose pixels all have the value {high}")
    if 2 * high < full:
        return np.where(grey != 0, np.uint8(255), np.uint8(0)), ""
    if len(values) > MOST_LABELS:
        _refuse_picture(path, grey, high)
        if _has_ringing(grey, high):
            return np.where(2 * grey.astype(np.int64) > high, np.uint8(255), np.uint8(0)), "lossy"
    levels = grey if full == 255 else np.maximum(scale_to_eight_bits(grey, full), grey != 0)  # labels stay above 0
    return levels.astype(np.uint8), ""


def _has_ringing(grey: NDArray[np.integer], high: int) -> bool:
    """Return whether faint pixels, and no others, lie farther from bright ones than a soft border reaches."""
    bright = 2 * grey.astype(np.int64) >= high
    dark = (grey != 0) & ~bright
    if not dark.any():
        return False
    picture = Image.fromarray(bright.astype(np.uint8) * 255)
    near = np.asarray(picture.filter(ImageFilter.MaxFilter(2 * _SOFT_BORDER + 1))) > 0
    far = grey[dark & ~near]
    return bool(far.size and far.max() < _RINGING * high)


def _check_coverage(path: PathLike, levels: NDArray[np.uint8]) -> str:
    """Return the kind of note on the size of the anomalous area, or ""; raise if the mask is inverted."""
    marked = levels != 0
    share = float(marked.mean())
    if share == 1:
        return "full"
    if share <= 0.5:
        return ""
    border = np.concatenate([marked[0], marked[-1], marked[:, 0], marked[:, -1]])
    if share >= _INVERTED_SHARE and border.all():
        _refuse(path, f"one that marks {100 * share:.1f} % of the pixels and its whole border, which looks inverted")
    return "large" if border.mean() >= _INVERTED_SHARE else ""


def _refuse_picture(path: PathLike, grey: NDArray[np.integer], high: int) -> None:
    """Raise an error if too many pixels are of medium grey."""
    values = 4 * grey.astype(np.int64)
    medium = (values > high) & (values < 3 * high)
    if len(np.unique(grey[medium])) > MOST_LABELS and medium.mean() > _MOST_GREY:
        _refuse(path, f"a picture with {100 * medium.mean():.0f} % of its pixels of medium grey")


def _refuse(path: PathLike, got: str) -> NoReturn:
    raise ValueError(f"{path}: wanted a mask, black except for the defect, got {got}")
