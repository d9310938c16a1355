"""Curves to look at: ROC of images and per-region overlap of pixels; `recontrast.metrics` has the areas below them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.metrics import inputs, reference

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # x and y, both rising


def roc(scores: Any, labels: Any) -> Curve:
    """ROC curve, a corner for each distinct score: scikit-learn's ``roc_curve`` without dropping any.

    Args:
        scores: finite numbers of any shape and dtype, higher is more anomalous.
        labels: the shape of ``scores``, 1 anomalous, 0 good.

    Returns:
        False positive rate and true positive rate, float64, from (0, 0) to (1, 1).

    Raises:
        ValueError: scores that are not finite, or labels of one class.
    """
    values, positive = (x.ravel() for x in inputs.check_scores_and_labels(scores, labels))
    inputs.check_metrics_defined(values, positive)
    order = np.argsort(values, kind="stable")[::-1]
    values, positive = values[order], positive[order]
    last = np.flatnonzero(np.append(values[1:] != values[:-1], True))  # of each run of equal scores
    tp = np.cumsum(positive)[last]
    fp = last + 1 - tp
    return np.append(0.0, fp / fp[-1]), np.append(0.0, tp / tp[-1])


def pro(maps: Any, masks: Any, limit: float = 0.3) -> Curve:
    """Per-region-overlap curve of a data set, whose area over ``limit`` is `recontrast.metrics.aupro`.

    Bergmann et al., IJCV 2021, https://doi.org/10.1007/s11263-020-01400-4.

    Args:
        maps: (..., H, W) anomaly maps, finite.
        masks: the shape of ``maps``.
        limit: false positive rate in (0, 1] at which the curve ends, interpolated there.

    Returns:
        False positive rate and mean overlap, float64, from (0, 0) to ``limit``: a corner for each distinct value of
        an anomalous pixel; see `thin`.

    Raises:
        ValueError: maps that are not finite, masks without both kinds of pixel or of another shape, or a limit outside
            of (0, 1].
    """
    (stop,) = inputs.check_limits(limit)
    scores, positive = inputs.check_maps_and_masks(maps, masks)
    found = reference.compute_overlap_curve(scores, positive)
    if found is None:
        inputs.check_metrics_defined(scores, positive, "maps", "masks")
        raise ValueError("masks: wanted both kinds of pixel, got one")
    x, y = found
    end = float(np.interp(stop, x, y))
    inside = x < stop
    return np.append(x[inside], stop), np.append(y[inside], end)


def thin(curve: Curve, columns: int = 200) -> Curve:
    """A rising curve with few corners: the first and the last in each of equally wide columns of x.

    Args:
        curve: x and y, both rising.
        columns: at most twice as many corners are left, and the ends; at least 1.

    Returns:
        Corners of ``curve``, which lie on it; nowhere is it left by more than it rises within one column.

    Raises:
        ValueError: fewer than 1 column.
    """
    x, y = curve
    if columns < 1:
        raise ValueError(f"thin: columns: wanted at least 1, got {columns}")
    place = np.minimum((x - x[0]) / max(float(x[-1] - x[0]), 1e-300) * columns, columns - 1).astype(np.intp)
    changes = place[1:] != place[:-1]
    kept = np.append(True, changes) | np.append(changes, True)
    return x[kept], y[kept]
