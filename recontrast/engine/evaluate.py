"""Evaluation: images -> maps and scores -> metrics by category; what the reference's `evaluation` (utils.py) does.

The reference goes image by image and gathers pixels in Python lists. Here a category goes in batches, maps and scores
stay on the device until its end, and files are decoded while the network runs.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recontrast import metrics
from recontrast.anomaly_map import AnomalyMap
from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample
from recontrast.data.images import normalise, read_mask
from recontrast.engine.batches import Images
from recontrast.engine.device import choose, memory_format, put
from recontrast.engine.recipes import Recipe
from recontrast.engine.result import Result, Row
from recontrast.model import ReContrast

__all__ = ["Result", "Row", "evaluate", "infer"]
OnProgress = Callable[[str, int, int], None]  # category, images done, images of the category


def evaluate(
    model: ReContrast,
    samples: Sequence[Sample] | Mapping[str, Sequence[Sample]],
    recipe: Recipe,
    *,
    device: str | torch.device | None = None,
    batch: int = 16,
    workers: int | None = None,
    on_progress: OnProgress | None = None,
    cache_dir: str | Path | None = None,
) -> Result:
    """Metrics of ``model`` on the test images among ``samples``, by category.

    A category without masks, or without defects, has None for the metrics that this leaves undefined, and a note.

    Args:
        model: moved to ``device``; its mode is as before afterwards.
        samples: of one category or of several; those of the train split are passed over.
        recipe: for size, crop, map, score, mask rule and precision.
        device: None leaves the model where it is.
        batch: images at once.
        workers: threads that decode; None takes one per CPU.
        on_progress: called with category, images done, and images of the category.
        cache_dir: folder for decoded images; None decodes them anew, while the network runs.

    Returns:
        A row for each category, in the order in which they come, and the mean.
    """
    everything = [s for group in samples.values() for s in group] if isinstance(samples, Mapping) else list(samples)
    groups: dict[str, list[Sample]] = {}
    for sample in everything:
        if sample.split == "test":
            groups.setdefault(sample.category, []).append(sample)
    if not groups:
        raise ValueError(f"evaluate: samples: wanted test images, got none among {len(everything)} samples")
    if batch < 1:
        raise ValueError(f"evaluate: batch: wanted at least 1, got {batch}")
    model.map_sizes(recipe.out)  # refuses a size that its strides do not divide
    if device is not None:
        put(model, recipe, choose(device))
    rows = []
    with ThreadPoolExecutor(workers) as pool:
        for category, tests in groups.items():
            masks = {i: pool.submit(_mask, s, recipe) for i, s in enumerate(tests) if s.label and s.mask is not None}
            images = _images(tests, recipe, workers, cache_dir)
            try:
                rows.append(_row(model, category, tests, images, masks, recipe, batch, on_progress))
            finally:
                for mask in masks.values():
                    mask.cancel()
    return Result(rows, recipe.name, recipe.out, recipe.score, recipe.blur, recipe.reduce, recipe.mask_rule)


def infer(
    model: ReContrast, images: Images, recipe: Recipe, *, batch: int = 16, clock: "Clock | None" = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Anomaly maps and scores, batch after batch; the next one is fetched while the network runs.

    Args:
        model: on any device; in eval mode while the iterator runs.
        images: decoded at ``recipe.out``, (n, H, W, 3) uint8: an array, or whatever has a length and can be indexed
            with an array of whole numbers, such as `ImageCache`.
        recipe: for map, score and precision.
        batch: images at once.
        clock: told what takes the time.

    Yields:
        Maps (N, H, W) and scores (N,), float32, on the model's device.
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


class Clock:
    """Seconds by name between marks; on CUDA of the device's time, so that nothing waits before `seconds`."""

    def __init__(self, device: torch.device) -> None:
        """A clock of ``device`` that starts now."""
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
        """The sum for each name; waits for the device."""
        if self.cuda:
            self.marks[-1][1].synchronize()
        total: dict[str, float] = {}
        for (_, before), (name, after) in pairwise(self.marks):
            passed = before.elapsed_time(after) / 1000 if self.cuda else after - before
            total[name] = total.get(name, 0.0) + passed
        return total


