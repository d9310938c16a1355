"""Division of images that a fitted detector is extended by: those to add and those held out for a calibration."""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from recontrast.checkpoint import Checkpoint
from recontrast.data.dataset_sample import Sample
from recontrast.data.fingerprint import read_fingerprints
from recontrast.data.groups import name_group, pair_groups
from recontrast.data.listing import DataWarning
from recontrast.data.near_copies import (
    MOST_SKETCHES,
    describe_near_copies,
    describe_trained,
    find_near_copies,
    merge_copies,
    read_sketches,
)
from recontrast.training.holdout import split_holdout


def split_new_images(
    samples: Sequence[Sample], sketches: Sequence[NDArray[np.float32]], saved: Checkpoint, holdout: float, option: str
) -> tuple[list[Sample], list[Sample], list[int]]:
    """Divide new images into those to add and those to hold out, with each picture that was saved again on one side.

    So does each group. New images that seem to be training images, saved again, and those of groups that were trained
    on are never held out. Warns (`recontrast.data.listing.DataWarning`) of copies.

    Args:
        samples: New images without copies.
        sketches: Their sketches, see `recontrast.data.near_copies.sketch_image`.
        saved: Checkpoint of the detector, with the sketches of its training images.
        holdout: Share of the new images to hold out, in [0, 1).
        option: Option or argument that gave the images, for messages.

    Returns:
        The images to add; those to hold out, one of each picture; and the number of the group of each of the latter.

    Raises:
        ValueError: If the share is above 0 and one of the two parts is empty.
    """
    paths = [sample.path for sample in samples]
    known = read_sketches(saved.images)
    if len(known) + len(paths) > MOST_SKETCHES:
        known = known[:0]
    n = len(known)
    pairs = find_near_copies(np.concatenate([known, np.stack(sketches)]))
    trained = sorted({second - n for first, second in pairs if first < n <= second})
    pairs = [(first - n, second - n) for first, second in pairs if first >= n]
    pictures = merge_copies(range(len(paths)), pairs)
    owners = merge_copies(pictures, pair_groups([name_group(sample) for sample in samples]))
    consequence = "the detector sees them more often than others"
    if holdout:
        consequence = "they are added or held out together, and count as one image of the calibration"
    texts = [describe_near_copies(paths, pairs, consequence), describe_trained([paths[i] for i in trained], len(paths))]
    if not read_fingerprints(saved.images):
        texts.append(
            "images that the detector was trained on are not told from new ones, and all are added: the checkpoint is "
            "of an older version"
        )
    elif not n:
        texts.append(
            "training images that were saved again are not searched: the checkpoint is of an older version, or there "
            f"are more than {MOST_SKETCHES} images"
        )
    for text in texts:
        if text is not None:
            warnings.warn(f"{option}: {text}", DataWarning, stacklevel=3)
    if not holdout:
        return list(samples), [], []
    groups = set(saved.images.get("groups", []))
    used = {owners[index] for index in trained} | {owners[i] for i, s in enumerate(samples) if s.group in groups}
    free = [owner for owner in owners if owner not in used]
    if not free:
        raise ValueError(
            f"holdout: wanted new images to hold out, got {len(paths)} that seem to be training images or of their "
            "groups"
        )
    drawn = set(split_holdout(free, holdout, saved.recipe.seed, free)[1])
    held_out = [index for index, owner in enumerate(owners) if owner in drawn and pictures[index] == index]
    return (
        [sample for sample, owner in zip(samples, owners, strict=True) if owner not in drawn],
        [samples[index] for index in held_out],
        [owners[index] for index in held_out],
    )
