"""Good images held out of training: what a calibration needs, since a detector knows those that it was trained on."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from recontrast import checkpoint
from recontrast.calibration.appearance_drift import describe_appearance
from recontrast.calibration.conformal import DEFAULT_PIXEL_RATE, DEFAULT_RATE, Calibration, calibrate_maps
from recontrast.checkpoint import digest
from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample
from recontrast.inference import tiling
from recontrast.inference.calibrate import calibrate
from recontrast.training.state import TrainingState, snapshot

Item = TypeVar("Item")
SHARE = 0.2  # of the good images, where a promise is asked for and no number of them


def split_holdout(items: Sequence[Item], share: float, seed: int) -> tuple[list[Item], list[Item]]:
    """Split the good training images by chance, the same way for the same seed.

    Args:
        items: in the order of the data set.
        share: of them to hold out, from 0 to below 1; rounded to whole images.
        seed: of the draw, the recipe's.

    Returns:
        What is trained on, and what is held out, both in their order.

    Raises:
        ValueError: a share above 0 that leaves nothing on one of the two sides.
    """
    if not share:
        return list(items), []
    count = round(share * len(items))
    if not 0 < count < len(items):
        raise ValueError(
            f"holdout: wanted at least 1 image held out and 1 to train on, got {count} of {len(items)} good images "
            f"held out (holdout {share:g}): give more images, or 0"
        )
    # A stream of its own: the order of training does not depend on it.
    chosen = set(np.random.default_rng([seed, len(items)]).permutation(len(items))[:count].tolist())
    return (
        [item for i, item in enumerate(items) if i not in chosen],
        [item for i, item in enumerate(items) if i in chosen],
    )


def resolve_holdout_count(count: int, rate: float | None, holdout: float | int | None) -> int:
    """How many of ``count`` good images calibrate, for a promised ``rate``; none without one.

    Args:
        count: good images in all.
        rate: promised share of false alarms, or None.
        holdout: a number of images, a share, or None for a fifth, or more where the promise needs more.

    Raises:
        ValueError: rate or holdout is no such number, or the images are too few.
    """
    if rate is None:
        return 0
    if not isinstance(rate, numbers.Real) or not 0 < rate < 1:
        raise ValueError(f"false_alarm_rate: wanted None or a share above 0 and below 1, got {rate!r}")
    needed = math.ceil(1 / rate - 1e-9) - 1
    if holdout is None:
        wanted = max(needed, math.ceil(SHARE * count))
        most, rest = count // 2, "half of them are left for training"
    elif isinstance(holdout, numbers.Integral) and not isinstance(holdout, bool):
        wanted, most, rest = int(holdout), count - 1, "one is left for training"
    elif isinstance(holdout, numbers.Real) and 0 < holdout < 1:
        wanted, most, rest = math.ceil(float(holdout) * count - 1e-9), count - 1, "one is left for training"
    else:
        raise ValueError(f"holdout: wanted None, a number of images or a share in (0, 1), got {holdout!r}")
    if not needed <= wanted <= most:
        raise ValueError(
            f"false_alarm_rate: a promise of {rate:g} wants at least {needed} images held out, and that {rest}, got "
            f"{wanted} held out of {count} good images"
        )
    return wanted


def calibrate_holdout(
    state: TrainingState, kept: Sequence[Sample], target: Path | None, cache_dir: str | Path | None
) -> Calibration:
    """Calibrate a trained detector on what was held out, and save it once more with that.

    The promise is the usual 0.01, or the smallest that so few images allow.

    Args:
        state: after its last step.
        kept: good images that it was not trained on.
        target: its checkpoint; None writes nothing.
        cache_dir: folder for decoded images; None keeps them in memory.
    """
    recipe, model = state.recipe, state.model
    promise: dict[str, Any] = {"rate": max(DEFAULT_RATE, 1 / (len(kept) + 1)), "source": "held out of training"}
    images = ImageCache(kept, recipe.size, recipe.crop, directory=None if recipe.tile else cache_dir)
    if recipe.tile is None:
        found = calibrate(model, recipe, images, **promise, batch=recipe.batch)
    else:  # whole images at their own scale, as they will be scored
        maps = tiling.infer_files([sample.path for sample in kept], model, recipe, recipe.batch)
        found = calibrate_maps(
            ((anomaly.numpy(), score.numpy()) for anomaly, score in maps), len(kept), **promise,
            pixel_rate=DEFAULT_PIXEL_RATE, weights=digest(model.state_dict(), recipe), seen=describe_appearance(images),
        )  # fmt: skip
    if target is not None:
        checkpoint.save(target, replace(snapshot(state), calibration=found))
    return found
