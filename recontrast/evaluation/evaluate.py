"""Evaluation: metrics of a model by category, as the reference's ``evaluation`` (utils.py) computes them.

The reference processes one image at a time and collects pixels in Python lists. Here the images of all categories go
through the network in one pass of full batches. Files are decoded ahead of the network, and a thread computes the
metrics of a complete category while the network runs on the next one. Maps are kept in memory, or in a temporary file
if they exceed a limit; streaming metrics put them into histograms batch by batch and keep none. Under torchrun, each
process runs the network on its share of every category.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recontrast import metrics
from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample
from recontrast.data.sources import ConcatImages, Images
from recontrast.evaluation.category import Category, SampleImages
from recontrast.evaluation.results import Result, Row, ScoredImage
from recontrast.evaluation.training_images import TrainingImageChecks
from recontrast.inference import tiling
from recontrast.inference.infer import infer, max_map_value
from recontrast.models.fold import FoldedModel
from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe
from recontrast.runtime import distributed
from recontrast.runtime.clock import Clock
from recontrast.runtime.device import move_model, resolve_device

__all__ = ["Result", "Row", "evaluate"]
MEMORY = 2 << 30  # bytes of maps per category that are kept in memory: 8192 images of 256 px
OnProgress = Callable[[str, int, int], None]  # category, images done, images in the category
OnMaps = Callable[[Sequence[Sample], NDArray[np.float32]], None]  # samples and their maps (N, H, W)


def evaluate(
    model: ReContrast | FoldedModel,
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
) -> Result:
    """Compute the metrics of a model on test images, by category.

    A metric that is undefined, for lack of test images, masks or defects, is None, and a note gives the reason. Under
    torchrun, every process returns the same result, and every image counts once.

    Args:
        model: Model, moved to ``device``. Its training mode is restored afterwards. `recontrast.inference.options`
            builds faster versions of a model.
        samples: Samples of one or several categories; those of the train split are ignored.
        recipe: Recipe, for size, crop, map, score, mask rule and precision. With ``tile``, images keep their original
            scale, maps are blended from tiles that share a quarter, and pixel metrics are streamed.
        device: Device to move the model to; None leaves it where it is.
        batch: Number of images per batch.
        workers: Number of threads that decode; None for one per CPU.
        on_progress: Function called with the category, the images done and the images in the category, of this process.
        on_maps: Function called with the samples of each batch of this process and their maps.
        cache_dir: Folder for decoded images; None decodes them while the network runs. Not used with tiles.
        streaming: Whether to compute pixel metrics from histograms, in constant memory and with proven error bounds,
            instead of exactly.
        memory: Number of bytes; if the maps of a category have more, they are kept in a temporary file.
        trained: Fingerprints of the training images (`recontrast.data.fingerprint.read_fingerprints`). Test images
            among them are named in a `recontrast.data.listing.DataWarning`. Not used with tiles.

    Returns:
        One row for each category in the given order, their mean, and the score of each image.

    Raises:
        ValueError: If there are no test images, ``batch`` is below 1, the image size is not a multiple of the model's
            stride, a file is not an image, or a mask does not fit its image.
        OSError: If a file cannot be read, or the cache or the maps cannot be written.
    """
    groups = _group_test_samples(samples)
    if batch < 1:
        raise ValueError(f"evaluate: batch: wanted at least 1, got {batch}")
    model.map_sizes(recipe.out)  # raises an error if the size is not a multiple of the stride
    if device is not None:
        move_model(model, resolve_device(device), recipe.channels_last)
    model_device, world = next(model.parameters()).device, distributed.current_world()
    shares = {name: tests[world.share(len(tests))] for name, tests in groups.items()}
    clock = Clock(model_device)
    checks = TrainingImageChecks(trained)
    batches = _Batches(_infer_samples(model, list(shares.values()), recipe, batch, workers, cache_dir, clock, checks))
    streaming = streaming or recipe.tile is not None  # images at their original scale have too many pixels to sort
    jobs: list[Future[Row]] = []
    scored: list[ScoredImage] = []
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as background:
        category: Category | None = None
        try:
            for name, tests in groups.items():
                histograms = metrics.Streaming(max_map_value(model, recipe), device=model_device) if streaming else None
                category = Category(name, tests, recipe, world, readers, histograms, memory)
                _collect(category, shares[name], batches, clock, model_device, on_progress, on_maps)
                scored += category.list_scored_images()
                if jobs:
                    jobs[-1].result()  # waits, so that at most two categories have their maps in memory
                if world.first:
                    jobs.append(background.submit(category.compute_row))
            rows = [job.result() for job in jobs]
        finally:
            batches.close()
            if category is not None:
                category.cancel()
    rows = distributed.broadcast_from_first(world, _add_untested(rows, samples))
    settings = (recipe.name, recipe.out, recipe.score, recipe.blur, recipe.reduce, recipe.mask_rule)
    checks.warn(sum(map(len, groups.values())))
    return Result(rows, *settings, scored=scored, tile=recipe.tile)


def _add_untested(rows: list[Row], samples: Sequence[Sample] | Mapping[str, Sequence[Sample]]) -> list[Row]:
    """Add a row for each category without test images, so that a category never disappears from the table."""
    if not rows:  # not the first process
        return rows
    computed = {row.category: row for row in rows}
    names = dict.fromkeys(sample.category for sample in _flatten(samples))
    return [computed.get(name) or Row(name, 0, 0, note="no metrics: there are no test images") for name in names]


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
    model: ReContrast | FoldedModel,
    groups: Sequence[Sequence[Sample]],
    recipe: Recipe,
    batch: int,
    workers: int | None,
    cache_dir: str | Path | None,
    clock: Clock,
    checks: TrainingImageChecks,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an iterator over maps and scores of the samples of all groups, one group after the other."""
    if recipe.tile is not None:
        paths = [sample.path for group in groups for sample in group]
        return tiling.infer_files(paths, model, recipe, batch, clock)
    images: list[Images] = [
        SampleImages(group, recipe, workers)
        if cache_dir is None
        else ImageCache(group, recipe.size, recipe.crop, cache_dir, bits=recipe.bits, workers=workers)
        for group in groups
    ]
    images = checks.wrap(images, groups)
    return infer(model, ConcatImages(images), recipe, batch=batch, clock=clock)


def _collect(
    category: Category,
    samples: Sequence[Sample],
    batches: "_Batches",
    clock: Clock,
    device: torch.device,
    on_progress: OnProgress | None,
    on_maps: OnMaps | None,
) -> None:
    """Add the maps and scores of this process's ``samples`` to their category, then gather those of all processes."""
    stop, seconds_before = 0, clock.seconds()
    for maps, scores in batches.take(len(samples)):
        start, stop = stop, stop + len(scores)
        category.add(start, maps, scores)
        if on_maps is not None:
            on_maps(samples[start:stop], maps.cpu().numpy())
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
