"""Thresholds from good images alone: split-conformal p-values and a threshold with a promised false-alarm rate.

The p-value of an image with score s is ``(1 + #{calibration scores >= s}) / (n + 1)`` (Vovk, Gammerman and Shafer,
"Algorithmic Learning in a Random World", 2005; for anomaly detection: Laxhammar and Falkman, 2010). If the n
calibration images and a new good image are exchangeable, and the detector was trained on none of them, the p-value is
at most ``rate`` with probability at most ``rate``, on average over calibration sets. For one fixed calibration set, the
false-alarm rate follows a Beta distribution; see `false_alarm_interval`.

The pixel threshold comes from conformal risk control (Angelopoulos et al., ICLR 2024, arXiv 2208.02814, theorem 1): the
flagged share of a good image's map is a loss that is at most 1 and falls as the threshold rises.

Several images of one part are not exchangeable with images of other parts; parts are. With groups, n counts groups
(`recontrast.calibration.groups`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recontrast.calibration.appearance_drift import PROPERTIES
from recontrast.calibration.groups import HighestPixels, max_by_group, select_first

DEFAULT_RATE = 0.01  # promised false-alarm rate
DEFAULT_PIXEL_RATE = 0.01  # promised share of flagged pixels in a good image's map
_KEYS = {"appearance": "looks"}  # fields with another name in checkpoints and exported detectors
_OPTIONAL_FIELDS = ("views", "precision", "image_count")  # missing in older calibrations


@dataclass(frozen=True)
class Calibration:
    """Scores of good images that a detector was not trained on, and the thresholds derived from them.

    Attributes:
        scores: Scores of the calibration images, in ascending order, in the units of the map. Of a group of images,
            such as several of one part, only the largest.
        rate: Promised false-alarm rate on good images, in (0, 1), on average over calibration sets.
        threshold: Images with a higher score are defects.
        pixel_threshold: Pixels with a higher map value are flagged; None if only scores were available or the maps
            differ in size.
        pixel_rate: Promised share of flagged pixels in a good image's map, in (0, 1).
        pixel_guarantee: Whether conformal risk control (Angelopoulos et al., 2022) guarantees ``pixel_rate``. If not,
            the pixel threshold is an empirical quantile without a guarantee.
        source: Description of the origin of the good images.
        weights: `digest` of the detector; the scores are valid for no other detector.
        appearance: `PROPERTIES` of each calibration image, or of the first of each group; empty in older calibrations.
        views: Feature pairs of the maps, as in `Recipe`; None means as trained.
        precision: Precision of the maps, as in `Recipe`; None means as trained.
        image_count: Number of images in all groups; None if each image was a group of its own.

    Raises:
        ValueError: If the scores are not finite or not in ascending order, if the rate is below 1 / (n + 1), or if the
            threshold does not follow from the scores and the rate.
    """

    scores: tuple[float, ...]
    rate: float
    threshold: float
    pixel_threshold: float | None
    pixel_rate: float
    pixel_guarantee: bool
    source: str
    weights: str
    appearance: tuple[tuple[float, ...], ...] = ()
    views: str | None = None
    precision: str | None = None
    image_count: int | None = None

    def __post_init__(self) -> None:
        """Check that the fields are consistent."""
        scores = np.asarray(self.scores, np.float64)
        if not scores.size or not np.isfinite(scores).all() or (np.diff(scores) < 0).any():
            raise ValueError("calibration: scores: wanted finite numbers in ascending order, got others or none")
        if self.appearance and np.shape(self.appearance) != (len(self.scores), len(PROPERTIES)):
            wanted = f"{len(PROPERTIES)} numbers for each of {len(self.scores)} images"
            raise ValueError(f"calibration: looks: wanted {wanted}, got shape {np.shape(self.appearance)}")
        if self.threshold != conformal_threshold(self.scores, self.rate):
            raise ValueError(f"calibration: threshold: wanted the one of the scores and the rate, got {self.threshold}")

    @property
    def count(self) -> int:
        """Number of calibration images, or of groups of them, n."""
        return len(self.scores)

    def p_values(self, scores: ArrayLike) -> NDArray[np.float64]:
        """Compute the share of good images that score at least as high as a new image (Vovk et al., 2005).

        The share is taken over the calibration images and the new image itself.

        Args:
            scores: Scores of new images, (N,).

        Returns:
            (N,) float64 in [1 / (n + 1), 1]; NaN for a score that is not finite.
        """
        p_values = (1 + self._count_at_least(scores)) / (self.count + 1)
        return np.where(np.isfinite(np.asarray(scores, np.float64)), p_values, np.nan)

    def is_defect(self, scores: ArrayLike) -> NDArray[np.bool_]:
        """Return whether each image is a defect: its p-value is at most ``rate``.

        This is the same as a score above ``threshold``. A NaN counts as a defect, so that it never passes as good;
        `recontrast.inference.decisions.decide` calls such an image undecided.

        Args:
            scores: Scores of new images, (N,).

        Returns:
            (N,) bool.
        """
        return np.asarray(1 + self._count_at_least(scores) <= allowed_false_alarms(self.count, self.rate), np.bool_)

    def with_rate(self, rate: float) -> "Calibration":
        """Return a calibration with the same images and another promised rate.

        Args:
            rate: Promised false-alarm rate, in [1 / (n + 1), 1).

        Returns:
            A new calibration.

        Raises:
            ValueError: If the rate is outside this interval.
        """
        return replace(self, rate=rate, threshold=conformal_threshold(self.scores, rate))

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can represent; `from_dict` is the inverse."""
        values = {_KEYS.get(name, name): value for name, value in asdict(self).items()}
        values |= {"scores": list(self.scores), "looks": [list(numbers) for numbers in self.appearance]}
        # None is left out, so that versions without these fields can read the calibration.
        return {name: value for name, value in values.items() if name not in _OPTIONAL_FIELDS or value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """Create a calibration from the result of `to_dict`.

        Args:
            values: All fields by their serialised names; ``looks``, ``views``, ``precision`` and ``image_count`` may be
                missing.

        Returns:
            The calibration.

        Raises:
            ValueError: If a field is missing, unknown or invalid.
        """
        names = {_KEYS.get(field.name, field.name) for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) | {"looks", *_OPTIONAL_FIELDS} != names:
            got = ", ".join(sorted(map(str, values))) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"calibration: wanted the fields {', '.join(sorted(names))}, got {got}")
        arguments = {name: value for name, value in values.items() if name not in ("scores", "looks")}
        appearance = tuple(map(tuple, values.get("looks", ())))
        return cls(scores=tuple(values["scores"]), appearance=appearance, **arguments)

    def _count_at_least(self, scores: ArrayLike) -> NDArray[np.int64]:
        """Count the calibration scores that are at least each of ``scores``."""
        return self.count - np.searchsorted(np.asarray(self.scores), np.asarray(scores, np.float64), "left")