class _Files:
    """Image files, decoded when they are indexed."""

    def __init__(self, samples: Sequence[Sample], recipe: Recipe, workers: int | None) -> None:
        self.samples, self.recipe, self.workers = samples, recipe, workers

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> NDArray[np.uint8]:
        wanted = [self.samples[i] for i in index]
        return ImageCache(wanted, self.recipe.size, self.recipe.crop, workers=self.workers)[:]


def _row(
    model: ReContrast,
    category: str,
    samples: Sequence[Sample],
    images: Images,
    masks: Mapping[int, Future[NDArray[np.bool_]]],
    recipe: Recipe,
    batch: int,
    on_progress: OnProgress | None,
) -> Row:
    """Metrics of one category; ``masks`` holds those of the defect images that have one, by place."""
    count, defects = len(samples), sum(sample.label for sample in samples)
    pixels = 0 < len(masks) == defects
    device = next(model.parameters()).device
    maps = torch.empty((count if pixels else 0, *recipe.out), device=device)  # stays there until the end
    scores = torch.empty(count, device=device)
    clock, done = Clock(device), 0
    for part, score in infer(model, images, recipe, batch=batch, clock=clock):
        scores[done : done + len(score)] = score
        if pixels:
            maps[done : done + len(part)] = part
        done += len(score)
        if on_progress is not None:
            on_progress(category, done, count)
    truth = np.zeros((len(maps), *recipe.out), bool)  # good images have no defect anywhere
    if pixels:
        for place, mask in masks.items():
            truth[place] = mask.result()
        clock.mark("loading")
    seconds = clock.seconds()

    begun = time.perf_counter()
    values: dict[str, float] = {}
    notes = []
    if 0 < defects < count:
        found = metrics.image_metrics(scores, np.array([sample.label for sample in samples]))
        values |= {"i_auroc": found.auroc, "i_ap": found.ap, "i_f1": found.f1_max, "i_threshold": found.f1_threshold}
    else:
        notes.append(f"no metrics of images, for want of a {'good' if defects else 'defect'} one")
    if pixels and 0 < np.count_nonzero(truth) < truth.size:
        of = metrics.pixel_metrics(maps, truth)
        values |= {"p_auroc": of.auroc, "p_ap": of.ap, "p_f1": of.f1_max, "p_threshold": of.f1_threshold}
        values |= {"aupro": of.aupro} | (
            {} if math.isnan(of.aupro_per_image) else {"aupro_per_image": of.aupro_per_image}
        )
        if "aupro_per_image" not in values:
            notes.append("no AUPRO per image, which an image leaves undefined")
    elif pixels:
        notes.append("no metrics of pixels, whose masks are all of one kind")
    elif defects:
        notes.append(f"no metrics of pixels, as {defects - len(masks)} of {defects} defect images have no mask")
    seconds["metrics"] = time.perf_counter() - begun
    return Row(category, count, defects, **values, seconds=seconds, note="; ".join(notes))


def _images(samples: Sequence[Sample], recipe: Recipe, workers: int | None, cache_dir: str | Path | None) -> Images:
    if cache_dir is None:
        return _Files(samples, recipe, workers)
    return ImageCache(samples, recipe.size, recipe.crop, cache_dir, workers=workers)


def _mask(sample: Sample, recipe: Recipe) -> NDArray[np.bool_]:
    if sample.mask is None:
        raise ValueError(f"{sample.path}: wanted an image with a mask, got one without")
    return read_mask(sample.mask, size=recipe.size, crop=recipe.crop, rule=recipe.mask_rule, image=sample.path)
