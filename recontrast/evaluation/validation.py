"""Threshold of the maps of good validation images."""

import math
from collections.abc import Sequence

from recontrast.data.dataset_sample import GOOD, Sample
from recontrast.data.listing import list_images
from recontrast.evaluation.measures import find_prepared
from recontrast.evaluation.sample_images import open_images
from recontrast.evaluation.scorers import Scorer
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.clock import Clock


def choose_threshold(
    scorer: Scorer, tests: Sequence[Sample], recipe: Recipe, batch: int, workers: int | None
) -> float | None:
    """Choose a threshold for SegF1: mean plus three standard deviations of the maps of CATEGORY/validation/good.

    Args:
        scorer: Scorer of the detector.
        tests: Test images of the category, which say where it lies.
        recipe: Recipe of the maps.
        batch: Number of images, or tiles, per batch.
        workers: Number of threads that decode; None for one per CPU.

    Returns:
        The threshold, in units of the maps; None without validation images, or within a region of interest.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is not an image.
    """
    folder = find_prepared(tests[0])[1] / "validation" / GOOD
    if not folder.is_dir() or recipe.roi is not None:
        return None
    samples = [Sample(path, None, 0, tests[0].category, "calibration", GOOD) for path in list_images(folder)]
    clock = Clock(scorer.device)
    if recipe.tile is not None:
        maps = scorer.score_files([sample.path for sample in samples], batch, clock, None, lambda *_: None)
    else:
        maps = scorer.score_images(open_images(samples, recipe, workers, None), batch, clock)
    count, mean, squares = 0, 0.0, 0.0  # of all pixels so far: squares of the distances from the mean
    for anomaly, _ in maps:
        values = anomaly.double()
        own = float(values.mean())
        own_squares = float((values - own).square().sum())
        total = count + values.numel()
        squares += own_squares + (own - mean) ** 2 * count * values.numel() / total
        mean += (own - mean) * values.numel() / total
        count = total
    return mean + 3 * math.sqrt(squares / count) if count else None
