"""Evaluation: metrics of a model by category, as the reference's ``evaluation`` (utils.py) computes them.

The reference processes one image at a time and collects pixels in Python lists. Here the images of all categories go
through the network in one pass of full batches. Files are decoded ahead of the network, and a thread computes the
metrics of a complete category while the network runs on the next one. Maps are kept in memory, or in a temporary file
if they exceed a limit; streaming metrics put them into histograms batch by batch and keep none. Under torchrun, each
process runs the network on its share of every category.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recontrast import metrics
from recontrast.data.datasets import Sample
from recontrast.data.part_samples import join_part_samples
from recontrast.data.roi import describe_roi
from recontrast.data.sources import ConcatImages
from recontrast.data.tiles import PartTiles
from recontrast.evaluation.category import Category
from recontrast.evaluation.measures import Measures, build_measures
from recontrast.evaluation.results import Result, Row
from recontrast.evaluation.sample_images import open_images
from recontrast.evaluation.scorers import Scorer, build_scorer
from recontrast.evaluation.training_images import TrainingImageChecks
from recontrast.evaluation.validation import choose_threshold
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.inference.rois import open_rois
from recontrast.models.network import Network
from recontrast.recipes.recipe import Recipe
from recontrast.runtime import distributed
from recontrast.runtime.clock import Clock
from recontrast.runtime.distributed import World

__all__ = ["Result", "Row", "evaluate"]
MEMORY = 2 << 30  # bytes of maps per category that are kept in memory: 8192 images of 256 px
OnProgress = Callable[[str, int, int], None]  # category, images done, images in the category
OnMaps = Callable[[Sequence[Sample], NDArray[np.float32]], None]  # samples and their maps (N, H, W)


def evaluate(
    model: Network | ExportedDetector,
    samples: Sequence[Sample] | Mapping[str, Sequence[Sample]],
    recipe: Recipe,
    *,
    device: str | torch.device | None = None,
    batch: int = 16,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
    on_maps: OnMaps | None = None,
    cache_dir: str | Path | None = None,
    streaming: bool = False,
    memory: int = MEMORY,
    trained: Collection[str] = (),
    sketches: NDArray[np.float32] | None = None,
    errors: Literal["raise", "keep"] = "raise",
    measures: str = "auto",
    threshold: float | None = None,
) -> Result:
    """Compute the metrics of a model on test images, by category.

    A metric that is undefined, for lack of test images, masks or defects, is None, and a note gives the reason. Under
    torchrun, every process returns the same result, and every image counts once.

    Args:
        model: Model, moved to ``device``. Its training mode is restored afterwards. `recontrast.inference.options`
            builds faster versions of a model. Or the detector in an exported file, with its own recipe.
        samples: Samples of one or several categories; those of the train split are ignored.
        recipe: Recipe, for size, crop, map, score, mask rule and precision. With ``tile``, images keep their original
            scale, maps are blended from tiles that share a quarter, and pixel metrics are streamed.
        device: Device to move the model to; None leaves it where it is.
        batch: Number of images per batch.
        workers: Number of threads that decode; None for one per CPU.
        on_progress: Function called with the category, the images done and the images in the category, of this process.
        on_maps: Function called with the samples of each batch of this process and their maps, without those left out
            because they could not be read or scored.
        cache_dir: Folder for decoded images; None decodes them while the network runs. Not used with tiles.
        streaming: Whether to compute pixel metrics from histograms, in constant memory and with proven error bounds,
            instead of exactly. Map values above `recontrast.inference.infer.max_map_value` count as equal to it.
        memory: Number of bytes; if the maps of a category have more, they are kept in a temporary file.
        trained: Fingerprints of the training images (`recontrast.data.fingerprint.read_fingerprints`). Test images
            among them are named in a `recontrast.data.listing.DataWarning`.
        sketches: Sketches of the training images, (n, 1024) float32 (`recontrast.data.near_copies.read_sketches`).
            Test images that seem to be one of them, saved again, are named as well. Not used without ``trained``.
        errors: "raise" stops at an image or mask that cannot be read, or a map that is not finite. "keep" leaves the
            image out of all metrics, gives it a `ScoredImage.error`, and counts it in `Row.skipped`; a validation image
            is left out of the threshold, and named in `Row.note`.
        measures: Measures of a benchmark besides the usual metrics, one of `recontrast.evaluation.measures.MEASURES`.
            "auto" takes those of the data set that ``recontrast prepare`` prepared, "none" leaves them out.
        threshold: Map value at which SegF1, the F1 of the pixels, is computed. None: for MVTec AD 2, the mean plus
            three standard deviations of the maps of its validation images; no SegF1 for others.

    Returns:
        One row for each category in the given order, their mean, and the score of each image.

    Raises:
        ValueError: If there are no test images, ``batch`` is below 1, the image size is not a multiple of the model's
            stride, a file is not an image, or a mask does not fit its image; with ``errors="keep"``, if no image can be
            scored. If ``measures`` is unknown or does not fit the data set, or ``threshold`` is not finite.
        OSError: If a file cannot be read, or the cache or the maps cannot be written.
    """
    if errors not in ("raise", "keep"):
        raise ValueError(f"evaluate: errors: wanted 'raise' or 'keep', got {errors!r}")
    groups = {name: join_part_samples(own, recipe.image_views) for name, own in _group_test_samples(samples).items()}
    if batch < 1:
        raise ValueError(f"evaluate: batch: wanted at least 1, got {batch}")
    scorer, world = build_scorer(model, recipe, device), distributed.current_world()
    chosen = _build_measures(measures, threshold, groups, scorer, recipe, batch, workers, errors == "keep")
    shares = {name: tests[world.share(len(tests))] for name, tests in groups.items()}
    clock = Clock(scorer.device)
    checks = TrainingImageChecks(trained, sketches)
    keep_errors = errors == "keep"
    unread: dict[str, dict[int, str]] | None = {name: {} for name in groups} if keep_errors else None
    batches = _Batches(_infer_samples(scorer, shares, recipe, batch, workers, cache_dir, clock, checks, unread))
    streaming = streaming or recipe.tile is not None  # images at their original scale have too many pixels to sort
    jobs: list[Future[Row]] = []
    categories: list[Category] = []
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as background:
        category: Category | None = None
        try:
            for name, tests in groups.items():
                histograms = _build_histograms(scorer) if streaming else None
                category = Category(name, tests, recipe, world, readers, histograms, memory, keep_errors, chosen[name])
                categories.append(category)
                missing = None if unread is None else unread[name]
                _collect(category, shares[name], batches, clock, scorer.device, on_progress, on_maps, missing)
                if jobs:
                    jobs[-1].result()  # waits, so that at most two categories have their maps in memory
                if world.first:
                    jobs.append(background.submit(category.compute_row))
            rows = [job.result() for job in jobs]
        finally:
            batches.close()
            if category is not None:
                category.cancel()
    left_out = _share_errors(world, categories, recipe.noun)
    rows = distributed.broadcast_from_first(world, _add_untested(rows, samples, recipe.noun))
    scored = [image for one, lost in zip(categories, left_out, strict=True) for image in one.list_scored_images(lost)]
    settings = (recipe.name, recipe.map_out, recipe.score, recipe.blur, recipe.reduce, recipe.mask_rule)
    checks.warn(sum(map(len, groups.values())), recipe.noun)
    return Result(rows, *settings, scored=scored, tile=recipe.tile, roi=recipe.roi and describe_roi(recipe.roi),
                  noun=recipe.noun)  # fmt: skip


def _build_histograms(scorer: Scorer) -> metrics.Streaming:
    """Build the histograms of the maps of one category."""
    return metrics.Streaming(scorer.max_value, device=scorer.device, clip=not scorer.is_bounded)


def _build_measures(
    name: str, threshold: float | None, groups: Mapping[str, Sequence[Sample]], scorer: Scorer, recipe: Recipe,
    batch: int, workers: int | None, keep_errors: bool,
) -> dict[str, Measures]:  # fmt: skip
    """Return the measures of each category, with the threshold of SegF1: the given one, or that of its good images."""
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"evaluate: threshold: wanted a finite number, got {threshold}")
    measures = {category: build_measures(name, tests, recipe) for category, tests in groups.items()}
    for own in measures.values():
        own.threshold = threshold
        if threshold is None and own.takes_threshold:
            own.threshold, note = choose_threshold(scorer, own.tests, recipe, batch, workers, keep_errors=keep_errors)
            own.notes += [note] if note else []
    return measures


def _share_errors(world: World, categories: Sequence[Category], noun: str) -> list[dict[int, str]]:
    """Return the images that the first process leaves out, by category; raise ValueError if no image is left."""
    left_out: list[dict[int, str]]
    left_out = distributed.broadcast_from_first(world, [category.errors for category in categories])
    count = sum(map(len, left_out))
    if count == sum(len(category.tests) for category in categories):
        raise ValueError(f"none of {count} {noun}s could be scored: {min(left_out[0].items())[1]}")
    return left_out


def _add_untested(rows: list[Row], samples: Sequence[Sample] | Mapping[str, Sequence[Sample]], noun: str) -> list[Row]:
    """Add a row for each category without test images, so that a category never disappears from the table."""
    if not rows:  # not the first process
        return rows
    computed = {row.category: row for row in rows}
    names = dict.fromkeys(sample.category for sample in _flatten(samples))
    return [computed.get(name) or Row(name, 0, 0, note=f"no metrics: there are no test {noun}s") for name in names]


def _flatten(samples: Sequence[Sample] | Mapping[str, Sequence[Sample]]) -> list[Sample]:
    """Return the samples of all categories."""
    return [s for group in samples.values() for s in group] if isinstance(samples, Mapping) else list(samples)


def _group_test_samples(samples: Sequence[Sample] | Mapping[str, Sequence[Sample]]) -> dict[str, list[Sample]]:
    """Group the samples of the test split by category."""
    flat = _flatten(samples)
    groups: dict[str, list[Sample]] = {}
    for sample in flat:
        if sample.split == "test":
            groups.setdefault(sample.category, []).append(sample)
    if not groups:
        raise ValueError(f"evaluate: samples: wanted test images, got none among {len(flat)} samples")
    return groups


def _infer_samples(
    scorer: Scorer,
    groups: Mapping[str, Sequence[Sample]],
    recipe: Recipe,
    batch: int,
    workers: int | None,
    cache_dir: str | Path | None,
    clock: Clock,
    checks: TrainingImageChecks,
    unread: Mapping[str, dict[int, str]] | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an iterator over maps and scores of the samples of all groups, one group after the other.

    Images that cannot be read are recorded in ``unread``, by group and position; None raises their errors.
    """
    if recipe.tile is not None:
        tile, stride = recipe.tile, recipe.stride or recipe.tile

        def compare(path: Path, pixels: NDArray[np.uint8]) -> None:
            views = pixels[None] if recipe.image_views is None else pixels
            checks.compare(path, views, PartTiles(views, tile, stride))

        parts = []
        for name, group in groups.items():
            paths, missing = [sample.path for sample in group], None if unread is None else unread[name]
            rois = open_rois(recipe, group)
            parts.append(scorer.score_files(paths, batch, clock, missing, compare, rois))
        return (result for part in parts for result in part)
    images = [
        open_images(group, recipe, workers, cache_dir, None if unread is None else unread[name])
        for name, group in groups.items()
    ]
    images = checks.wrap(images, list(groups.values()), max(len(recipe.view_names), 1))
    rois = open_rois(recipe, [sample for group in groups.values() for sample in group])
    return scorer.score_images(ConcatImages(images), batch, clock, rois)


