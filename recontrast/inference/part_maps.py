"""Maps and scores of parts from those of their views, whatever computes these; without PyTorch."""

from collections.abc import Iterable, Sequence
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
    return joined, _score_part(joined, scores, recipe, inside)


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
    views = len(recipe.image_views)
    of_parts, own = maps.reshape(-1, views, *maps.shape[1:]), scores.reshape(-1, views).tolist()
    joined = of_parts.max(axis=1) if recipe.view_map == "max" else of_parts.mean(axis=1)  # NaN stays
    return joined, np.array([_score_part(*part, recipe, inside) for part in zip(joined, own, strict=True)], np.float32)


def _score_part(
    joined: NDArray[np.float32], scores: Sequence[float], recipe: Recipe, inside: NDArray[np.bool_] | None
) -> float:
    """Return the score of a part from its map and the scores of its views."""
    if recipe.score != "model":
        return score_map(joined, recipe.score, inside)
    own = max(scores) if recipe.view_map == "max" else float(np.mean(scores))
    return own if is_finite(joined) else float("nan")
