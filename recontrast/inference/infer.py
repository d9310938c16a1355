"""The inference loop: batches of images in, anomaly maps and scores out."""

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
    model: ReContrast | FoldedModel, images: Images, recipe: Recipe, *, batch: int = 16, clock: Clock | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute anomaly maps and scores, batch after batch. The next batch is loaded while the network runs.

    Args:
        model: Model on any device. It is in eval mode while the iterator runs. `recontrast.inference.options` builds
            faster versions of a model.
        images: Images decoded at ``recipe.out``, (N, H, W, 3) uint8: an array, or any object with a length that can be
            indexed by an array of integers, such as `ImageCache`.
        recipe: Recipe, for map, score and precision.
        batch: Number of images per batch.
        clock: Clock that measures loading, forward pass and maps.

    Yields:
        Maps (N, H, W) and scores (N,), float32, on the model's device.

    Raises:
        ValueError: If the image size is not a multiple of the model's stride, or an image cannot be decoded.
        OSError: If an image file cannot be read.
    """
    weight = next(model.parameters())
    channels_last = resolve_memory_format(weight.device, recipe.channels_last) == torch.channels_last
    amap = AnomalyMap(model.map_sizes(recipe.out), recipe.out, blur=recipe.blur, reduce=recipe.reduce)
    clock = clock or Clock(weight.device)

    @torch.inference_mode()  # around a yield, it would also apply to the caller
    def score_batch(loading: Future[Tensor]) -> tuple[Tensor, Tensor]:
        pixels = loading.result()
        clock.mark("loading")
        pixels = pixels.to(weight.device, non_blocking=True)
        x = normalise(pixels, model.mean, model.std, dtype=weight.dtype, channels_last=channels_last)
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            with convolution_precision(recipe.tf32):
                pairs = model(x, recipe.views)
        clock.mark("forward")
        maps, scores = amap.maps_and_scores(pairs, recipe.score)
        clock.mark("maps")
        return maps, scores

    def load(start: int) -> Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(images[np.arange(start, min(start + batch, len(images)))]))
        return pixels.pin_memory() if weight.device.type == "cuda" else pixels

    was_training = model.training
    model.eval()
    try:
        with ThreadPoolExecutor(1) as pool:
            starts = range(0, len(images), batch)
            queue = [pool.submit(load, start) for start in starts[:1]]
            while queue:
                queue += [pool.submit(load, start) for start in starts[1:2]]
                starts = starts[1:]
                yield score_batch(queue.pop(0))
    finally:
        model.train(was_training)


def max_map_value(model: ReContrast | FoldedModel, recipe: Recipe) -> float:
    """Compute the largest value that an anomaly map can have. A cosine distance is at most 2.

    Args:
        model: Model, for the number of its levels and encoders.
        recipe: Recipe, for ``views``, ``reduce`` and the size.

    Returns:
        2 if distances are averaged, or 2 times the number of feature pairs if they are summed.

    Raises:
        ValueError: If the image size is not a multiple of the model's stride.
    """
    groups = 2 if model.frozen is not None and recipe.views == "both" else 1
    return 2.0 * groups * len(model.map_sizes(recipe.out)) if recipe.reduce == "sum" else 2.0
