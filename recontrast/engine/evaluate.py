"""Evaluation: images -> maps and scores -> metrics by category; what the reference's `evaluation` (utils.py) does.

The reference goes image by image and gathers pixels in Python lists. Here all categories go through the network in one
pass of full batches. Files are decoded ahead of it; behind it, a thread forms the metrics of the category that is
complete. Maps wait in memory, on the disk where a category's pass a limit, or not at all: streaming metrics take them
batch by batch into histograms. Under torchrun each process takes its share of each category.
"""

import math
import tempfile
import time
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
from recontrast.engine import distributed, tiled
from recontrast.engine.batches import Images
from recontrast.engine.device import choose, put
from recontrast.engine.distributed import World
from recontrast.engine.infer import Chain, Clock, Files, highest, infer
from recontrast.engine.recipes import Recipe
from recontrast.engine.result import Result, Row, Scored
from recontrast.engine.truth import truth_of
from recontrast.fold import Folded
from recontrast.loss import of_all
from recontrast.model import ReContrast

__all__ = ["Result", "Row", "evaluate"]
MEMORY = 2 << 30  # bytes of a category's maps that stay in memory: 8192 images of 256 px
OnProgress = Callable[[str, int, int], None]  # category, images done, images of the category
OnMaps = Callable[[Sequence[Sample], NDArray[np.float32]], None]  # images, and their maps (n, H, W)


