"""The network over many images: the next batch is fetched while it runs, maps and scores leave as they come."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recontrast.anomaly_map import AnomalyMap
from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample
from recontrast.data.images import normalise
from recontrast.engine.batches import Images
from recontrast.engine.device import convolutions, memory_format
from recontrast.engine.recipes import Recipe
from recontrast.fold import Folded
from recontrast.model import ReContrast


def infer(
    model: ReContrast | Folded, images: Images, recipe: Recipe, *, batch: int = 16, clock: "Clock | None" = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Anomaly maps and scores, batch after batch; the next one is fetched while the network runs.

    Args:
        model: on any device; in eval mode while the iterator runs. `recontrast.engine.ready` makes quicker ones.
        images: decoded at ``recipe.out``, (n, H, W, 3) uint8: an array, or whatever has a length and can be indexed
            with an array of whole numbers, such as `ImageCache`.
        recipe: for map, score and precision.
        batch: images at once.
        clock: told what takes the time.

    Yields:
        Maps (N, H, W) and scores (N,), float32, on the model's device.

    Raises:
        ValueError: a size that the model's strides do not divide, or images that cannot be decoded.
        OSError: a file of theirs cannot be read.
    """
    weight = next(model.parameters())
    last = memory_format(recipe, weight.device) == torch.channels_last
    amap = AnomalyMap(model.map_sizes(recipe.out), recipe.out, blur=recipe.blur, reduce=recipe.reduce)
    clock = clock or Clock(weight.device)

    @torch.inference_mode()  # not around the yield: it would reach into the caller
    def maps_of(fetched: Future[Tensor]) -> tuple[Tensor, Tensor]:
        pixels = fetched.result()
        clock.mark("loading")
        pixels = pixels.to(weight.device, non_blocking=True)
        x = normalise(pixels, model.mean, model.std, dtype=weight.dtype, channels_last=last)
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            with convolutions(recipe):
                pairs = model(x, recipe.views)
        clock.mark("forward")
        found = amap.maps_and_scores(pairs, recipe.score)
        clock.mark("maps")
        return found

    def fetch(start: int) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(images[np.arange(start, min(start + batch, len(images)))]))
        return pixels.pin_memory() if weight.device.type == "cuda" else pixels

    was_training = model.training
    model.eval()
    try:
        with ThreadPoolExecutor(1) as pool:
            starts = range(0, len(images), batch)
            ahead = [pool.submit(fetch, start) for start in starts[:1]]
            while ahead:
                ahead += [pool.submit(fetch, start) for start in starts[1:2]]
                starts = starts[1:]
                yield maps_of(ahead.pop(0))
    finally:
        model.train(was_training)


def highest(model: ReContrast | Folded, recipe: Recipe) -> float:
    """The largest value that a map can have: a cosine distance is at most 2.

    Args:
        model: for the number of its levels and encoders.
        recipe: for ``views``, ``reduce`` and the size.

    Returns:
        2, times the number of pairs where they are summed.

    Raises:
        ValueError: a size that the model's strides do not divide.
    """
    groups = 2 if model.frozen is not None and recipe.views == "both" else 1
    return 2.0 * groups * len(model.map_sizes(recipe.out)) if recipe.reduce == "sum" else 2.0


class Clock:
    """Seconds by name between marks; on CUDA of the device's time, so that nothing waits before `seconds`."""

    def __init__(self, device: torch.device) -> None:
        """A clock that starts now.

        Args:
            device: whose time it is.
        """
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []
        self.mark("start")

    def mark(self, name: str) -> None:
        """What has passed since the last mark counts for ``name``."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """The sum for each name, seconds; waits for the device."""
        if self.cuda:
            self.marks[-1][1].synchronize()
        total: dict[str, float] = {}
        for (_, before), (name, after) in pairwise(self.marks):
            passed = before.elapsed_time(after) / 1000 if self.cuda else after - before
            total[name] = total.get(name, 0.0) + passed
        return total


class Files:
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


class Chain:
    """Images of several sources as those of one, in their order.

    Args:
        sources: images of one size.
    """

    def __init__(self, sources: Sequence[Images]) -> None:
        self.sources = sources
        self.ends = list(accumulate((len(source) for source in sources), initial=0))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: Any) -> NDArray[np.uint8]:
        """The images of an array of rising whole numbers ``index``: (n, H, W, 3) uint8."""
        parts = []
        for source, (begin, end) in zip(self.sources, pairwise(self.ends), strict=True):
            inside = index[(index >= begin) & (index < end)]  # indices rise
            if inside.size:
                parts.append(source[inside - begin])
        return np.concatenate(parts)
