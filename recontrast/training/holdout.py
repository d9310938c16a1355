"""Good images held out of training for the calibration, because the scores of training images are too low."""

import math
import numbers
import warnings
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
from recontrast.data.fingerprint import compute_fingerprint, read_fingerprints
from recontrast.data.groups import group_equal_samples, group_samples
from recontrast.data.listing import DataWarning
from recontrast.data.sources import Images, SelectedImages
from recontrast.inference import tiling
from recontrast.inference.calibrate import calibrate
from recontrast.inference.rois import open_rois, select_inside
from recontrast.recipes.recipe import Recipe
from recontrast.training.state import TrainingState, snapshot

Item = TypeVar("Item")
SHARE = 0.2  # of the good images, if a false-alarm rate is given without a number of images to hold out


def split_holdout(
    items: Sequence[Item], share: float, seed: int, copies: Sequence[int] | None = None
) -> tuple[list[Item], list[Item]]:
    """Split the good training images at random, in the same way for the same seed.

    Args:
        items: Images in the order of the data set.
        share: Share to hold out, in [0, 1); rounded to whole images.
        seed: Seed of the split.
        copies: For each image the position of the first image of its group, see
            `recontrast.data.groups.group_samples`; a group stays on one side, and counts once. None: all images are
            different.

    Returns:
        The images to train on and the held-out images, both in their original order.

    Raises:
        ValueError: If the share is above 0 and one of the two parts is empty.
    """
    if not share:
        return list(items), []
    owners = list(range(len(items))) if copies is None else list(copies)
    different = sorted(set(owners))
    count = round(share * len(different))
    if not 0 < count < len(different):
        kind = "good images" if len(different) == len(items) else "different good images"
        raise ValueError(
            f"holdout: wanted at least 1 image held out and 1 to train on, got {count} of {len(different)} {kind} "
            f"held out (holdout {share:g}): give more images, or set holdout to 0"
        )
    # A separate generator: the order of the training batches does not depend on the split.
    drawn = np.random.default_rng([seed, len(different)]).permutation(len(different))[:count]
    held_out = {different[index] for index in drawn.tolist()}
    return (
        [item for item, owner in zip(items, owners, strict=True) if owner not in held_out],
        [item for item, owner in zip(items, owners, strict=True) if owner in held_out],
    )


def resolve_holdout_count(count: int, rate: float | None, holdout: float | int | None) -> int:
    """Return how many of ``count`` good images to hold out for the calibration.

    Args:
        count: Number of good images.
        rate: False-alarm rate to guarantee; None calibrates nothing.
        holdout: Number of images to hold out, or their share; None holds out a fifth, or more if the rate needs more.

    Returns:
        The number of images; 0 if ``rate`` is None.

    Raises:
        ValueError: If rate or holdout is out of range, or if there are too few images.
    """
    if rate is None:
        return 0
    if not isinstance(rate, numbers.Real) or not 0 < rate < 1:
        raise ValueError(f"false_alarm_rate: wanted None or a share above 0 and below 1, got {rate!r}")
    needed = math.ceil(1 / rate - 1e-9) - 1
    if holdout is None:
        requested = max(needed, math.ceil(SHARE * count))
        limit, condition = count // 2, "half of them are left for training"
    elif isinstance(holdout, numbers.Integral) and not isinstance(holdout, bool):
        requested, limit, condition = int(holdout), count - 1, "one is left for training"
    elif isinstance(holdout, numbers.Real) and 0 < holdout < 1:
        requested, limit = math.ceil(float(holdout) * count - 1e-9), count - 1
        condition = "one is left for training"
    else:
        raise ValueError(f"holdout: wanted None, a number of images or a share in (0, 1), got {holdout!r}")
    if not needed <= requested <= limit:
        raise ValueError(
            f"false_alarm_rate: for a rate of {rate:g} wanted at least {needed} images held out while {condition}, got "
            f"{requested} held out of {count} good images"
        )
    return requested


def calibrate_holdout(
    state: TrainingState, held_out: Sequence[Sample], path: Path | None, images: Images | None,
    groups: Sequence[int] | None = None,
) -> Calibration:  # fmt: skip
    """Calibrate a trained detector on the held-out images and save the checkpoint again with the calibration.

    The guaranteed false-alarm rate is 0.01, or the lowest rate that the number of images allows.

    Args:
        state: State after the last step.
        held_out: Good images that were not used for training.
        path: Path of the checkpoint; None writes nothing.
        images: Their decoded images, the views of a part in sequence; None for a detector of tiles.
        groups: Number of the group of each image, for which the promise counts once. None: as the samples say.

    Returns:
        The calibration.
    """
    recipe, model = state.recipe, state.model
    groups = group_samples(held_out) if groups is None else groups
    positions = _select_different(state, held_out, images)
    held_out = [held_out[position] for position in positions]
    groups = [groups[position] for position in positions]
    rate = max(DEFAULT_RATE, 1 / (len(set(groups)) + 1))
    options: dict[str, Any] = {"rate": rate, "source": "held out of training", "groups": groups}
    rois = open_rois(recipe, held_out)
    if images is not None:
        views = _count_views(recipe)
        own = (np.array(positions)[:, None] * views + np.arange(views)).ravel()
        selected = SelectedImages(images, own)
        calibration = calibrate(model, recipe, selected, **options, batch=recipe.batch, rois=rois)
    else:  # tiles of whole images at full scale, as in prediction
        batches = tiling.infer_files([sample.path for sample in held_out], model, recipe, recipe.batch, rois=rois)
        calibration = calibrate_maps(
            select_inside(((maps.numpy(), scores.numpy()) for maps, scores in batches), rois),
            len(held_out),
            **options,
            pixel_rate=DEFAULT_PIXEL_RATE,
            weights=digest(model.state_dict(), recipe),
            appearance=describe_appearance(
                ImageCache(
                    held_out, recipe.size, recipe.crop, bits=recipe.bits, window=recipe.window, views=recipe.image_views
                ),
                views=_count_views(recipe),
            ),
        )
    if path is not None:
        checkpoint.save(path, replace(snapshot(state), calibration=calibration))
    return calibration


def _count_views(recipe: Recipe) -> int:
    """Return the number of images of a part."""
    return 1 if recipe.image_views is None else len(recipe.image_views)


def _select_different(state: TrainingState, held_out: Sequence[Sample], images: Images | None) -> list[int]:
    """Return the positions of held-out images that are no copies of each other and of training images.

    Warns of those left out.
    """
    owners, views = group_equal_samples(held_out), _count_views(state.recipe)
    different = [index for index in range(len(held_out)) if owners[index] == index]
    if images is not None:
        known = set(read_fingerprints(state.images))
        candidates, different = different, []
        for index in candidates:  # the same pixels, in files of different formats
            fingerprint = compute_fingerprint(images[np.arange(index * views, (index + 1) * views)])
            if fingerprint not in known:
                known.add(fingerprint)
                different.append(index)
    if not different:
        raise ValueError("holdout: wanted images to calibrate with, got only copies of training images held out")
    if len(different) < len(held_out):
        warnings.warn(
            f"holdout: {len(held_out) - len(different)} of {len(held_out)} held-out images are copies of others: the "
            f"calibration counts {len(different)}", DataWarning, stacklevel=3,
        )  # fmt: skip
    return different
