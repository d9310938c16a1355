"""Checks of a checkpoint and of the images that a detector is extended by, before anything is computed."""

from collections.abc import Sequence
from pathlib import Path

from recontrast.architectures import ARCHITECTURES, get_architecture
from recontrast.checkpoint import Checkpoint
from recontrast.data.datasets import Sample
from recontrast.data.fingerprint import read_fingerprints
from recontrast.recipes.recipe import Recipe
from recontrast.training.part_views import count_trained_images


def check_classes(samples: Sequence[Sample], recipe: Recipe, option: str) -> None:
    """Check that the class of each image is known if the run draws classes equally often.

    Args:
        samples: Images to add.
        recipe: Recipe of the run.
        option: Option or argument that gave the images, for messages.

    Raises:
        ValueError: If it is not.
    """
    unknown = [sample.path for sample in samples if not sample.category]
    if recipe.sampling == "classes" and unknown:
        raise ValueError(
            f"{option}: wanted the class of each image, since the run draws classes equally often (sampling: classes), "
            f"got {len(unknown)} whose folder or list does not name it alone (first: {unknown[0]}): give one list with "
            "the column category"
        )


def check_extendable(saved: Checkpoint, path: Path, steps: int | None, holdout: float) -> None:
    """Check that a checkpoint is that of a finished run whose network can be trained on further images.

    Args:
        saved: The checkpoint.
        path: Its path, for error messages.
        steps: Number of further steps; None if none is given.
        holdout: Share of the images to hold out.

    Raises:
        ValueError: If it is not, or the options do not fit it.
    """
    name, recipe = saved.recipe.architecture, saved.recipe
    if not recipe.uses_steps and not get_architecture(recipe).is_extendable:
        names = ", ".join(key for key, value in ARCHITECTURES.items() if value.is_extendable)
        raise ValueError(
            f"{path}: wanted a detector that can be extended ({names}, or one trained by steps), got architecture "
            f"{name!r}: train it again with all images, in one pass"
        )
    if not recipe.uses_steps and get_architecture(recipe).needs_count and "observed" not in saved.images:
        raise ValueError(
            f"{path}: wanted a checkpoint with the number of images that it was fitted to, got one of an older "
            "version, which has to be trained again with all images"
        )
    if steps is not None and not recipe.uses_steps:
        raise ValueError(f"steps: wanted none for architecture {name!r}, which is fitted in one pass, got {steps}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps: wanted at least 1, got {steps}")
    if recipe.uses_steps and saved.step < recipe.steps:
        raise ValueError(
            f"{path}: wanted a finished run, got one after {saved.step} of {recipe.steps} steps: continue it with "
            "--resume"
        )
    if not saved.rng:
        raise ValueError(f"{path}: wanted the checkpoint of a run, got a detector alone, which has no training state")
    if holdout and not read_fingerprints(saved.images):
        raise ValueError(
            f"holdout: wanted none for {path}, which is of an older version and does not tell which images it was "
            f"trained on, got {holdout:g}: run recontrast calibrate with images that it has not seen"
        )


def check_former(saved: Checkpoint, path: Path, known: int, option: str) -> None:
    """Check that all images of the run are given if the network needs them.

    Args:
        saved: The checkpoint.
        path: Its path, for error messages.
        known: Number of given images that the run was trained on.
        option: Option or argument that gave the images, for messages.

    Raises:
        ValueError: If some are not.
    """
    recipe, wanted = saved.recipe, len(read_fingerprints(saved.images))
    if recipe.uses_steps or not get_architecture(recipe).needs_former:
        return
    observed, count = saved.images["observed"], count_trained_images(wanted, recipe)
    if observed != count:
        raise ValueError(
            f"{path}: wanted a run that observed all its images, got one that time ended after {observed} of {count}: "
            "train it again with all images"
        )
    if known < wanted:
        raise ValueError(
            f"{option}: wanted all {wanted} images of the run with the new ones, since the weights of architecture "
            f"{recipe.architecture!r} come from a sample of all images, got {known}"
        )
