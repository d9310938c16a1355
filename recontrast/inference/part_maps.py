"""Maps and scores of parts from those of their views, whatever computes these; without PyTorch."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recontrast.inference.blend import MapAndScore, score_map
from recontrast.inference.finite import is_finite
from recontrast.recipes.recipe import Recipe


def join_views(
    results: Iterable[tuple[NDArray[np.float32], float]], recipe: Recipe, inside: NDArray[np.bool_] | None = None
) -> MapAndScore:
    """Compute the map and the score of a part, with no more than two maps in memory.

    Args:
        results: Map (H, W), float32, and score of each view of the part. The first map is changed.
        recipe: Recipe, for ``view_map`` and ``score``.
        inside: Region of interest of the maps, (H, W) bool; None: the whole image.

    Returns:
        The largest value or the mean of the maps, (H, W), float32, and its score. With the score "model" it is the
        largest value or the mean of the scores, or NaN if the map is not finite.
    """
    joined: NDArray[Any] | None = None
    scores = []
    for anomaly, score in results:
        scores.append(score)
        if joined is None:
            joined = anomaly
        elif recipe.view_map == "max":
            np.maximum(joined, anomaly, out=joined)  # NaN stays
        else:
            joined += anomaly
    if joined is None:
        raise ValueError("views: wanted the map of at least one view, got none")
    if recipe.view_map == "mean":
        joined /= np.float32(len(scores))
    if recipe.score != "model":
        return joined, score_map(joined, recipe.score, inside)
    own = max(scores) if recipe.view_map == "max" else float(np.mean(scores))
    return joined, own if is_finite(joined) else float("nan")


def join_parts(
    maps: NDArray[np.float32], scores: NDArray[np.float32], recipe: Recipe, inside: NDArray[np.bool_] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Compute the maps and scores of parts.

    Args:
        maps: Maps (parts * views, H, W), float32, the views of a part in sequence.
        scores: Scores (parts * views,), float32.
        recipe: Recipe with the views; without them, nothing changes.
        inside: Region of interest of the maps, (H, W) bool; None: the whole image.

    Returns:
        Maps (parts, H, W) and scores (parts,), float32.
    """
    if recipe.image_views is None:
        return maps, scores
    count = len(recipe.image_views)
    maps = maps.copy()  # arrays of a runtime may be read-only
    parts = [
        join_views(
            zip(maps[start : start + count], scores[start : start + count].tolist(), strict=True), recipe, inside
        )
        for start in range(0, len(maps), count)
    ]
    return np.stack([anomaly for anomaly, _ in parts]), np.array([score for _, score in parts], np.float32)
