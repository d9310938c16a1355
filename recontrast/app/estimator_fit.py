"""Parts of `recontrast.app.estimator`: how the images given to `fit` are divided, and checks of its arguments."""

import operator
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils.validation import check_consistent_length

from recontrast.data.copies import describe_copies
from recontrast.data.fingerprint import compute_fingerprint
from recontrast.data.given_parts import list_parts
from recontrast.data.groups import pair_groups
from recontrast.data.in_memory import as_image_list
from recontrast.data.listing import DataWarning
from recontrast.data.near_copies import (
    describe_near_copies,
    describe_one_scene,
    find_near_copies,
    merge_copies,
    sketch_image,
    sketch_views,
)
from recontrast.data.roi import EACH
from recontrast.inference.given_images import measure_given
from recontrast.inference.rois import Rois
from recontrast.recipes.recipe import Recipe
from recontrast.training.holdout import resolve_holdout_count


@dataclass(frozen=True)
class FitSplit:
    """Positions of the images to train on and to calibrate with, both ascending int64.

    Attributes:
        training: Images to train on, (n,).
        held_out: Images held out, (m,), all different and none a copy of a training image.
        groups: Number of the group of each image held out, (m,), for which the calibration counts once.
    """

    training: NDArray[np.int64]
    held_out: NDArray[np.int64]
    groups: NDArray[np.int64]


def split_images(
    images: NDArray[np.uint8], rate: float | None, holdout: float | int | None, seed: int,
    groups: NDArray[Any] | None = None,
) -> FitSplit:  # fmt: skip
    """Divide good images at random into those to train on and those to calibrate with.

    Copies and pictures that were saved again stay on one side and count as one image. Warns
    (`recontrast.data.listing.DataWarning`) of them.

    Args:
        images: Good images, (n, H, W, 3), or parts (n, views, H, W, 3), uint8.
        rate: False-alarm rate to promise; None holds out no images.
        holdout: Number of images to hold out, or their share, see `resolve_holdout_count`.
        seed: Seed of the division.
        groups: Group of each image, (n,); images of one are never divided. None: each image is a group of its own.

    Returns:
        The positions.

    Raises:
        ValueError: If there are too few different images, or groups, for the rate.
    """
    first: dict[str, int] = {}
    owners = np.array([first.setdefault(compute_fingerprint(image), index) for index, image in enumerate(images)])
    if rate is not None:
        owners = np.array(_join_near_copies(images, owners.tolist()))
    pictures = owners
    if groups is not None:
        owners = np.array(merge_copies(owners.tolist(), pair_groups(groups.tolist())))
    different = np.unique(owners)
    count = resolve_holdout_count(len(different), rate, holdout)
    drawn = np.sort(np.random.default_rng(seed).permutation(different)[:count])
    is_drawn = np.isin(owners, drawn)
    held_out = np.flatnonzero(is_drawn & (pictures == np.arange(len(pictures))))  # one image of each picture
    return FitSplit(np.flatnonzero(~is_drawn), held_out, owners[held_out])


def _join_near_copies(images: NDArray[np.uint8], owners: list[int]) -> list[int]:
    """Return the first image of each group of copies and near-copies, and warn of both."""
    different = sorted(set(owners))
    names = [f"image {index}" for index in range(len(images))]
    parts = images[:, None] if images.ndim == 4 else images  # (n, views, H, W, 3)
    sketches = np.stack([sketch_views(list(map(sketch_image, parts[index]))) for index in different])
    pairs = find_near_copies(sketches)
    for text in (
        describe_copies(names, owners),
        describe_near_copies([names[index] for index in different], pairs, "they count as one image"),
        None if pairs else describe_one_scene(len(different), sketches),
    ):
        if text is not None:
            warnings.warn(f"fit: {text}", DataWarning, stacklevel=4)
    return merge_copies(owners, [(different[first], different[second]) for first, second in pairs])


