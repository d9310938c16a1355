"""Threshold of the maps of good validation images."""

import math
from collections.abc import Sequence

from recontrast.data.dataset_sample import GOOD, Sample
from recontrast.data.listing import list_images
from recontrast.data.part_samples import join_part_samples
from recontrast.device_limits import to_float64
from recontrast.evaluation.measures import find_prepared
from recontrast.evaluation.sample_images import open_images
from recontrast.evaluation.scorers import Scorer
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.clock import Clock


def choose_threshold(
    scorer: Scorer, tests: Sequence[Sample], recipe: Recipe, batch: int, workers: int | None, *, keep_errors: bool
) -> tuple[float | None, str]:
    """Choose a threshold for SegF1: mean plus three standard deviations of the maps of CATEGORY/validation/good.

    Args:
        scorer: Scorer of the detector.
        tests: Test images of the category, which say where it lies.
        recipe: Recipe of the maps.
        batch: Number of images, or tiles, per batch.
        workers: Number of threads that decode; None for one per CPU.
        keep_errors: Whether images that cannot be read or scored are left out, and named in the note. Otherwise their
            errors are raised.

    Returns:
        The threshold, in units of the maps, and a note, empty if there is nothing to say. The threshold is None without
        validation images, or within a region of interest.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is not an image, or its map is not finite.
    """
    folder = find_prepared(tests[0])[1] / "validation" / GOOD
    if recipe.roi is not None:
        return None, "no SegF1: there is no threshold, and none is chosen within a region of interest"
    if not folder.is_dir():
        return None, "no SegF1: there is no threshold, and no validation/good to choose it on"
    samples = [Sample(path, None, 0, tests[0].category, "calibration", GOOD) for path in list_images(folder)]
    samples = join_part_samples(samples, recipe.image_views)
    clock, errors = Clock(scorer.device), dict[int, str]()
    unread = errors if keep_errors else None
    if recipe.tile is not None:
        maps = scorer.score_files([sample.path for sample in samples], batch, clock, unread, lambda *_: None)
    else:
        maps = scorer.score_images(open_images(samples, recipe, workers, None, unread), batch, clock)
    count, mean, squares = 0, 0.0, 0.0  # of all pixels so far: squares of the distances from the mean
    start = 0
    for anomaly, scores in maps:
        positions = range(start, start + len(scores))
        start += len(scores)
        for position, score in zip(positions, scores.tolist(), strict=True):
            if position not in errors and not math.isfinite(score):
                errors[position] = f"{samples[position].path}: wanted a finite anomaly map, got NaN or infinite values"
                if not keep_errors:
                    raise ValueError(errors[position])
        usable = [index for index, position in enumerate(positions) if position not in errors]
        if not usable:
            continue
        values = to_float64(anomaly[usable])
        own = float(values.mean())
        own_squares = float((values - own).square().sum())
        total = count + values.numel()
        squares += own_squares + (own - mean) ** 2 * count * values.numel() / total
        mean += (own - mean) * values.numel() / total
        count = total
    if not count:
        return None, f"no SegF1: there is no threshold, and no image in {folder} could be scored: {errors[min(errors)]}"
    missing = "; ".join(errors[position] for position in sorted(errors))
    note = f"threshold without {len(errors)} of {len(samples)} validation images: {missing}" if errors else ""
    return mean + 3 * math.sqrt(squares / count), note
