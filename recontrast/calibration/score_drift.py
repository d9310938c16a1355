"""Whether a calibration still holds: p-values of new good images must look uniform.

The p-values of one calibration set depend on each other, so that a plain test for uniformity would alarm too often.
They are uniform exactly when the new scores could have stood among the calibration scores: the tests of two samples
below ask that, and so keep their level.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from recontrast.calibration.appearance_drift import ALARM_LEVEL
from recontrast.calibration.conformal import Calibration, allowed_false_alarms


@dataclass(frozen=True)
class ScoreDrift:
    """How far the p-values of new good images are from uniform.

    Attributes:
        count: new good images.
        distance: Kolmogorov-Smirnov, largest gap between the distribution of the p-values and the uniform one.
        p_value: of the three tests of `measure_score_drift` together: how often a departure like this comes by chance.
        alarms: new good images called defects.
        expected: at most so many, by the promise.
    """

    count: int
    distance: float
    p_value: float
    alarms: int
    expected: float

    @property
    def is_significant(self) -> bool:
        """Whether to warn: ``p_value`` is below `recontrast.calibration.appearance_drift.ALARM_LEVEL`."""
        return self.p_value < ALARM_LEVEL

    def describe(self) -> str:
        """What was found and what it means."""
        seen = f"{self.count} new good images, {self.alarms} called defects where {self.expected:.3g} were promised"
        test = f"Kolmogorov-Smirnov distance {self.distance:.2f}; as far by chance in {self.p_value:.2g} of cases"
        if self.is_significant:
            return (
                f"p-values of good images are far from uniform ({test}; {seen}): they do not look like the calibration "
                "images, and the promised false-alarm rate does not hold for them; calibrate anew on images like these"
            )
        return f"p-values of good images are compatible with uniform ({test}; {seen})"


def measure_score_drift(calibration: Calibration, scores: ArrayLike) -> ScoreDrift:
    """Compare the scores of new good images with those of the calibration images.

    The smallest p-value of three tests counts thrice (Bonferroni): Kolmogorov-Smirnov, which sees any difference;
    Mann-Whitney, which sees a shift with fewer images; and the number of false alarms, which is what was promised and
    lies in a tail that the others hardly look at. With n calibration images, of which m may lie at or above the
    threshold, the share of good images above it is distributed as Beta(m, n + 1 - m), and the number among the new ones
    as its beta-binomial, exactly (Vovk, "Conditional validity of inductive conformal predictors", 2012).

    Args:
        calibration: of the same detector.
        scores: of the new images, (N,), N at least 1.

    Returns:
        Distance, p-value and alarms.

    Raises:
        ValueError: no scores, or some that are not finite.
    """
    from scipy.stats import betabinom, ks_2samp, mannwhitneyu

    new = np.asarray(scores, np.float64)
    if new.ndim != 1 or not new.size or not np.isfinite(new).all():
        raise ValueError(f"check: scores: wanted finite scores of at least 1 good image, got {new.size} or others")
    known = np.asarray(calibration.scores)
    gap, shift = ks_2samp(new, known), mannwhitneyu(new, known)
    alarms, over = int(calibration.is_defect(new).sum()), allowed_false_alarms(known.size, calibration.rate)
    tail = betabinom(new.size, over, known.size + 1 - over).sf(alarms - 1)
    return ScoreDrift(
        count=new.size,
        distance=float(gap.statistic),
        p_value=min(1.0, 3 * float(min(gap.pvalue, shift.pvalue, tail))),
        alarms=alarms,
        expected=calibration.rate * new.size,
    )
