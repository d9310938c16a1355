"""Decode the good images of a run, and keep pictures that were saved again on one side of the hold-out split."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from recontrast.checkpoint import Checkpoint
from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample
from recontrast.data.fingerprint import describe_images
from recontrast.data.images import read_image
from recontrast.data.listing import DataWarning
from recontrast.data.near_copies import (
    MOST_SKETCHES,
    describe_near_copies,
    describe_one_scene,
    encode_sketches,
    find_near_copies,
    merge_copies,
    sketch_image,
    sketch_views,
)
from recontrast.data.sources import FileImages, Images
from recontrast.data.views import list_views
from recontrast.training.holdout import split_holdout
from recontrast.training.part_views import count_trained_images
from recontrast.training.settings import RunSettings


@dataclass(frozen=True)
class OpenImages:
    """Decoded images of a run.

    Attributes:
        training: Images to train on.
        samples: Their samples; empty if the images were given decoded.
        held_out: Samples held out for the calibration.
        held_out_images: Their images; None if no images are held out, or training takes tiles.
        held_out_groups: Number of the group of each, for which the calibration counts once.
        sketches: Encoded sketches of the images to train on, see `recontrast.data.near_copies.encode_sketches`; with
            tiles, of the whole images.
    """

    training: Images
    samples: Sequence[Sample]
    held_out: Sequence[Sample]
    held_out_images: Images | None
    sketches: str
    held_out_groups: Sequence[int] = ()


def open_images(settings: RunSettings, resumed: Checkpoint | None) -> OpenImages:
    """Decode the images to train on and those held out.

    Warns (`recontrast.data.listing.DataWarning`) of pictures that were saved again. If such pictures would be divided
    between training and calibration, the images are divided again, with each group on one side.

    Args:
        settings: Settings of the run.
        resumed: Checkpoint from which the run continues; its images stay divided as they are.

    Returns:
        The images.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If a file is not an image.
    """
    if settings.images is not None:
        return OpenImages(settings.images, (), (), None, sketch_images(settings.images))
    training = _decode(settings, settings.samples)
    held_out_images = _decode_held_out(settings, settings.held_out)
    groups = _select_owners(settings, settings.held_out, settings.copies or range(len(settings.good)))
    opened = OpenImages(training, settings.samples, settings.held_out, held_out_images, "", groups)
    sketches = _sketch_in_order(settings, opened)
    pairs = [] if len(sketches) > MOST_SKETCHES else find_near_copies(np.stack(sketches))
    opened = _separate(settings, opened, pairs, resumed)
    if settings.world.first:
        _warn(settings, pairs, sketches)
    of_samples = {sample.path: sketch for sample, sketch in zip(settings.good, sketches, strict=True)}
    return replace(opened, sketches=encode_sketches([of_samples[sample.path] for sample in opened.samples]))


def list_classes(opened: OpenImages) -> NDArray[np.int64]:
    """Return the number of the class of each image to train on, (n,); tiles have that of their file.

    Args:
        opened: Images that were read from files.
    """
    names = [sample.category for sample in opened.samples]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    of_files = np.array([numbers[name] for name in names], np.int64)
    if isinstance(opened.training, FileImages):
        return np.repeat(of_files, np.diff(opened.training.offsets))
    return of_files


def _separate(
    settings: RunSettings, opened: OpenImages, pairs: Sequence[tuple[int, int]], resumed: Checkpoint | None
) -> OpenImages:
    """Divide the images again if near-copies lie on both sides; calibrate with one image of each near-copy."""
    recipe, good = settings.recipe, settings.good
    if not pairs or not settings.held_out:
        return opened
    owners = merge_copies(settings.copies or range(len(good)), pairs)
    first = {good[owner].path for owner in merge_copies(range(len(good)), pairs)}
    if resumed is not None and describe_images(opened.training)["digest"] == resumed.images["digest"]:
        return opened  # also a run of an older version
    try:
        samples, held_out = split_holdout(good, recipe.holdout, recipe.seed, owners)
    except ValueError:  # too few different images
        return opened
    held_out = [sample for sample in held_out if sample.path in first]
    if recipe.drop_last and count_trained_images(len(samples), recipe) < recipe.batch:
        return opened
    groups = _select_owners(settings, held_out, owners)
    return OpenImages(_decode(settings, samples), samples, held_out, _decode_held_out(settings, held_out), "", groups)


def _select_owners(settings: RunSettings, held_out: Sequence[Sample], owners: Sequence[int]) -> list[int]:
    """Return the group of each held-out image, given those of all good images."""
    of_samples = {sample.path: owner for sample, owner in zip(settings.good, owners, strict=True)}
    return [of_samples[sample.path] for sample in held_out]


def _warn(settings: RunSettings, pairs: Sequence[tuple[int, int]], sketches: Sequence[NDArray[np.float32]]) -> None:
    """Warn of near-copies among the good images."""
    consequence = "training sees them more often than others"
    if settings.held_out:
        consequence = "they stay on one side of the division into training and calibration, and count as one image"
    texts = [describe_near_copies([sample.path for sample in settings.good], pairs, consequence)]
    if settings.held_out and not pairs and len(sketches) <= MOST_SKETCHES:
        texts.append(describe_one_scene(len(sketches), np.stack(sketches)))
    for text in texts:
        if text is not None:
            warnings.warn(f"train: {text}", DataWarning, stacklevel=4)


def _sketch_in_order(settings: RunSettings, opened: OpenImages) -> list[NDArray[np.float32]]:
    """Return the sketches of all good images, in the order of the data set."""
    recipe = settings.recipe
    sketches = dict(zip([sample.path for sample in opened.samples], _sketch(opened.training), strict=True))
    if opened.held_out_images is not None:
        sketches |= zip([sample.path for sample in opened.held_out], _sketch(opened.held_out_images), strict=True)
    else:  # one whole image in memory at a time
        for sample in opened.held_out:
            whole = (
                read_image(source, bits=recipe.bits, window=recipe.window)
                for source in list_views(sample.path, recipe.image_views)
            )
            sketches[sample.path] = sketch_views(list(map(sketch_image, whole)))
    return [sketches[sample.path] for sample in settings.good]


def _decode(settings: RunSettings, samples: Sequence[Sample]) -> ImageCache:
    """Decode images, or read them from the cache."""
    recipe = settings.recipe
    return ImageCache(
        samples, recipe.size, recipe.crop, directory=settings.cache_dir, tile=recipe.tile, stride=recipe.stride,
        bits=recipe.bits, window=recipe.window, views=recipe.image_views,
    )  # fmt: skip


def _decode_held_out(settings: RunSettings, samples: Sequence[Sample]) -> ImageCache | None:
    """Decode the images held out; None without any, and for tiles, which the calibration reads as prediction does."""
    return _decode(settings, samples) if samples and settings.recipe.tile is None else None


def _sketch(images: Images) -> list[NDArray[np.float32]]:
    """Sketch images, or parts with all their views; images that are cut into tiles as a whole."""
    if isinstance(images, ImageCache):
        parts = map(images.read_views, range(len(images.offsets) - 1))
        return [sketch_views(list(map(sketch_image, views))) for views in parts]
    offsets = images.offsets if isinstance(images, FileImages) else range(len(images) + 1)
    return [sketch_views(list(map(sketch_image, images[np.arange(*span)]))) for span in pairwise(offsets)]


def sketch_images(images: Images) -> str:
    """Sketch images and encode the sketches, see `recontrast.data.near_copies.encode_sketches`.

    Args:
        images: Decoded images; those that are cut into tiles are sketched as a whole.

    Returns:
        Text; empty if there are too many images.
    """
    count = len(images.offsets) - 1 if isinstance(images, FileImages) else len(images)
    return encode_sketches(_sketch(images)) if count <= MOST_SKETCHES else ""
