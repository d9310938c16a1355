"""Evaluation: images -> maps and scores -> metrics by category; what the reference's `evaluation` (utils.py) does.

The reference goes image by image and gathers pixels in Python lists. Here all categories go through the network in one
pass of full batches. Files are decoded ahead of it; behind it, a thread forms the metrics of the category that is
complete. Maps wait in memory, on the disk where a category's pass a limit, or not at all: streaming metrics take them
batch by batch into histograms. Under torchrun each process takes its share of each category.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from recontrast.inference import tiling
from recontrast.inference.infer import infer, max_map_value
from recontrast.models.fold import FoldedModel
from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe
from recontrast.runtime import distributed
from recontrast.runtime.clock import Clock
from recontrast.runtime.device import move_model, resolve_device

__all__ = ["Result", "Row", "evaluate"]
MEMORY = 2 << 30  # bytes of a category's maps that stay in memory: 8192 images of 256 px
OnProgress = Callable[[str, int, int], None]  # category, images done, images of the category
OnMaps = Callable[[Sequence[Sample], NDArray[np.float32]], None]  # images, and their maps (n, H, W)


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
) -> Result:
    """Metrics of ``model`` on the test images among ``samples``, by category.

    A category without masks, or without defects, has None for the metrics that this leaves undefined, and a note.
    Under torchrun every process gets the same result; no image is counted twice.

    Args:
        model: moved to ``device``; its mode is as before afterwards. `recontrast.inference.options` makes quicker ones.
        samples: of one category or of several; those of the train split are passed over.
        recipe: for size, crop, map, score, mask rule and precision. With ``tile``, images keep their own scale, maps
            are blended from tiles (a quarter of each shared), and metrics of pixels are streamed.
        device: None leaves the model where it is.
        batch: images at once.
        workers: threads that decode; None takes one per CPU.
        on_progress: called with category, images done, and images of the category, of this process.
        on_maps: called with each piece of images of this process, and their maps.
        cache_dir: folder for decoded images; None decodes them anew, while the network runs. Not for tiles.
        streaming: metrics of pixels from histograms, with a proven bound and in constant memory, instead of exact ones.
        memory: bytes; a category's maps that take more wait in a file in the folder for temporary files.

    Returns:
        A row for each category, in the order in which they come, their mean, and the score of each image.

    Raises:
        ValueError: no test images, fewer than 1 at once, a size that the model's strides do not divide, files that are
            no images, or masks that do not fit them.
        OSError: a file cannot be read, or the cache or the maps not be written.
    """
    groups = _test_images(samples)
    if batch < 1:
        raise ValueError(f"evaluate: batch: wanted at least 1, got {batch}")
    model.map_sizes(recipe.out)  # refuses a size that its strides do not divide
    if device is not None:
        move_model(model, resolve_device(device), recipe.channels_last)
    place = distributed.current_world()
    mine = {name: tests[place.share(len(tests))] for name, tests in groups.items()}
    where = next(model.parameters()).device
    clock = Clock(where)
    if recipe.tile is None:
        images = ConcatImages([_images(some, recipe, workers, cache_dir) for some in mine.values()])
        feed = _Feed(infer(model, images, recipe, batch=batch, clock=clock))
    else:
        streaming = True  # images differ in size, and have more pixels than can be sorted
        feed = _Feed(tiling.infer_files([s.path for some in mine.values() for s in some], model, recipe, batch, clock))
    jobs: list[Future[Row]] = []
    scored: list[ScoredImage] = []
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as counter:
        category: Category | None = None
        try:
            for name, tests in groups.items():
                streamed = metrics.Streaming(max_map_value(model, recipe), device=where) if streaming else None
                category = Category(name, tests, recipe, place, readers, streamed, memory)
                done, passed = 0, clock.seconds()
                for maps, scores in feed.take(len(mine[name])):
                    begun, done = done, done + len(scores)
                    category.add(begun, maps, scores)
                    if on_maps is not None:
                        on_maps(mine[name][begun:done], maps.cpu().numpy())
                    if on_progress is not None:
                        on_progress(name, done, len(mine[name]))
                category.complete(where)
                category.seconds = {key: value - passed.get(key, 0.0) for key, value in clock.seconds().items()}
                scored += [
                    ScoredImage(str(s.path), s.category, s.defect, s.label, score)
                    for s, score in zip(tests, category.scores.tolist(), strict=True)
                ]
                if jobs:
                    jobs[-1].result()  # the maps of two categories at most are held at once
                if place.first:
                    jobs.append(counter.submit(category.row))
            rows = [job.result() for job in jobs]
        finally:
            feed.close()
            if category is not None:
                category.cancel()
    rows = distributed.broadcast_from_first(place, rows)
    about = (recipe.name, recipe.out, recipe.score, recipe.blur, recipe.reduce, recipe.mask_rule)
    return Result(rows, *about, scored=scored, tile=recipe.tile)


def _test_images(samples: Sequence[Sample] | Mapping[str, Sequence[Sample]]) -> dict[str, list[Sample]]:
    everything = [s for group in samples.values() for s in group] if isinstance(samples, Mapping) else list(samples)
    groups: dict[str, list[Sample]] = {}
    for sample in everything:
        if sample.split == "test":
            groups.setdefault(sample.category, []).append(sample)
    if not groups:
        raise ValueError(f"evaluate: samples: wanted test images, got none among {len(everything)} samples")
    return groups


def _images(samples: Sequence[Sample], recipe: Recipe, workers: int | None, cache_dir: str | Path | None) -> Images:
    if cache_dir is None:
        return SampleImages(samples, recipe, workers)
    return ImageCache(samples, recipe.size, recipe.crop, cache_dir, workers=workers)


class _Feed:
    """Batches cut where a category ends. One is asked for before the last is handed on: a GPU does not wait."""

    def __init__(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.more = True

    def take(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The next ``count`` images: maps (n, H, W) and scores (n,), piece by piece."""
        while count:
            while self.more and len(self.waiting) < 2:
                found = next(self.batches, None)
                self.more = found is not None
                self.waiting += [] if found is None else [found]
            maps, scores = self.waiting.pop(0)
            if len(scores) > count:
                self.waiting.insert(0, (maps[count:], scores[count:]))
                maps, scores = maps[:count], scores[:count]
            count -= len(scores)
            yield maps, scores

    def close(self) -> None:
        """Stop the network, wherever it is."""
        self.batches.close()  # type: ignore[attr-defined]