def list_images(X: Any, recipe: Recipe) -> tuple[Recipe, list[Any]]:
    """List the images of a caller; of parts with several views, those of each part in sequence.

    Args:
        X: Images, see `recontrast.data.in_memory.as_image_list`; or parts, see
            `recontrast.data.given_parts.list_parts`.
        recipe: Recipe, for the views.

    Returns:
        The recipe, with the names of the views, and the images.

    Raises:
        OSError: If a file of pages cannot be read.
        ValueError: If X is of another kind, a view is missing, or views of a part differ in size.
    """
    if recipe.views_from is None:
        return recipe, as_image_list(X)
    views, images = list_parts(X, recipe.views_from, recipe.view_names)
    shapes = [measure_given(image) for image in images]
    for position, shape in enumerate(shapes):
        first = shapes[position - position % len(views)]
        if shape != first:
            wanted, got = (f"{height} x {width}" for height, width in (first, shape))
            raise ValueError(
                f"image {position // len(views)}: wanted views of one size, got {wanted} and {got} (height x width)"
            )
    return recipe.replace(view_names=views.names), images


def check_labels(images: Sequence[Any], y: ArrayLike) -> NDArray[Any]:
    """Return the labels, one for each image.

    Args:
        images: Images of the caller.
        y: Labels (n,), +1 for good and -1 for a defect.

    Returns:
        (n,) array.

    Raises:
        ValueError: If a label is another value, or their number is not that of the images.
    """
    labels = np.asarray(y)
    check_consistent_length(images, labels)
    if labels.ndim != 1 or not np.isin(labels, (1, -1)).all():
        got = sorted(set(labels.ravel().tolist()))[:5] if labels.ndim == 1 else f"shape {labels.shape}"
        raise ValueError(f"fit: y: wanted +1 (good) and -1 (defect), one for each image, got {got}")
    return labels


def check_fit_groups(images: Sequence[Any], groups: ArrayLike) -> NDArray[Any]:
    """Return the groups, one for each image.

    Args:
        images: Images of the caller.
        groups: Names or numbers (n,).

    Returns:
        (n,) array.

    Raises:
        ValueError: If they have another shape, or a group is NaN or None.
    """
    names = np.asarray(groups)
    check_consistent_length(images, names)
    if names.ndim != 1:
        raise ValueError(f"fit: groups: wanted a name or number for each image, got an array of shape {names.shape}")
    if any(name is None or name != name for name in names.tolist()):
        raise ValueError("fit: groups: wanted a name or number for each image, got None or NaN")
    return names


def check_region(recipe: Recipe, images: Sequence[Any]) -> None:
    """Raise ValueError if the region of interest of a recipe has another aspect ratio than an image.

    Args:
        recipe: Recipe with one region for all images, or none.
        images: Paths, PIL images or arrays.
    """
    if recipe.roi is None:
        return
    rois = Rois(recipe)
    for index, image in enumerate(images):
        try:
            shape = measure_given(Path(image) if isinstance(image, str) else image)
        except (OSError, ValueError, AttributeError):  # reported where the image is read
            continue
        rois.check(shape, str(image) if isinstance(image, str | os.PathLike) else f"image {index}")


def refuse_tiles(recipe: Recipe, source: str) -> Recipe:
    """Return the recipe, or raise an error if it trains on tiles or single masks.

    Args:
        recipe: Recipe of a detector.
        source: Name of the recipe or file in the error message.

    Returns:
        The recipe.

    Raises:
        ValueError: If it does.
    """
    if recipe.roi == EACH:
        raise ValueError(f"{source}: wanted one region of interest for all images for the estimator, got one for each")
    if recipe.tile is not None:
        raise ValueError(f"{source}: wanted a detector of whole images, got one of tiles ({recipe.tile} px): use "
                         "recontrast train and recontrast predict")  # fmt: skip
    return recipe


def to_python_number(value: Any) -> Any:
    """Return a Python integer for a NumPy integer, which a parameter grid may hold, and other values as they are."""
    return operator.index(value) if isinstance(value, np.integer) else value


@contextmanager
def isolate_random_state() -> Iterator[None]:
    """Restore PyTorch's global random states after the block."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield
