"""Drawing of a prediction: image, heat map and outlined regions beside each other, with a caption; one overlay."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from recontrast.calibration.conformal import Calibration
from recontrast.data import heatmaps, images, large_maps
from recontrast.data.encoded_image import ImageSource
from recontrast.data.window import to_levels
from recontrast.recipes.recipe import Recipe

DISPLAY_SIDE = 320  # pixels of a drawn image's longer side: three of them fit beside each other in a notebook
OUTLINE = (0, 220, 120)  # green stands out on grey and on every heat color
ROI_OUTLINE = (70, 170, 255)  # of the region of interest
CAPTION_HEIGHT, MARGIN = 26, 6  # pixels


def fit_for_display(image: Image.Image) -> NDArray[np.uint8]:
    """Shrink an image to `DISPLAY_SIDE`, or enlarge it by an integer factor up to that side.

    Args:
        image: RGB image.

    Returns:
        Pixels (H, W, 3), uint8.
    """
    factor = DISPLAY_SIDE // max(image.size)
    if factor > 1:
        return np.asarray(image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST))
    scale = min(1.0, DISPLAY_SIDE / max(image.size))
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return np.asarray(image if scale == 1 else image.resize(size, Image.Resampling.BILINEAR))


def draw_heat(
    pixels: NDArray[np.uint8], anomaly: NDArray[np.float32], colors: tuple[float, float]
) -> NDArray[np.uint8]:
    """Draw an anomaly map over an image.

    Args:
        pixels: Image (H, W, 3), uint8.
        anomaly: Anomaly map (H, W).
        colors: Map values of the coldest and the hottest color.

    Returns:
        Overlay (H, W, 3), uint8.
    """
    low, high = colors
    return heatmaps.draw_overlay(pixels, (anomaly - low) / max(high - low, 1e-12))


def draw_outlines(
    pixels: NDArray[np.uint8], inside: NDArray[np.bool_], color: tuple[int, int, int] = OUTLINE
) -> NDArray[np.uint8]:
    """Draw a line around regions of an image.

    Args:
        pixels: Image (H, W, 3), uint8.
        inside: Pixels that belong to the regions, (H, W).
        color: Color of the line, RGB.

    Returns:
        Copy of the image with the line, (H, W, 3) uint8.
    """
    from scipy.ndimage import binary_dilation

    outlined = pixels.copy()
    outlined[binary_dilation(inside, iterations=2) & ~inside] = color
    return outlined


def join_panels(panels: Sequence[NDArray[np.uint8]], caption: str) -> Image.Image:
    """Join images of one height side by side, below a caption.

    Args:
        panels: Images (H, W, 3), uint8.
        caption: Text above the images.

    Returns:
        RGB picture.
    """
    width = sum(panel.shape[1] for panel in panels) + MARGIN * (len(panels) - 1)
    picture = Image.new("RGB", (width, panels[0].shape[0] + CAPTION_HEIGHT), "white")
    left = 0
    for panel in panels:
        picture.paste(Image.fromarray(panel), (left, CAPTION_HEIGHT))
        left += panel.shape[1] + MARGIN
    text = ImageDraw.Draw(picture)
    text.text((2, 4), caption, fill="black", font=ImageFont.load_default(15))
    return picture


def draw_overlay(
    source: ImageSource, anomaly: NDArray[np.float32], recipe: Recipe, calibration: Calibration | None,
    outlined: float | None = None, side: int | None = None,
) -> NDArray[np.uint8]:  # fmt: skip
    """Draw the heat map over one image.

    The coldest color stands for the median of the map. With a threshold on the maximum of the map, it has the middle
    color; without, the hottest color stands for the largest value of this map.

    Args:
        source: Image file, or its content.
        anomaly: Its map, (h, w).
        recipe: Recipe of the detector, for the part of the image that the map covers.
        calibration: Calibration with the threshold, or None.
        outlined: Map value above which regions are outlined; None outlines none.
        side: Largest side of the drawing; larger images are reduced by an integer factor.

    Returns:
        (H, W, 3) uint8, of at most `recontrast.data.large_maps.OVERLAY_PIXELS` pixels.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is no whole image.
    """
    from recontrast.inference.detector import map_extent  # it imports this module

    with images.reserve_memory(source):
        pixels = to_levels(images.read_image(source, bits=recipe.bits, window=recipe.window))
        factor = large_maps.find_reduction(pixels.shape[:2])
        if side is not None:
            factor = max(factor, math.ceil(max(pixels.shape[:2]) / side))
        pixels = large_maps.reduce_blocks(pixels, factor, "mean")
    finite = anomaly[np.isfinite(anomaly)]
    if not finite.size:
        finite = np.zeros(1, np.float32)
    middle = None if calibration is None or recipe.score != "max" else calibration.threshold
    low, high = heatmaps.colour_range([float(np.median(finite))], [float(finite.max())], middle)
    shape = pixels.shape[:2]
    top, left, height, width = map_extent(shape, recipe)
    whole = np.full(shape, low, np.float32)
    whole[top : top + height, left : left + width] = heatmaps.resize_map(anomaly, (height, width))
    drawn = large_maps.draw_overlay(pixels, (whole - low) / max(high - low, 1e-12))
    return drawn if outlined is None else draw_outlines(drawn, whole > outlined)
