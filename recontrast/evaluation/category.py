"""What evaluation keeps of one category until its metrics are computed."""

import math
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recontrast import metrics
from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample
from recontrast.evaluation.ground_truth import read_ground_truth
from recontrast.evaluation.results import Row
from recontrast.recipes.recipe import Recipe
from recontrast.runtime import distributed
from recontrast.runtime.collectives import gather_shares
from recontrast.runtime.distributed import World


class SampleImages:
    """Image files, decoded when they are indexed.

    Args:
        samples: the files.
        recipe: for size and crop.
        workers: threads that decode; None takes one per CPU.
    """

    def __init__(self, samples: Sequence[Sample], recipe: Recipe, workers: int | None) -> None:
        self.samples, self.recipe, self.workers = samples, recipe, workers

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> NDArray[np.uint8]:
        """The images of an array of whole numbers ``index``: (n, H, W, 3) uint8."""
        wanted = [self.samples[i] for i in index]
        return ImageCache(wanted, self.recipe.size, self.recipe.crop, workers=self.workers)[:]


class Category:
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
        self.maps = _allocate_maps((len(mine) if self.pixels and streamed is None else 0, *recipe.out), memory)
        # Exact metrics are formed by the first process, of all images; histograms are filled by each, of its own.
        wanted = [] if not self.pixels else mine if streamed is not None else tests if place.first else []
        self.defective = {i: s for i, s in enumerate(wanted) if s.label}
        # Masks are read ahead; of images at their own scale when they are needed: all of them may take any memory.
        ahead = {} if recipe.tile is not None else self.defective
        self.masks = {i: readers.submit(read_ground_truth, s, recipe) for i, s in ahead.items()}

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
        self.scores = gather_shares(self.scores.to(device), self.shares).cpu()
        if self.pixels and self.streamed is not None:
            distributed.sum_over_processes(self.streamed.state().values(), device)
        elif self.pixels:
            self.maps = gather_shares(torch.from_numpy(self.maps).to(device), self.shares).cpu().numpy()

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
                truth[i - begun] = read_ground_truth(self.defective[i], self.recipe)
        return truth

    def _exact(self) -> tuple[dict[str, float], dict[str, float]] | None:
        truth = self._truth(0, len(self.tests), self.recipe.out)
        if not 0 < np.count_nonzero(truth) < truth.size:
            return None
        of = metrics.pixel_metrics(self.maps, truth)
        self.maps = self.maps[:0]
        values = {"p_auroc": of.auroc, "p_ap": of.ap, "p_f1": of.f1_max, "p_threshold": of.f1_threshold}
        return _drop_undefined({**values, "aupro": of.aupro, "aupro_per_image": of.aupro_per_image}), {}

    def _streamed(self) -> tuple[dict[str, float], dict[str, float]] | None:
        if self.streamed is None or not self.streamed.has_both_classes:
            return None
        of = self.streamed.compute()
        found = {"p_auroc": of.auroc, "p_ap": of.ap, "p_f1": of.f1_max, "aupro": of.aupro}
        values = {name: estimate.value for name, estimate in found.items()}
        values |= {"p_threshold": of.f1_threshold, "aupro_per_image": of.aupro_per_image}
        return _drop_undefined(values), {name: estimate.bound for name, estimate in found.items()}


def _drop_undefined(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not math.isnan(value)}


def _allocate_maps(shape: tuple[int, ...], memory: int) -> NDArray[np.float32]:
    """An array of ``shape``; in a file without a name where it takes more than ``memory`` bytes."""
    if 4 * math.prod(shape) <= memory:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile(prefix="recontrast-maps-") as file:  # the memory map keeps it
        return np.asarray(np.memmap(file, np.float32, "w+", shape=shape))
