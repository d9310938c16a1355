"""Decisions from good images alone: split-conformal p-values, and a threshold that keeps a promised false-alarm rate.

An image's p-value is ``(1 + #{calibration scores >= s}) / (n + 1)`` (Vovk, Gammerman and Shafer, "Algorithmic Learning
in a Random World", 2005; for anomalies: Laxhammar and Falkman, 2010). If the n calibration images and a new good one
are exchangeable, and the detector was trained on none of them, it is at most ``rate`` with probability at most
``rate``: on average over calibration sets. Of one fixed set the rate of later false alarms is Beta distributed, see
`false_alarm_interval`.

The pixel threshold is that of conformal risk control (Angelopoulos et al., ICLR 2024, arXiv 2208.02814, theorem 1): the
flagged share of a good image's map is a loss that is at most 1 and falls as the threshold rises.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recontrast.calibration.appearance_drift import PROPERTIES

DEFAULT_RATE = 0.01  # false alarms promised where nothing else is asked for
DEFAULT_PIXEL_RATE = 0.01  # share of a good image's map that may be flagged
_KEYS = {"appearance": "looks"}  # fields that have another name in checkpoints and exported detectors
_INFERENCE_FIELDS = ("views", "precision")  # missing in older calibrations


@dataclass(frozen=True)
class Calibration:
    """What a detector said of good images that it was not trained on, and the promise that was chosen.

    Attributes:
        scores: of the calibration images, ascending, in the units of the map.
        rate: promised share of false alarms among good images, in (0, 1), on average over calibration sets.
        threshold: of the score: what is above it is a defect.
        pixel_threshold: of the map's values; None where only scores were known, or maps differ in size.
        pixel_rate: share of a good image's map above the pixel threshold, in (0, 1).
        pixel_guarantee: by conformal risk control (Angelopoulos et al., 2022); else an empirical quantile, which
            promises nothing.
        source: where the good images came from, in words.
        weights: `digest` of the detector: for any other the scores mean nothing.
        appearance: of each image, see `recontrast.calibration.appearance_drift`; of older ones unknown.
        views: targets of the maps whose scores these are, as in `Recipe`; None: as trained.
        precision: likewise.

    Raises:
        ValueError: scores out of order or not finite, a rate below 1 / (n + 1), or a threshold that is not theirs.
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

    def __post_init__(self) -> None:
        """Refuse what cannot be: scores out of order or not finite, a rate below 1 / (n + 1)."""
        scores = np.asarray(self.scores, np.float64)
        if not scores.size or not np.isfinite(scores).all() or (np.diff(scores) < 0).any():
            raise ValueError("calibration: scores: wanted finite numbers in ascending order, got others or none")
        if self.appearance and np.shape(self.appearance) != (len(self.scores), len(PROPERTIES)):
            raise ValueError(
                f"calibration: looks: wanted {len(PROPERTIES)} of each of {len(self.scores)} images, got others"
            )
        if self.threshold != conformal_threshold(self.scores, self.rate):
            raise ValueError(f"calibration: threshold: wanted that of the scores and the rate, got {self.threshold}")

    @property
    def count(self) -> int:
        """The number of calibration images, n."""
        return len(self.scores)

    def p_values(self, scores: ArrayLike) -> NDArray[np.float64]:
        """The share of good images, the new one among them, that score at least as high (Vovk et al., 2005).

        Args:
            scores: of new images, (N,).

        Returns:
            (N,) float64 in [1 / (n + 1), 1].
        """
        return (1 + self._above(scores)) / (self.count + 1)

    def is_defect(self, scores: ArrayLike) -> NDArray[np.bool_]:
        """Whether each p-value is at most ``rate``, which is score > ``threshold``; a NaN is a defect.

        Args:
            scores: of new images, (N,).

        Returns:
            (N,) bool.
        """
        return np.asarray(1 + self._above(scores) <= allowed_false_alarms(self.count, self.rate), np.bool_)

    def with_rate(self, rate: float) -> "Calibration":
        """The same images with another promise.

        Args:
            rate: promised share of false alarms, in [1 / (n + 1), 1).

        Returns:
            A new calibration.

        Raises:
            ValueError: a rate outside of that.
        """
        return replace(self, rate=rate, threshold=conformal_threshold(self.scores, rate))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values that JSON can hold."""
        values = {_KEYS.get(name, name): value for name, value in asdict(self).items()}
        values |= {"scores": list(self.scores), "looks": [list(numbers) for numbers in self.appearance]}
        # A None is left out, so that versions without these fields can read the calibration.
        return {name: value for name, value in values.items() if name not in _INFERENCE_FIELDS or value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Calibration":
        """The inverse of `to_dict`.

        Args:
            values: all fields by name; ``looks`` may be missing.

        Returns:
            The calibration.

        Raises:
            ValueError: a missing, unknown or impossible field.
        """
        names = {_KEYS.get(field.name, field.name) for field in fields(cls)}
        if not isinstance(values, Mapping) or set(values) | {"looks", *_INFERENCE_FIELDS} != names:
            got = ", ".join(sorted(map(str, values))) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(f"calibration: wanted the fields {', '.join(sorted(names))}, got {got}")
        arguments = {name: value for name, value in values.items() if name not in ("scores", "looks")}
        appearance = tuple(map(tuple, values.get("looks", ())))
        return cls(scores=tuple(values["scores"]), appearance=appearance, **arguments)

    def _above(self, scores: ArrayLike) -> NDArray[np.int64]:
        """How many calibration scores are at least each of ``scores``."""
        return self.count - np.searchsorted(np.asarray(self.scores), np.asarray(scores, np.float64), "left")


def calibrate_maps(
    found: Iterable[tuple[NDArray[Any], NDArray[Any]]], count: int, *, rate: float, pixel_rate: float, source: str,
    weights: str, seen: ArrayLike = (),
) -> Calibration:  # fmt: skip
    """As `calibrate`, from maps and scores of any detector.

    Maps of several sizes set no pixel threshold: its promise is of an image's share, and each image counts alike.

    Args:
        found: maps (n, H, W) and scores (n,), floating point, batch after batch.
        count: images in all.
        rate: as in `calibrate`.
        pixel_rate: as in `calibrate`.
        source: as in `calibrate`.
        weights: `digest` of the detector.
        seen: `recontrast.calibration.appearance_drift.describe_appearance` of the images, (count, 4), in any
            order; without them none can be compared later.

    Returns:
        The calibration.

    Raises:
        ValueError: too few images for the rate, rates that are no shares, another number of scores than ``count``, or
            scores or maps that are not finite.
    """
    allowed_false_alarms(count, rate)
    if not 0 < pixel_rate < 1:
        raise ValueError(f"calibration: pixel rate: wanted a share above 0 and below 1, got {pixel_rate:g}")
    guarantee = count * pixel_rate + pixel_rate >= 1
    share = ((count + 1) * pixel_rate - 1) / count if guarantee else pixel_rate  # of all pixels
    scores: list[float] = []
    highest = np.empty(0, np.float32)  # the largest map values so far: no more are kept than may be flagged
    size: tuple[int, ...] | None = None
    alike = True
    for maps, values in found:
        scores += values.astype(np.float64).tolist()
        alike = alike and maps.shape[1:] == (size := size or maps.shape[1:])
        if not alike:
            continue
        pixels = np.asarray(maps, np.float32).reshape(-1)
        keep = math.floor(max(share, 0) * count * (pixels.size // max(len(values), 1)) + 1e-6) + 1
        highest = np.concatenate([highest, pixels])
        if highest.size > keep:
            highest = np.partition(highest, highest.size - keep)[-keep:]
    if len(scores) != count:
        raise ValueError(f"calibration: scores: wanted those of {count} images, got {len(scores)}")
    if not np.isfinite(scores).all() or not np.isfinite(highest).all():
        raise ValueError("calibration: scores: wanted finite numbers, got others: the detector is not well trained")
    ordered = tuple(sorted(scores))
    return Calibration(
        scores=ordered, rate=rate, threshold=conformal_threshold(ordered, rate),
        pixel_threshold=float(highest.min()) if alike else None,
        pixel_rate=pixel_rate, pixel_guarantee=guarantee and alike, source=source, weights=weights,
        appearance=tuple(map(tuple, np.asarray(seen, np.float64).tolist())),
    )  # fmt: skip


def allowed_false_alarms(count: int, rate: float) -> int:
    """m, the whole part of rate * (n + 1): so many of n + 1 exchangeable images may be called defects.

    Args:
        count: calibration images, n.
        rate: promised share of false alarms.

    Returns:
        m, at least 1.

    Raises:
        ValueError: the rate is no share above 0 and below 1, or less than 1 / (n + 1), which nobody can promise.
    """
    if not 0 < rate < 1:
        raise ValueError(f"false-alarm rate: wanted a share above 0 and below 1, got {rate:g}")
    m = math.floor(rate * (count + 1) + 1e-9)  # 0.29 * 100 is a hair below 29
    if m < 1:
        needed = math.ceil(1 / rate - 1e-9) - 1
        raise ValueError(
            f"false-alarm rate: wanted at least 1/(n + 1), with {count} calibration images {1 / (count + 1):.4g}, got "
            f"{rate:g}, which needs {needed} good images that were not trained on"
        )
    return m


def conformal_threshold(scores: tuple[float, ...], rate: float) -> float:
    """The threshold of split conformal prediction (Vovk et al., 2005; Lei et al., 2018): the m-th largest score.

    Args:
        scores: of n good images, ascending.
        rate: promised share of false alarms; m = floor(rate * (n + 1)).

    Returns:
        What is above it is a defect.

    Raises:
        ValueError: as `allowed_false_alarms`.
    """
    return float(scores[-allowed_false_alarms(len(scores), rate)])


def false_alarm_interval(count: int, rate: float, share: float = 0.9) -> tuple[float, float]:
    """The central interval of the false-alarm rate of one fixed calibration set, over calibration sets.

    With continuous scores it is Beta(m, n + 1 - m) distributed, m = floor(rate * (n + 1)) (Vovk, "Conditional validity
    of inductive conformal predictors", 2012).

    Args:
        count: calibration images, n.
        rate: promised share of false alarms.
        share: of the sets that lie between the two returned rates.

    Returns:
        The lower and the upper rate, shares in [0, 1].

    Raises:
        ValueError: as `allowed_false_alarms`.
    """
    from scipy.special import betaincinv

    m = allowed_false_alarms(count, rate)
    low, high = betaincinv(m, count + 1 - m, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def describe_promise(found: Calibration) -> list[str]:
    """What ``found`` promises, in sentences."""
    n, m = found.count, allowed_false_alarms(found.count, found.rate)
    low, high = false_alarm_interval(n, found.rate)
    pixels = f"{found.pixel_rate:.3g} of a good image's map"
    lines = [
        f"threshold {found.threshold:.6g} from {n} good images ({found.source}): a new good image of the same "
        f"source is called a defect with probability at most {m}/{n + 1} = {m / (n + 1):.4g}, on average over "
        "calibration sets",
        f"with this one set the rate of false alarms lies between {low:.4g} and {high:.4g} in 90 % of such sets "
        f"(Beta({m}, {n + 1 - m})); more calibration images narrow it",
    ]
    if found.pixel_threshold is None:
        return lines
    if found.pixel_guarantee:
        return [*lines, f"pixel threshold {found.pixel_threshold:.6g}: on average at most {pixels} is flagged"]
    needed = math.ceil(1 / found.pixel_rate - 1e-9) - 1
    return [*lines, f"pixel threshold {found.pixel_threshold:.6g}: no guarantee, the empirical quantile that flags "
                    f"{pixels}; a promise needs {needed} good images"]  # fmt: skip
