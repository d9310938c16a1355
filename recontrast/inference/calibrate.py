"""Calibration: run a detector on good images and compute its thresholds."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recontrast.calibration.appearance_drift import describe_appearance
from recontrast.calibration.conformal import (
    DEFAULT_PIXEL_RATE,
    DEFAULT_RATE,
    Calibration,
    allowed_false_alarms,
    calibrate_maps,
)
from recontrast.calibration.groups import select_first
from recontrast.checkpoint import digest
from recontrast.data.copies import describe_copies
from recontrast.data.dataset_sample import Sample
from recontrast.data.fingerprint import compute_fingerprint, compute_tiled_fingerprint, read_fingerprints
from recontrast.data.groups import check_groups_are_new
from recontrast.data.image_files import ImageFiles
from recontrast.data.listing import DataWarning
from recontrast.data.near_copies import (
    MOST_SKETCHES,
    describe_near_copies,
    describe_one_scene,
    describe_trained,
    find_near_copies,
    match_known,
    read_sketches,
    sketch_image,
    sketch_views,
)
from recontrast.data.sources import Images
from recontrast.data.tiles import PartTiles
from recontrast.inference.decisions import describe_undecided
from recontrast.inference.detector import Detector, MapsAndScores, run_checked
from recontrast.inference.infer import infer
from recontrast.inference.rois import Rois, open_folder, select_inside
from recontrast.models.network import Network
from recontrast.recipes.recipe import Recipe


class TrainedDetector(Protocol):
    """What is known of the training of a detector: a `Checkpoint`, or an `ExportedDetector`."""

    @property
    def recipe(self) -> Recipe:
        """Recipe of the training, for the size of the images."""

    @property
    def images(self) -> Mapping[str, Any]:
        """Description of the training images, see `recontrast.data.fingerprint.describe_images`."""


def calibrate(
    model: Network,
    recipe: Recipe,
    images: Images,
    *,
    rate: float = DEFAULT_RATE,
    pixel_rate: float = DEFAULT_PIXEL_RATE,
    source: str = "",
    batch: int = 16,
    groups: Sequence[int] | None = None,
    rois: Rois | None = None,
) -> Calibration:
    """Compute both thresholds of a model from good images that it was not trained on.

    Args:
        model: Trained model, on any device.
        recipe: Recipe that the model was trained with.
        images: Images decoded at ``recipe.out``, (N, H, W, 3) uint8; see `recontrast.inference.infer.infer`. N counts
            parts if each has several views, and the groups are those of parts.
        rate: Promised false-alarm rate, at least 1 / (N + 1).
        pixel_rate: Promised share of a good image's pixels above the pixel threshold.
        source: Description of the origin of the images.
        batch: Number of images per batch.
        groups: Number of the group of each image, (N,), see `recontrast.calibration.groups`. None: each image is a
            group of its own.
        rois: Regions of interest of the images; None: that of the recipe.

    Returns:
        Calibration for the weights of the model and the recipe.

    Raises:
        ValueError: If there are too few images or groups for the rate, a rate is not in (0, 1), or the map of an image
            is not finite.
    """
    views = 1 if recipe.image_views is None else len(recipe.image_views)
    count = len(images) // views
    allowed_false_alarms(count if groups is None else len(set(groups)), rate, recipe.noun)
    rois = Rois(recipe) if rois is None and recipe.roi is not None else rois
    batches = ((maps.float().cpu().numpy(), scores.cpu().numpy()) for maps, scores in infer(
        model, images, recipe, batch=batch, rois=rois))  # fmt: skip
    return calibrate_maps(
        select_inside(batches, rois), count, rate=rate, pixel_rate=pixel_rate, source=source, groups=groups,
        weights=digest(model.state_dict(), recipe), appearance=describe_appearance(images, batch, views),
    )  # fmt: skip


def select_new_images(option: str, paths: Sequence[Path], trained: TrainedDetector) -> list[Path]:
    """Return the different images among the given ones, or raise an error if a detector was trained on any of them.

    A detector scores its training images lower than new images, and a threshold computed from them would be too low.
    Copies of one picture are one image: counted several times, they would promise more than they can keep. Warns
    (`recontrast.data.listing.DataWarning`) of copies, of pictures that were saved again, and of those that seem to be
    training images saved again.

    Checkpoints of older versions do not store the fingerprints and sketches of their training images; for them only
    copies among the given images are found. Exported files store no sketches, which are small pictures.

    Args:
        option: Name of the command-line option that gave the images, for messages.
        paths: Image files.
        trained: Checkpoint or exported file of the detector.

    Returns:
        The files without copies, in their order; files that cannot be read are among them.

    Raises:
        ValueError: If at least one of the images was used in training.
    """
    known_prints = read_fingerprints(trained.images)
    files = ImageFiles(paths)
    first: dict[str, int] = {}  # position of the first image with each fingerprint
    owners = list(range(len(files)))
    used: list[Path] = []
    sketches: list[NDArray[np.float32]] = []
    for index, result in enumerate(_identify_images(files, trained.recipe)):
        if result is None:  # reported later, when the image is scored
            continue
        fingerprint, sketch = result
        if fingerprint in known_prints:
            used.append(files.paths[index])
        owners[index] = first.setdefault(fingerprint, index)
        if owners[index] == index and len(sketches) <= MOST_SKETCHES:
            sketches.append(sketch)
    if used:
        raise ValueError(
            f"{option}: wanted good {trained.recipe.noun}s that were not trained on, got {len(used)} of {len(files)} "
            f"that were (first: {used[0]})"
        )
    names = [files.paths[index] for index in first.values()]
    known, noun = read_sketches(trained.images), trained.recipe.noun
    for text in (describe_copies(files.paths, owners, noun), *_describe_sketches(names, sketches, known, noun)):
        if text is not None:
            warnings.warn(f"{option}: {text}", DataWarning, stacklevel=2)
    return [path for index, path in enumerate(files.paths) if owners[index] == index]


def select_new_samples(option: str, samples: Sequence[Sample], checkpoint: TrainedDetector) -> list[Sample]:
    """Do the same as `select_new_images` for samples, whose groups must not have been trained on either.

    Args:
        option: Name of the command-line option that gave the images, for messages.
        samples: Images.
        checkpoint: Checkpoint of the detector.

    Returns:
        The samples without copies, in their order.

    Raises:
        ValueError: If at least one of the images, or of their groups, was used in training.
    """
    check_groups_are_new(option, samples, checkpoint.images.get("groups", ()))
    of_paths = {sample.path: sample for sample in reversed(samples)}
    return [of_paths[path] for path in select_new_images(option, [s.path for s in samples], checkpoint)]


def is_trained_on(paths: Sequence[Path], checkpoint: TrainedDetector) -> bool:
    """Tell whether a detector was trained on one of the images.

    Args:
        paths: Image files; those that cannot be read are passed over.
        checkpoint: Checkpoint of the detector.

    Returns:
        Whether it was; False for checkpoints of older versions, which do not say.
    """
    trained = read_fingerprints(checkpoint.images)
    identified = _identify_images(ImageFiles(paths), checkpoint.recipe)
    return bool(trained) and any(result is not None and result[0] in trained for result in identified)


def split_trained_images(
    option: str, paths: Sequence[Path], checkpoint: TrainedDetector
) -> tuple[list[Path], list[Path], list[Path], list[NDArray[np.float32]]]:
    """Separate new images from those that a detector was trained on.

    Args:
        option: Name of the option that gave the images, for messages.
        paths: Image files.
        checkpoint: Checkpoint of the detector.

    Returns:
        The different new images; the images that were trained on; the copies of images of both kinds; and the sketches
        of the new images, (1024,) float32 each, see `recontrast.data.near_copies.sketch_image`.

    Raises:
        ValueError: If a file cannot be read.
    """
    trained = read_fingerprints(checkpoint.images)
    files = ImageFiles(paths)
    seen: set[str] = set()
    new: list[Path] = []
    known: list[Path] = []
    copies: list[Path] = []
    sketches: list[NDArray[np.float32]] = []
    for path, result in zip(files.paths, _identify_images(files, checkpoint.recipe), strict=True):
        if result is None:
            continue
        if result[0] in seen:
            copies.append(path)
        elif result[0] in trained:
            known.append(path)
        else:
            new.append(path)
            sketches.append(result[1])
        seen.add(result[0])
    if files.errors:
        first = files.errors[min(files.errors)]
        raise ValueError(
            f"{option}: wanted {checkpoint.recipe.noun}s that can be read, got {len(files.errors)} others: {first}"
        )
    return new, known, copies, sketches


def _identify_images(files: ImageFiles, recipe: Recipe) -> Iterator[tuple[str, NDArray[np.float32]] | None]:
    """Yield the fingerprint and the sketch of each file, None for one that cannot be read."""

    def read(index: int) -> tuple[str, NDArray[np.float32]] | None:
        size, crop = (None, None) if recipe.tile is not None else (recipe.size, recipe.crop)
        pixels = files.read(index, size, crop, recipe.bits, recipe.window, recipe.image_views)
        if pixels is None:
            return None
        views = pixels[None] if recipe.image_views is None else pixels  # (views, H, W, 3)
        sketch = sketch_views(list(map(sketch_image, views)))
        if recipe.tile is None:
            return compute_fingerprint(views), sketch
        return compute_tiled_fingerprint(PartTiles(views, recipe.tile, recipe.stride or recipe.tile)), sketch

    # With tiles, images are decoded at their original size: one at a time keeps the memory small.
    with ThreadPoolExecutor(1 if recipe.tile is not None else None) as pool:
        yield from pool.map(read, range(len(files)))


def _describe_sketches(
    paths: Sequence[Path], sketches: Sequence[NDArray[np.float32]], known: NDArray[np.float32], noun: str
) -> Iterator[str | None]:
    """Describe near-copies among new images, and those of training images, whose sketches are ``known``."""
    if not sketches or len(sketches) > MOST_SKETCHES:
        return
    new = np.stack(sketches)
    pairs = find_near_copies(new)
    yield describe_near_copies(paths, pairs, f"the promise counts them as different {noun}s", noun)
    if not pairs:
        yield describe_one_scene(len(new), new, noun)
    yield describe_trained([paths[index] for index, _ in match_known(new, known)], len(new), noun)


def calibrate_files(
    detector: Detector,
    paths: Sequence[Path],
    batch: int,
    on_progress: Callable[[int, int], None],
    groups: Mapping[Path, int] | None = None,
    **options: Any,
) -> tuple[Calibration, list[str]]:
    """Calibrate a detector with all image files that can be read.

    The pixel threshold depends on the number of images. If some files cannot be read, the calibration is therefore
    computed again without them.

    Args:
        detector: Detector to calibrate.
        paths: Files of good images that the detector was not trained on.
        batch: Number of images per batch.
        on_progress: Called with the number of finished images and of all images.
        groups: Number of the group of each image, by path, see `recontrast.calibration.groups`. None: each image is a
            group of its own.
        **options: Passed on to `recontrast.calibration.conformal.calibrate_maps`: rates, source and digest.

    Returns:
        The calibration, and one sentence for each file that could not be read.

    Raises:
        ValueError: If no image can be read, there are too few for the rate, a rate is not in (0, 1), or the map of an
            image is not finite.
    """
    unread: list[str] = []
    with ThreadPoolExecutor() as pool:
        while True:
            files = ImageFiles(paths, pool)

            def run(files: ImageFiles = files) -> Iterator[MapsAndScores]:
                done = 0
                for maps, scores in run_checked(detector, files, batch):
                    yield maps, scores
                    done += len(scores)
                    on_progress(done, len(files))

            names = [str(path) for path in files.paths]
            rois = open_folder(detector.recipe, getattr(detector, "roi_folder", None), files.paths)
            numbers = range(len(files)) if groups is None else [groups[path] for path in files.paths]
            batches = select_inside(run(), rois)
            calibration = calibrate_maps(batches, len(files), names=names, groups=numbers, **options)
            appearance = _describe_files(detector, files)  # reads each file again, which can fail
            if not files.errors:
                appearance = appearance[select_first(numbers)]
                return replace(calibration, appearance=tuple(map(tuple, appearance.tolist()))), unread
            unread += [files.errors[index] for index in sorted(files.errors)]
            paths = [path for index, path in enumerate(files.paths) if index not in files.errors]
            if not paths:
                raise ValueError(f"none of {len(unread)} {detector.recipe.noun}s could be read: {unread[0]}")


def score_files(
    detector: Detector, paths: Sequence[Path], batch: int
) -> tuple[list[float], NDArray[np.float64], list[str]]:
    """Score all image files that can be read, and describe their appearance.

    Args:
        detector: Detector that scores them.
        paths: Image files.
        batch: Number of images per batch.

    Returns:
        Scores of the N images that could be read; their appearance, (N, 4) float64, see
        `recontrast.calibration.appearance_drift.describe_appearance`; and one sentence for each file that could not be
        read.

    Raises:
        ValueError: If the map of an image is not finite.
    """
    with ThreadPoolExecutor() as pool:
        files = ImageFiles(paths, pool)
        scores = [score for _, batch_scores in run_checked(detector, files, batch) for score in batch_scores.tolist()]
        appearance = _describe_files(detector, files)
    read = [index for index in range(len(scores)) if index not in files.errors]
    for index in read:
        if not math.isfinite(scores[index]):
            raise ValueError(describe_undecided(str(files.paths[index])))
    unread = [files.errors[index] for index in sorted(files.errors)]
    return [scores[index] for index in read], appearance[read], unread


def _describe_files(detector: Detector, files: ImageFiles) -> NDArray[np.float64]:
    """Read each file again, at the size of the recipe, and describe its appearance."""
    recipe, views = detector.recipe, detector.recipe.image_views
    images = files.resized(recipe.size, recipe.crop, recipe.bits, recipe.window, views)
    return describe_appearance(images, views=1 if views is None else len(views))
