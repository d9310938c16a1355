"""Heat-map colours and overlays, and anomaly maps as image files."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from recontrast.data.atomic import replace_file

# Black, violet, red, orange, pale yellow. Lightness rises evenly, so the scale also works in greyscale and for readers
# with a colour vision deficiency.
COLOUR_STOPS = (
    (0, 0, 4),
    (40, 11, 84),
    (101, 21, 110),
    (159, 42, 99),
    (212, 72, 66),
    (245, 125, 21),
    (250, 193, 39),
    (252, 255, 164),
)
MAX_OPACITY = 0.8  # opacity of the hottest colour: the image stays visible underneath
COLOUR_TABLE = np.stack(
    [
        np.interp(np.linspace(0, 1, 256), np.linspace(0, 1, len(COLOUR_STOPS)), c)
        for c in zip(*COLOUR_STOPS, strict=True)
    ]
)


def colourise(values: np.ndarray) -> np.ndarray:
    """Convert values to heat-map colours.

    Args:
        values: Array of any shape (...), values in [0, 1]. Values outside are clipped; one that is not finite counts
            as 1, so that it is seen.

    Returns:
        RGB colours, (..., 3) uint8.
    """
    index = np.rint(np.clip(_replace_not_finite(values, 1), 0, 1) * 255).astype(np.intp)
    return np.rint(COLOUR_TABLE.T[index]).astype(np.uint8)


def colour_range(medians: Sequence[float], peaks: Iterable[float], threshold: float | None) -> tuple[float, float]:
    """Compute the map values that get the coldest and the hottest colour.

    The coldest colour stands for the median of the maps. The threshold gets the middle colour; without one, or with one
    below the median, the hottest colour stands for the highest map value.

    Args:
        medians: Median of each map.
        peaks: Highest value of each map; read only if the threshold does not set the range.
        threshold: Threshold on map values.

    Returns:
        Lowest and highest map value of the colour scale.
    """
    low = float(np.median(medians))
    if threshold is not None and threshold > low:
        return low, 2 * threshold - low
    return low, max(peaks)


def draw_overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Draw a heat map over a greyscale copy of an image.

    Opacity rises with the square root of the heat, from 0 to `MAX_OPACITY`.

    Args:
        image: (H, W, 3) uint8.
        heat: (H, W), values in [0, 1]. Values outside are clipped; one that is not finite counts as 1, so that it is
            seen.

    Returns:
        (H, W, 3) uint8.
    """
    grey = image.astype(np.float32).mean(-1, keepdims=True)  # only the heat map has colour
    heat = np.clip(_replace_not_finite(heat, 1), 0, 1).astype(np.float32)
    opacity = MAX_OPACITY * np.sqrt(heat)[..., None]  # the square root makes weak heat visible
    return np.rint(grey * (1 - opacity) + colourise(heat) * opacity).astype(np.uint8)


def resize_map(anomaly: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a map with bilinear interpolation.

    Args:
        anomaly: (h, w) float32.
        size: New height and width, in pixels.

    Returns:
        (H, W) float32.
    """
    resized = Image.fromarray(np.ascontiguousarray(anomaly, np.float32)).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized)


def reduce_to_peaks(anomaly: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Shrink a map by taking the maximum of each block.

    Args:
        anomaly: (h, w).
        size: Largest height and width of the result, in pixels. An axis that is not longer keeps its length.

    Returns:
        (min(h, H), min(w, W)), in the dtype of ``anomaly``.
    """
    for axis, (length, limit) in enumerate(zip(anomaly.shape, size, strict=True)):
        if length > limit:
            anomaly = np.maximum.reduceat(anomaly, np.arange(limit) * length // limit, axis=axis)
    return anomaly


def to_uint16(anomaly: np.ndarray, top: float) -> np.ndarray:
    """Scale a map to 16-bit integers.

    Args:
        anomaly: (H, W), values in [0, top]. Values outside are clipped; one that is not finite becomes 65535, because
            16 bits cannot hold it.
        top: Value that becomes 65535.

    Returns:
        (H, W) uint16.
    """
    return np.rint(np.clip(_replace_not_finite(anomaly / top, 1), 0, 1) * 65535).astype(np.uint16)


def _replace_not_finite(values: np.ndarray, replacement: float) -> np.ndarray:
    return np.nan_to_num(values, nan=replacement, posinf=replacement, neginf=replacement)


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write an image as PNG.

    Args:
        path: File to write.
        picture: (H, W) or (H, W, 3) uint8.

    Raises:
        OSError: If the file cannot be written.
    """
    _write(path, encode_png(picture))


def encode_png(picture: np.ndarray) -> bytes:
    """Return an image as the bytes of a PNG file.

    Args:
        picture: (H, W) uint8 or uint16, or (H, W, 3) uint8.

    Returns:
        The file.
    """
    return _encode(Image.fromarray(picture), "PNG")


def encode_tiff(picture: np.ndarray) -> bytes:
    """Return an image as the bytes of a TIFF file.

    Args:
        picture: (H, W), uint8, uint16 or float32.

    Returns:
        The file.
    """
    return _encode(Image.fromarray(picture), "TIFF")


def save_map(path: Path, anomaly: np.ndarray, kind: str, top: float) -> None:
    """Write one anomaly map.

    Args:
        path: File to write.
        anomaly: (H, W), values in [0, top].
        kind: ``"tiff16"`` (uint16, 65535 stands for ``top``), ``"tiff32"`` (float32) or ``"npy"`` (float32).
        top: Largest possible map value; 2 x the number of pairs for a sum of cosine distances.

    Raises:
        ValueError: If ``kind`` is none of these.
        OSError: If the file cannot be written.
    """
    anomaly = np.ascontiguousarray(anomaly, np.float32)
    if kind == "npy":
        content = io.BytesIO()
        np.save(content, anomaly)
        _write(path, content.getvalue())
    elif kind == "tiff32":
        _write(path, encode_tiff(anomaly))
    elif kind == "tiff16":
        _write(path, encode_tiff(to_uint16(anomaly, top)))
    else:
        raise ValueError(f"maps: wanted tiff16, tiff32 or npy, got {kind!r}")


def _encode(image: Image.Image, kind: str) -> bytes:
    """Return an image as the bytes of a file.

    Encoding goes through memory, because Pillow writes past Python's file object and does not notice a full disk.
    """
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def _write(path: Path, content: bytes) -> None:
    """Write a file atomically."""
    with replace_file(path) as file:
        file.write(content)