def calibrate_maps(
    batches: Iterable[tuple[NDArray[Any], NDArray[Any]]],
    count: int,
    *,
    rate: float,
    pixel_rate: float,
    source: str,
    weights: str,
    appearance: ArrayLike = (),
    names: Sequence[str] = (),
    groups: Sequence[int] | None = None,
) -> Calibration:
    """Compute both thresholds from the maps and scores of any detector.

    If the maps differ in size, no pixel threshold is set: the promise is about the share of an image's pixels, averaged
    over images with equal weight, while the quantile below is taken over all pixels.

    Args:
        batches: Maps (n, H, W) and scores (n,) of the good images, floating point, batch by batch.
        count: Number of images in all batches.
        rate: Promised false-alarm rate, at least 1 / (count + 1).
        pixel_rate: Promised share of flagged pixels in a good image's map, in (0, 1).
        source: Description of the origin of the images.
        weights: `digest` of the detector.
        appearance: Result of `recontrast.calibration.appearance_drift.describe_appearance` for the images, (count, 4),
            in any order; without it, the appearance of later images cannot be compared.
        names: Name of each image, for error messages. Without them, images are counted from 0.
        groups: Number of the group of each image, (count,): images of one part, for which the promise counts once
            (`recontrast.calibration.groups`). None: each image is a group of its own.

    Returns:
        The calibration.

    Raises:
        ValueError: If there are too few images or groups for the rate, a rate is not in (0, 1), the number of scores is
            not ``count``, or the score or the map of an image is not finite.
    """
    if groups is not None and len(groups) != count:
        raise ValueError(f"calibration: groups: wanted one number for each of {count} images, got {len(groups)}")
    groups = groups if groups is not None and len(set(groups)) < count else None
    units = count if groups is None else len(set(groups))
    allowed_false_alarms(units, rate)
    check_rates(rate, pixel_rate)
    is_guaranteed = units * pixel_rate + pixel_rate >= 1
    flagged_share = ((units + 1) * pixel_rate - 1) / units if is_guaranteed else pixel_rate  # of all pixels
    scores: list[float] = []
    highest = HighestPixels(flagged_share, groups, units)
    for maps, batch_scores in batches:
        _refuse_not_finite(maps, batch_scores, len(scores), names)
        scores += batch_scores.astype(np.float64).tolist()
        highest.add(maps)
    if len(scores) != count:
        raise ValueError(f"calibration: scores: wanted those of {count} images, got {len(scores)}")
    ordered = tuple(sorted(max_by_group(scores, groups)))
    rows = np.asarray(appearance, np.float64)
    if groups is not None and len(rows) == count:
        rows = rows[select_first(groups)]
    return Calibration(
        scores=ordered,
        rate=rate,
        threshold=conformal_threshold(ordered, rate),
        pixel_threshold=highest.threshold(),
        pixel_rate=pixel_rate,
        pixel_guarantee=is_guaranteed and highest.is_one_size,
        source=source,
        weights=weights,
        appearance=tuple(map(tuple, rows.tolist())),
        image_count=None if groups is None else count,
    )