def evaluate(
    model: ReContrast | Folded,
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
        model: moved to ``device``; its mode is as before afterwards. `recontrast.engine.ready` makes quicker ones.
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
        put(model, recipe, choose(device))
    place = distributed.here()
    mine = {name: tests[place.share(len(tests))] for name, tests in groups.items()}
    where = next(model.parameters()).device
    clock = Clock(where)
    if recipe.tile is None:
        images = Chain([_images(some, recipe, workers, cache_dir) for some in mine.values()])
        feed = _Feed(infer(model, images, recipe, batch=batch, clock=clock))
    else:
        streaming = True  # images differ in size, and have more pixels than can be sorted
        feed = _Feed(tiled.infer_files([s.path for some in mine.values() for s in some], model, recipe, batch, clock))
    jobs: list[Future[Row]] = []
    scored: list[Scored] = []
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as counter:
        category: _Category | None = None
        try:
            for name, tests in groups.items():
                streamed = metrics.Streaming(highest(model, recipe), device=where) if streaming else None
                category = _Category(name, tests, recipe, place, readers, streamed, memory)
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
                    Scored(str(s.path), s.category, s.defect, s.label, score)
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
    rows = distributed.from_first(place, rows)
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
        return Files(samples, recipe, workers)
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


class _Category:
    """What is kept of one category until its metrics are formed."""

    def __init__(
        self,
        name: str,
        tests: Sequence[Sample],
        recipe: Recipe,
        place: World,
        readers: ThreadPoolExecutor,
        streamed: metrics.Streaming | None,
        memory: int,
    ) -> None:
        self.name, self.tests, self.recipe, self.place, self.streamed = name, tests, recipe, place, streamed
        self.shares = place.shares(len(tests))
        mine = tests[place.share(len(tests))]
        self.seconds: dict[str, float] = {}
        self.counting = 0.0  # seconds
        self.defects = sum(s.label for s in tests)
        self.without = sum(s.label and s.mask is None for s in tests)
        self.scores = torch.zeros(len(mine))
        self.pixels = self.defects > 0 and not self.without
        self.maps = _room((len(mine) if self.pixels and streamed is None else 0, *recipe.out), memory)
        # Exact metrics are formed by the first process, of all images; histograms are filled by each, of its own.
        wanted = [] if not self.pixels else mine if streamed is not None else tests if place.first else []
        self.defective = {i: s for i, s in enumerate(wanted) if s.label}
        # Masks are read ahead; of images at their own scale when they are needed: all of them may take any memory.
        ahead = {} if recipe.tile is not None else self.defective
        self.masks = {i: readers.submit(truth_of, s, recipe) for i, s in ahead.items()}

    def add(self, begun: int, maps: Tensor, scores: Tensor) -> None:
        """Keep what the network made of images ``begun``, ``begun + 1``, ... of this process's share."""
        done = begun + len(scores)
        self.scores[begun:done] = scores.cpu()
        if self.pixels and self.streamed is not None:
            truth = self._truth(begun, done, tuple(maps.shape[1:]))
            since = time.perf_counter()
            self.streamed.update(maps, truth)
            self.counting += time.perf_counter() - since
        elif self.pixels:
            self.maps[begun:done] = maps.cpu().numpy()

    def complete(self, device: torch.device) -> None:
        """Bring together what the processes hold; all of them must call it."""
        if self.place.size == 1:
            return
        self.scores = of_all(self.scores.to(device), self.shares).cpu()
        if self.pixels and self.streamed is not None:
            distributed.add_up(self.streamed.state().values(), device)
        elif self.pixels:
            self.maps = of_all(torch.from_numpy(self.maps).to(device), self.shares).cpu().numpy()

    def row(self) -> Row:
        """The metrics, and why those that are lacking do."""
        count, since = len(self.tests), time.perf_counter()
        values: dict[str, float] = {}
        bounds: dict[str, float] = {}
        notes = []
        if 0 < self.defects < count:
            found = metrics.image_metrics(self.scores, np.array([sample.label for sample in self.tests]))
            values |= {"i_auroc": found.auroc, "i_ap": found.ap, "i_f1": found.f1_max, "i_accuracy": found.accuracy}
            values["i_threshold"] = found.f1_threshold
        else:
            notes.append(f"no metrics of images, for want of a {'good' if self.defects else 'defect'} one")
        if self.pixels:
            of = self._streamed() if self.streamed is not None else self._exact()
            if of is None:
                notes.append("no metrics of pixels, whose masks are all of one kind")
            else:
                values, bounds = values | of[0], of[1]
                if "aupro_per_image" not in values:
                    notes.append("no AUPRO per image, which an image leaves undefined")
        elif self.defects:
            notes.append(f"no metrics of pixels, as {self.without} of {self.defects} defect images have no mask")
        seconds = {**self.seconds, "metrics": self.counting + time.perf_counter() - since}
        return Row(self.name, count, self.defects, **values, seconds=seconds, bounds=bounds, note="; ".join(notes))

    def cancel(self) -> None:
        """Read no more masks."""
        for mask in self.masks.values():
            mask.cancel()

    def _truth(self, begun: int, done: int, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """Masks (H, W) = ``shape`` of images ``begun`` to ``done``; good images have no defect anywhere."""
        truth = np.zeros((done - begun, *shape), bool)
        for i in range(begun, done):
            if i in self.masks:
                truth[i - begun] = self.masks.pop(i).result()
            elif i in self.defective:
                truth[i - begun] = truth_of(self.defective[i], self.recipe)
        return truth

    def _exact(self) -> tuple[dict[str, float], dict[str, float]] | None:
        truth = self._truth(0, len(self.tests), self.recipe.out)
        if not 0 < np.count_nonzero(truth) < truth.size:
            return None
        of = metrics.pixel_metrics(self.maps, truth)
        self.maps = self.maps[:0]
        values = {"p_auroc": of.auroc, "p_ap": of.ap, "p_f1": of.f1_max, "p_threshold": of.f1_threshold}
        return _defined({**values, "aupro": of.aupro, "aupro_per_image": of.aupro_per_image}), {}

    def _streamed(self) -> tuple[dict[str, float], dict[str, float]] | None:
        if self.streamed is None or not self.streamed.both:
            return None
        of = self.streamed.compute()
        found = {"p_auroc": of.auroc, "p_ap": of.ap, "p_f1": of.f1_max, "aupro": of.aupro}
        values = {name: estimate.value for name, estimate in found.items()}
        values |= {"p_threshold": of.f1_threshold, "aupro_per_image": of.aupro_per_image}
        return _defined(values), {name: estimate.bound for name, estimate in found.items()}


def _defined(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _room(shape: tuple[int, ...], memory: int) -> NDArray[np.float32]:
    """An array of ``shape``; in a file without a name where it takes more than ``memory`` bytes."""
    if 4 * math.prod(shape) <= memory:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile(prefix="recontrast-maps-") as file:  # the memory map keeps it
        return np.asarray(np.memmap(file, np.float32, "w+", shape=shape))
