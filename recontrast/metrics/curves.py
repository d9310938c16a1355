"""Curves for plots: ROC of images and per-region overlap of pixels; `recontrast.metrics` computes their areas."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.metrics import inputs, reference

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # x and y, both non-decreasing


def roc(scores: Any, labels: Any) -> Curve:
    """Compute the ROC curve with a point for each distinct score.

    Same as scikit-learn's ``roc_curve`` with ``drop_intermediate=False``.

    Args:
        scores: Finite numbers of any shape and dtype. Higher is more anomalous.
        labels: Labels in the shape of ``scores``, 1 anomalous, 0 good.

    Returns:
        False positive rate and true positive rate, float64, from (0, 0) to (1, 1).

    Raises:
        ValueError: If a score is not finite, the shapes differ, or a class is missing.
    """
    values, positive = (x.ravel() for x in inputs.check_scores_and_labels(scores, labels))
    inputs.check_metrics_defined(values, positive)
    order = np.argsort(values, kind="stable")[::-1]
    values, positive = values[order], positive[order]
    last = np.flatnonzero(np.append(values[1:] != values[:-1], True))  # end of each run of equal scores
    tp = np.cumsum(positive)[last]
    fp = last + 1 - tp
    return np.append(0.0, fp / fp[-1]), np.append(0.0, tp / tp[-1])


def pro(maps: Any, masks: Any, limit: float = 0.3) -> Curve:
    """Compute the per-region-overlap curve of a data set; `recontrast.metrics.aupro` is its area divided by ``limit``.

    Bergmann et al., IJCV 2021, https://doi.org/10.1007/s11263-020-01400-4.

    Args:
        maps: Finite anomaly maps (..., H, W).
        masks: Masks in the shape of ``maps``.
        limit: False positive rate in (0, 1] at which the curve ends, by interpolation.

    Returns:
        False positive rate and mean overlap, float64, from (0, 0) to ``limit``, with a point for each distinct value
        of an anomalous pixel. `thin` reduces the number of points.

    Raises:
        ValueError: If a value is not finite, the shapes differ, the masks lack positive or negative pixels, or the
            limit is not in (0, 1].
    """
    (stop,) = inputs.check_limits(limit)
    scores, positive = inputs.check_maps_and_masks(maps, masks)
    curve = reference.compute_overlap_curve(scores, positive)
    if curve is None:
        inputs.check_metrics_defined(scores, positive, "maps", "masks")
        raise ValueError("masks: wanted positive and negative pixels, got one kind")
    x, y = curve
    count = int(np.searchsorted(x, stop, side="right"))
    if x[count - 1] == stop:  # a jump at the limit is kept: it adds nothing to the area
        return x[:count], y[:count]
    return np.append(x[:count], stop), np.append(y[:count], np.interp(stop, x, y))


def thin(curve: Curve, columns: int = 200) -> Curve:
    """Reduce the number of points of a rising curve: keep the first and the last point in each column of x.

    Args:
        curve: x and y, both non-decreasing.
        columns: Number of equally wide columns, at least 1.

    Returns:
        At most ``2 * columns`` points of ``curve``, including both ends. Between them, the new curve differs from the
        old one by at most the rise within a column.

    Raises:
        ValueError: If ``columns`` is less than 1.
    """
    x, y = curve
    if columns < 1:
        raise ValueError(f"thin: columns: wanted at least 1, got {columns}")
    column = np.minimum((x - x[0]) / max(float(x[-1] - x[0]), 1e-300) * columns, columns - 1).astype(np.intp)
    changes = column[1:] != column[:-1]
    keep = np.append(True, changes) | np.append(changes, True)
    return x[keep], y[keep]