def _refuse_not_finite(maps: NDArray[Any], scores: NDArray[Any], start: int, names: Sequence[str]) -> None:
    """Raise an error that names the first image whose score or map is not finite; ``start`` is the first index."""
    pixels = np.asarray(maps).reshape(len(scores), -1)
    is_finite = np.isfinite(scores)
    if pixels.size:
        is_finite = is_finite & np.isfinite(pixels.min(axis=1)) & np.isfinite(pixels.max(axis=1))
    if not is_finite.all():
        index = start + int(np.argmin(is_finite))
        name = names[index] if names else f"image {index} (counted from 0)"
        raise ValueError(
            f"{name}: wanted a finite anomaly map of a good image, got NaN or infinite values: the detector cannot be "
            "calibrated with it"
        )


def check_rates(rate: float, pixel_rate: float = DEFAULT_PIXEL_RATE) -> None:
    """Check that a false-alarm rate and a pixel rate are shares.

    Args:
        rate: Promised false-alarm rate.
        pixel_rate: Promised share of flagged pixels in a good image's map.

    Raises:
        ValueError: If one of them is not above 0 and below 1.
    """
    if not 0 < rate < 1:
        raise ValueError(f"false-alarm rate: wanted a share above 0 and below 1, got {rate:g}")
    if not 0 < pixel_rate < 1:
        raise ValueError(f"calibration: pixel rate: wanted a share above 0 and below 1, got {pixel_rate:g}")


