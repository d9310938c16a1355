"""Score drift: whether the p-values of new good images are uniform, as they are while a calibration is valid.

All p-values share one calibration set and are therefore dependent; a plain test for uniformity would warn too often.
The p-values are uniform exactly if the new scores are exchangeable with the calibration scores. The two-sample tests
below test that, and keep their level.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from recontrast.calibration.appearance_drift import ALARM_LEVEL
from recontrast.calibration.conformal import Calibration, allowed_false_alarms
from recontrast.calibration.groups import max_by_group


@dataclass(frozen=True)
class ScoreDrift:
    """Difference between the p-values of new good images and a uniform distribution.

    Attributes:
        count: Number of new good images.
        distance: Kolmogorov-Smirnov distance between the p-values and the uniform distribution.
        p_value: Combined p-value of the three tests of `measure_score_drift`.
        alarms: Number of new good images that are called defects.
        expected: Promised mean number of alarms.
    """

    count: int
    distance: float
    p_value: float
    alarms: int
    expected: float

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
        counts = f"{self.count} new good {noun}s, {self.alarms} called defects, {self.expected:.3g} expected"
        test = f"Kolmogorov-Smirnov distance {self.distance:.2f}; p-value {self.p_value:.2g}"
        if self.is_significant:
            return (
                f"p-values of good {noun}s are far from uniform ({test}; {counts}): these {noun}s differ from the "
                f"calibration {noun}s, and the promised false-alarm rate does not hold for them; calibrate again on "
                f"such {noun}s"
            )
        return f"p-values of good {noun}s are compatible with uniform ({test}; {counts})"


def measure_score_drift(calibration: Calibration, scores: ArrayLike, groups: Sequence[int] | None = None) -> ScoreDrift:
    """Compare the scores of new good images with those of the calibration images.

    Three tests are combined; the smallest p-value is multiplied by three (Bonferroni). Kolmogorov-Smirnov detects any
    difference. Mann-Whitney detects a shift with fewer images. The third test counts the false alarms, whose rate the
    calibration promises; they lie in a tail to which the other tests are not sensitive. If m of n calibration images
    may score at or above the threshold, the share of good images above it is distributed as Beta(m, n + 1 - m), and the
    number of alarms among the new images is exactly beta-binomial (Vovk, "Conditional validity of inductive conformal
    predictors", 2012).

    Args:
        calibration: Calibration of the detector that computed ``scores``.
        scores: Scores of the new images, (N,), N at least 1.
        groups: Number of the group of each new image, (N,), of which the largest score counts, as in the calibration.
            None: each image is a group of its own. If the calibration has groups, only higher scores are a drift, since
            its scores are the largest of several images.

    Returns:
        The distance, the combined p-value and the number of alarms.

    Raises:
        ValueError: If there are no scores, or a score is not finite.
    """
    from scipy.stats import betabinom, ks_2samp, mannwhitneyu

    new = np.asarray(scores, np.float64)
    if new.ndim != 1 or not new.size or (count := np.count_nonzero(~np.isfinite(new))):
        got = f"{count} that are not finite" if new.ndim == 1 and new.size else f"an array {new.shape}"
        raise ValueError(f"check: scores: wanted finite scores (n,) of at least 1 good image, got {got}")
    new = np.asarray(max_by_group(new.tolist(), groups), np.float64)
    reference = np.asarray(calibration.scores)
    sides = ("two-sided", "two-sided") if calibration.image_count is None else ("less", "greater")
    smirnov, shift = ks_2samp(new, reference, sides[0]), mannwhitneyu(new, reference, alternative=sides[1])
    alarms, allowed = int(calibration.is_defect(new).sum()), allowed_false_alarms(reference.size, calibration.rate)
    alarm_p_value = betabinom(new.size, allowed, reference.size + 1 - allowed).sf(alarms - 1)
    return ScoreDrift(
        count=new.size,
        distance=float(smirnov.statistic),
        p_value=min(1.0, 3 * float(min(smirnov.pvalue, shift.pvalue, alarm_p_value))),
        alarms=alarms,
        expected=calibration.rate * new.size,
    )
