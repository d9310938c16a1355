"""The network over many images: the next batch is fetched while it runs, maps and scores leave as they come."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from recontrast.anomaly_map import AnomalyMap
from recontrast.data.images import normalise
from recontrast.data.sources import Images
from recontrast.models.fold import FoldedModel
from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.clock import Clock
from recontrast.runtime.device import convolution_precision, resolve_memory_format


def infer(
    model: ReContrast | FoldedModel, images: Images, recipe: Recipe, *, batch: int = 16, clock: "Clock | None" = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Anomaly maps and scores, batch after batch; the next one is fetched while the network runs.

    Args:
        model: on any device; in eval mode while the iterator runs. `recontrast.inference.options` makes quicker ones.
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
    last = resolve_memory_format(weight.device, recipe.channels_last) == torch.channels_last
    amap = AnomalyMap(model.map_sizes(recipe.out), recipe.out, blur=recipe.blur, reduce=recipe.reduce)
    clock = clock or Clock(weight.device)

    @torch.inference_mode()  # not around the yield: it would reach into the caller
    def maps_of(fetched: Future[Tensor]) -> tuple[Tensor, Tensor]:
        pixels = fetched.result()
        clock.mark("loading")
        pixels = pixels.to(weight.device, non_blocking=True)
        x = normalise(pixels, model.mean, model.std, dtype=weight.dtype, channels_last=last)
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            with convolution_precision(recipe.tf32):
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


def max_map_value(model: ReContrast | FoldedModel, recipe: Recipe) -> float:
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