def allowed_false_alarms(count: int, rate: float, noun: str = "image") -> int:
    """Compute m = floor(rate * (n + 1)), the number of n + 1 exchangeable good images that may be called defects.

    Args:
        count: Number of calibration images, n.
        rate: Promised false-alarm rate.
        noun: What the error message counts, see `recontrast.recipes.recipe.Recipe.noun`.

    Returns:
        m, at least 1.

    Raises:
        ValueError: If the rate is not in (0, 1), or is below 1 / (n + 1), the lowest rate that n images can promise.
    """
    check_rates(rate)
    m = math.floor(rate * (count + 1) + 1e-9)  # tolerance: 0.29 * 100 is slightly below 29 in floating point
    if m < 1:
        needed = math.ceil(1 / rate - 1e-9) - 1
        raise ValueError(
            f"false-alarm rate: wanted at least 1/{count + 1} = {1 / (count + 1):.4g}, the lowest that {count} "
            f"calibration {noun}s can promise, got {rate:g}, which needs {needed} good {noun}s that were not trained on"
        )
    return m


def conformal_threshold(scores: tuple[float, ...], rate: float) -> float:
    """Return the m-th largest score, the threshold of split conformal prediction (Vovk et al., 2005; Lei et al., 2018).

    Args:
        scores: Scores of n good images, in ascending order.
        rate: Promised false-alarm rate; m = floor(rate * (n + 1)).

    Returns:
        The threshold; images with a higher score are defects.

    Raises:
        ValueError: If n is too small for the rate; see `allowed_false_alarms`.
    """
    return float(scores[-allowed_false_alarms(len(scores), rate)])


def false_alarm_interval(count: int, rate: float, share: float = 0.9) -> tuple[float, float]:
    """Compute the central interval in which the false-alarm rate of one calibration set lies.

    For continuous scores, the rate is Beta(m, n + 1 - m) distributed over calibration sets, with m = floor(rate *
    (n + 1)) (Vovk, "Conditional validity of inductive conformal predictors", 2012).

    Args:
        count: Number of calibration images, n.
        rate: Promised false-alarm rate.
        share: Share of calibration sets whose rate lies in the interval.

    Returns:
        The lower and the upper rate, in [0, 1].

    Raises:
        ValueError: If n is too small for the rate; see `allowed_false_alarms`.
    """
    from scipy.special import betaincinv

    m = allowed_false_alarms(count, rate)
    low, high = betaincinv(m, count + 1 - m, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def describe_promise(calibration: Calibration, noun: str = "image") -> list[str]:
    """Describe in sentences what a calibration promises.

    Args:
        calibration: The calibration.
        noun: What the detector scores, see `recontrast.recipes.recipe.Recipe.noun`.

    Returns:
        Sentences on the threshold, on the spread over calibration sets and on the pixel threshold, if there is one.
    """
    n, m = calibration.count, allowed_false_alarms(calibration.count, calibration.rate)
    low, high = false_alarm_interval(n, calibration.rate)
    kind, origin, subject = f"{noun}s", f"{n} good {noun}s ({calibration.source})", f"a new good {noun}"
    if calibration.image_count is not None:
        kind, subject = "groups", f"any {noun} of a new good group"
        origin = f"{n} groups of good {noun}s ({calibration.image_count} {noun}s, {calibration.source})"
    sentences = [
        f"threshold {calibration.threshold:.6g} from {origin}: {subject} of the same source is called a defect with "
        f"probability at most {m}/{n + 1} = {m / (n + 1):.4g}, on average over calibration sets",
        f"for 90 % of calibration sets of {n} {kind}, the false-alarm rate lies between {low:.4g} and {high:.4g} "
        f"(Beta({m}, {n + 1 - m})); more {kind} narrow this range",
    ]
    if calibration.pixel_threshold is None:
        return sentences
    pixels = f"{calibration.pixel_rate:.3g} of a good {noun}'s map"
    threshold = f"pixel threshold {calibration.pixel_threshold:.6g}"
    if calibration.pixel_guarantee:
        return [*sentences, f"{threshold}: on average at most {pixels} is flagged"]
    needed = math.ceil(1 / calibration.pixel_rate - 1e-9) - 1
    sentences.append(
        f"{threshold}: flags {calibration.pixel_rate:.3g} of the calibration {noun}s' maps, with no guarantee for new "
        f"{noun}s, which needs {needed} good {kind}"
    )
    return sentences