def _collect(
    category: Category,
    samples: Sequence[Sample],
    batches: "_Batches",
    clock: Clock,
    device: torch.device,
    on_progress: OnProgress | None,
    on_maps: OnMaps | None,
    unread: Mapping[int, str] | None,
) -> None:
    """Add the maps and scores of this process's ``samples`` to their category, then gather those of all processes."""
    stop, seconds_before = 0, clock.seconds()
    for maps, scores in batches.take(len(samples)):
        start, stop = stop, stop + len(scores)
        with_maps = category.add(start, maps, scores, unread)
        if on_maps is not None and with_maps:
            array = maps.cpu().numpy()
            array = array if len(with_maps) == len(array) else array[with_maps]
            on_maps([samples[start + position] for position in with_maps], array)
        if on_progress is not None:
            on_progress(category.name, stop, len(samples))
    category.gather(device)
    category.seconds = {name: total - seconds_before.get(name, 0.0) for name, total in clock.seconds().items()}


class _Batches:
    """Batches of maps and scores that can be split where a category ends.

    The next batch is requested before the current one is returned, so that a GPU never waits.
    """

    def __init__(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches
        self.queue: list[tuple[Tensor, Tensor]] = []
        self.exhausted = False

    def take(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the maps (N, H, W) and scores (N,) of the next ``count`` images, batch by batch."""
        while count:
            while not self.exhausted and len(self.queue) < 2:
                following = next(self.batches, None)
                if following is None:
                    self.exhausted = True
                else:
                    self.queue.append(following)
            maps, scores = self.queue.pop(0)
            if len(scores) > count:
                self.queue.insert(0, (maps[count:], scores[count:]))
                maps, scores = maps[:count], scores[:count]
            count -= len(scores)
            yield maps, scores

    def close(self) -> None:
        """Stop the inference."""
        self.batches.close()  # type: ignore[attr-defined]
