"""What leaves as a picture: heat colours, overlays, 16-bit and float maps; each file appears whole or not at all."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from recontrast.data.atomic import replace_file

# Black, violet, red, orange, pale yellow: lightness rises evenly, so it reads in grey and for the colour-blind.
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
MAX_OPACITY = 0.8  # of the hottest colour over the image: its structure stays visible below
COLOUR_TABLE = np.stack(
    [
        np.interp(np.linspace(0, 1, 256), np.linspace(0, 1, len(COLOUR_STOPS)), c)
        for c in zip(*COLOUR_STOPS, strict=True)
    ]
)


def colourise(values: np.ndarray) -> np.ndarray:
    """Heat colours of values in [0, 1] (clipped; NaN is 0): (...) -> uint8 (..., 3)."""
    index = np.rint(np.clip(np.nan_to_num(values), 0, 1) * 255).astype(np.intp)
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
    """Lay heat over an image in grey: the cold leaves it as it is, the hot covers it.

    Args:
        image: (H, W, 3) uint8.
        heat: (H, W) in [0, 1].

    Returns:
        (H, W, 3) uint8.
    """
    grey = image.astype(np.float32).mean(-1, keepdims=True)  # colour is left to the heat
    heat = np.clip(np.nan_to_num(heat), 0, 1).astype(np.float32)
    opacity = MAX_OPACITY * np.sqrt(heat)[..., None]  # the square root: a warm spot is seen before it is hot
    return np.rint(grey * (1 - opacity) + colourise(heat) * opacity).astype(np.uint8)


def resize_map(anomaly: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a map bilinearly: (h, w) float32 -> size (H, W) float32."""
    resized = Image.fromarray(np.ascontiguousarray(anomaly, np.float32)).resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(resized)


def reduce_to_peaks(anomaly: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The largest value of each block, along either axis on which a map (h, w) is longer than ``size`` (H, W)."""
    for axis, (length, wanted) in enumerate(zip(anomaly.shape, size, strict=True)):
        if length > wanted:
            anomaly = np.maximum.reduceat(anomaly, np.arange(wanted) * length // wanted, axis=axis)
    return anomaly


def to_uint16(anomaly: np.ndarray, top: float) -> np.ndarray:
    """Values in [0, top] as uint16, 65535 for ``top``."""
    return np.rint(np.clip(anomaly / top, 0, 1) * 65535).astype(np.uint16)


def save_png(path: Path, picture: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) uint8 as PNG."""
    _save(path, _encoded(Image.fromarray(picture), "PNG"))


def save_map(path: Path, anomaly: np.ndarray, kind: str, top: float) -> None:
    """Write one anomaly map.

    Args:
        path: the file.
        anomaly: (H, W), values in [0, top].
        kind: ``"tiff16"`` (uint16, 65535 stands for ``top``), ``"tiff32"`` (float32) or ``"npy"`` (float32).
        top: the largest value a map can have, 2 x pairs for a sum of cosine distances.
    """
    anomaly = np.ascontiguousarray(anomaly, np.float32)
    if kind == "npy":
        content = io.BytesIO()
        np.save(content, anomaly)
        _save(path, content.getvalue())
    elif kind == "tiff32":
        _save(path, _encoded(Image.fromarray(anomaly), "TIFF"))
    elif kind == "tiff16":
        _save(path, _encoded(Image.fromarray(to_uint16(anomaly, top)), "TIFF"))
    else:
        raise ValueError(f"maps must be tiff16, tiff32, npy or none, got {kind!r}")


def _encoded(image: Image.Image, kind: str) -> bytes:
    """The bytes of the file: Pillow itself writes past Python's file object, and a full disk goes unnoticed."""
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def _save(path: Path, content: bytes) -> None:
    with replace_file(path) as file:
        file.write(content)
