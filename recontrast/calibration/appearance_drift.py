"""Appearance drift: whether new good images look like the calibration images in light, contrast, focus and colour.

A weaker lamp may hardly change a detector's p-values of good images, and yet hide the defects. The images themselves
are therefore compared as well: four numbers per image, by rank tests. They are measured at the input size of the
network; a tiled detector measures the whole image, resized to the recipe's size.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recontrast.data.sources import Images

ALARM_LEVEL = 0.01  # probability of a warning if nothing has changed
# Measured properties, in [0, 1] except warmth in [-1, 1], with the words for a lower and a higher value.
PROPERTIES = {
    "brightness": ("darker", "brighter"),  # mean grey
    "contrast": ("flatter", "higher in contrast"),  # standard deviation of grey
    "sharpness": ("blurrier", "sharper or noisier"),  # mean absolute Laplacian of grey
    "warmth": ("bluer", "redder"),  # mean red less mean blue
}
GREY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue (ITU-R BT.601)
TEST_COUNT = 2 * len(PROPERTIES)  # two rank tests for each property


def describe_appearance(images: Images, batch: int = 16, views: int = 1) -> NDArray[np.float64]:
    """Measure the `PROPERTIES` of images.

    Args:
        images: Images decoded at one size, (n, H, W, 3), uint8, or float32 in [0, 1]; see
            `recontrast.inference.infer.infer`.
        batch: Number of images per batch.
        views: Number of views of a part, which are images in sequence; the properties of a part are their means.

    Returns:
        (n / views, 4) float64, rounded to 6 digits: brightness, contrast, sharpness and warmth, of grey values in
        [0, 1].
    """
    parts = [np.empty((0, len(PROPERTIES)))]
    for start in range(0, len(images), batch):
        read = images[np.arange(start, min(start + batch, len(images)))]
        pixels = read.astype(np.float32) / np.float32(255 if read.dtype == np.uint8 else 1)
        grey = np.pad(pixels @ GREY_WEIGHTS, ((0, 0), (1, 1), (1, 1)), "edge")
        inner = grey[:, 1:-1, 1:-1]
        laplacian = 4 * inner - grey[:, :-2, 1:-1] - grey[:, 2:, 1:-1] - grey[:, 1:-1, :-2] - grey[:, 1:-1, 2:]
        warmth = pixels[..., 0] - pixels[..., 2]
        values = (inner.mean((1, 2)), inner.std((1, 2)), np.abs(laplacian).mean((1, 2)), warmth.mean((1, 2)))
        parts.append(np.stack(values, 1).round(6))
    appearance = np.concatenate(parts).astype(np.float64)
    return appearance if views == 1 else appearance.reshape(-1, views, len(PROPERTIES)).mean(1).round(6)


@dataclass(frozen=True)
class AppearanceDrift:
    """Difference in appearance between new good images and the calibration images.

    Attributes:
        count: Number of new good images.
        p_value: Probability of a difference at least as large if nothing has changed.
        name: Name of the property (see `PROPERTIES`) that differs most.
        before: Median of this property over the calibration images.
        after: Median of this property over the new images.
    """

    count: int
    p_value: float
    name: str
    before: float
    after: float

    @property
    def is_significant(self) -> bool:
        """Whether the drift deserves a warning: ``p_value`` is below `ALARM_LEVEL`."""
        return self.p_value < ALARM_LEVEL

    def describe(self, noun: str = "image") -> str:
        """Return a sentence with the result and its consequence.

        Args:
            noun: What the detector scores, see `recontrast.recipes.recipe.Recipe.noun`.

        Returns:
            The sentence.
        """
        medians = f"{self.name} {self.after:.3g} instead of {self.before:.3g} in the median"
        p_value = f"p-value {self.p_value:.2g}"
        if not self.is_significant:
            return f"the new good {noun}s look like the calibration {noun}s ({', '.join(PROPERTIES)}; {p_value})"
        lower, higher = PROPERTIES[self.name]
        if self.after == self.before:
            change = "different in their spread"
        else:
            change = lower if self.after < self.before else higher
        return (
            f"{self.count} new good {noun}s do not look like the calibration {noun}s: they are {change} ({medians}; "
            f"{p_value}), and the promised false-alarm rate does not hold for them; calibrate again on such {noun}s"
        )


def measure_appearance_drift(calibration: NDArray[np.float64], new: NDArray[np.float64]) -> AppearanceDrift:
    """Compare the appearance of new good images with that of the calibration images.

    Each property is tested with Kolmogorov-Smirnov, which detects any difference, and with Mann-Whitney, which detects
    a shift with fewer images. The smallest of the eight p-values is multiplied by eight (Bonferroni).

    Args:
        calibration: Result of `describe_appearance` for the calibration images, (m, 4).
        new: Result of `describe_appearance` for the new images, (n, 4).

    Returns:
        The property that differs most, and its p-value.

    Raises:
        ValueError: If there are no calibration images or no new images.
    """
    from scipy.stats import ks_2samp, mannwhitneyu

    if not len(new) or not len(calibration):
        raise ValueError(
            f"check: wanted at least 1 calibration image and 1 new image, got {len(calibration)} and {len(new)}"
        )
    p_values = {
        name: min(ks_2samp(a, b).pvalue, mannwhitneyu(a, b).pvalue)
        for name, a, b in zip(PROPERTIES, new.T, calibration.T, strict=True)
    }
    name = min(p_values, key=lambda property_name: p_values[property_name])
    column = list(PROPERTIES).index(name)
    return AppearanceDrift(
        count=len(new),
        p_value=min(1.0, TEST_COUNT * float(p_values[name])),
        name=name,
        before=float(np.median(calibration[:, column])),
        after=float(np.median(new[:, column])),
    )
