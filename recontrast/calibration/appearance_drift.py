"""Whether good images still look like those of a calibration: light, contrast, focus and colour, whatever they score.

A detector may hardly see that a lamp is weaker, and its p-values then stay as they were, until a defect is dark too. So
the images themselves are compared as well: four numbers of each, by tests of ranks, measured at the size of the
network's input; for a detector of tiles, which leaves images their scale, on the whole image in the recipe's size.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recontrast.data.sources import Images

ALARM_LEVEL = 0.01  # so often it warns although nothing changed
# What is measured of an image, in [0, 1] but for the last, and what it is called where it is less and where it is more.
PROPERTIES = {
    "brightness": ("darker", "brighter"),  # mean grey
    "contrast": ("flatter", "higher in contrast"),  # standard deviation of grey
    "sharpness": ("blurrier", "sharper or noisier"),  # mean absolute Laplacian of grey
    "warmth": ("bluer", "redder"),  # mean red less mean blue
}
GREY = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue, ITU-R BT.601
TESTS = 2 * len(PROPERTIES)


def describe_appearance(images: Images, batch: int = 16) -> NDArray[np.float64]:
    """`PROPERTIES` of images.

    Args:
        images: decoded at one size, (n, H, W, 3) uint8; see `recontrast.inference.infer.infer`.
        batch: images at once.

    Returns:
        (n, 4) float64, rounded to 6 digits: brightness, contrast, sharpness and warmth, of grey values in [0, 1].
    """
    found = [np.empty((0, len(PROPERTIES)))]
    for start in range(0, len(images), batch):
        pixels = images[np.arange(start, min(start + batch, len(images)))].astype(np.float32) / 255
        grey = np.pad(pixels @ GREY, ((0, 0), (1, 1), (1, 1)), "edge")
        inner = grey[:, 1:-1, 1:-1]
        laplacian = 4 * inner - grey[:, :-2, 1:-1] - grey[:, 2:, 1:-1] - grey[:, 1:-1, :-2] - grey[:, 1:-1, 2:]
        warmth = pixels[..., 0] - pixels[..., 2]
        values = (inner.mean((1, 2)), inner.std((1, 2)), np.abs(laplacian).mean((1, 2)), warmth.mean((1, 2)))
        found.append(np.stack(values, 1).round(6))
    return np.concatenate(found).astype(np.float64)


@dataclass(frozen=True)
class AppearanceDrift:
    """How the looks of new good images differ from those of the calibration images.

    Attributes:
        count: new good images.
        p_value: how often a difference like this comes by chance.
        name: of `PROPERTIES`: what differs most.
        before: median over the calibration images, in the units of `PROPERTIES`.
        after: median over the new ones.
    """

    count: int
    p_value: float
    name: str
    before: float
    after: float

    @property
    def is_significant(self) -> bool:
        """Whether to warn: ``p_value`` is below `ALARM_LEVEL`."""
        return self.p_value < ALARM_LEVEL

    def describe(self) -> str:
        """What was found and what it means."""
        seen = f"{self.name} {self.after:.3g} instead of {self.before:.3g} in the median"
        test = f"as different by chance in {self.p_value:.2g} of cases"
        if not self.is_significant:
            return f"they look like the calibration images ({', '.join(PROPERTIES)}; {test})"
        less, more = PROPERTIES[self.name]
        how = less if self.after < self.before else more if self.after > self.before else "different in their spread"
        return (
            f"{self.count} new good images do not look like the calibration images: they are {how} ({seen}; {test}); "
            "the promised false-alarm rate is not for such images, calibrate anew on images like these"
        )


def measure_appearance_drift(known: NDArray[np.float64], new: NDArray[np.float64]) -> AppearanceDrift:
    """Compare looks of calibration images with those of new good ones.

    Kolmogorov-Smirnov, which sees any difference, and Mann-Whitney, which sees a shift with fewer images, of each of
    the four; the smallest p-value counts eight times (Bonferroni).

    Args:
        known: `describe_appearance` of the calibration images, (m, 4).
        new: `describe_appearance` of the new ones, (n, 4).

    Returns:
        What differs most.

    Raises:
        ValueError: no image on one side.
    """
    from scipy.stats import ks_2samp, mannwhitneyu

    if not len(new) or not len(known):
        raise ValueError(f"check: looks: wanted at least 1 image on each side, got {len(known)} and {len(new)}")
    p_values = {
        name: min(ks_2samp(a, b).pvalue, mannwhitneyu(a, b).pvalue)
        for name, a, b in zip(PROPERTIES, new.T, known.T, strict=True)
    }
    name = min(p_values, key=lambda one: p_values[one])
    place = list(PROPERTIES).index(name)
    return AppearanceDrift(
        len(new), min(1.0, TESTS * float(p_values[name])), name,
        float(np.median(known[:, place])), float(np.median(new[:, place])),
    )  # fmt: skip
