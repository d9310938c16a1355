"""The inference loop: batches of images in, anomaly maps and scores out."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from recontrast.anomaly_map import AnomalyMap
from recontrast.data.images import normalise
from recontrast.data.sources import Images
from recontrast.data.views import combine_views
from recontrast.float32 import convolution_precision
from recontrast.inference.load_ahead import compute_batches
from recontrast.inference.rois import Masks, Rois
from recontrast.models.network import Network
from recontrast.ops import void_unless_finite
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.clock import Clock
from recontrast.runtime.device import copy_to_device, resolve_memory_format
from recontrast.runtime.threads import after_step, start_threads


def infer(
    model: Network, images: Images, recipe: Recipe, *, batch: int = 16, clock: Clock | None = None,
    rois: Masks | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Compute anomaly maps and scores, batch after batch. The next batch is loaded while the network runs.

    Args:
        model: Model on any device. It is in eval mode while the iterator runs. `recontrast.inference.options` builds
            faster versions of a model.
        images: Images decoded at ``recipe.out``, (N, H, W, 3) uint8: an array, or any object with a length that can be
            indexed by an array of integers, such as `ImageCache`. If the recipe has several views of a part, these are
            images in sequence, and there are N / views parts.
        recipe: Recipe, for map, score and precision.
        batch: Number of images per batch, or of views; at least one part.
        clock: Clock that measures loading, forward pass and maps.
        rois: Regions of interest of the images, indexed by position: masks (n, H, W) of the maps, bool. None: that of
            the recipe.

    Yields:
        Maps (N, H, W) and scores (N,), float32, on the model's device; one of each part. Outside a region of interest
        the map is 0, and the score is that of the pixels inside.

    Raises:
        ValueError: If the image size is not a multiple of the model's stride, an image cannot be decoded, or each image
            needs a region of interest of its own and ``rois`` is None.
        OSError: If an image file cannot be read.
    """
    weight = next(model.parameters())
    channels_last = resolve_memory_format(weight.device, recipe.channels_last) == torch.channels_last
    amap = build_anomaly_map(model, recipe)
    clock = clock or Clock(weight.device)
    if rois is None and recipe.roi is not None:
        rois = Rois(recipe)
    views = 1 if recipe.image_views is None else len(recipe.image_views)
    count, batch = len(images) // views, max(batch // views, 1)  # of parts
    is_shared = isinstance(rois, Rois) and rois.shared is not None
    shared = torch.tensor(rois[0], device=weight.device) if rois is not None and is_shared else None

    @torch.inference_mode()  # around a yield, it would also apply to the caller
    def score_batch(loaded: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
        pixels, masks = loaded
        clock.mark("loading")
        pixels = copy_to_device(pixels, weight.device)
        x = normalise(pixels, model.mean, model.std, dtype=weight.dtype, channels_last=channels_last)
        with torch.autocast(weight.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            with convolution_precision(recipe.tf32):
                distances, own_scores = model.distances(x, recipe.views)
        clock.mark("forward")
        inside = shared if masks is None else copy_to_device(masks, weight.device)
        maps, maximum = amap.from_distances(distances, inside)
        if views > 1:  # one region of interest is that of all views
            maps = combine_views(maps, views, recipe.view_map)
            maximum = amap.score(maps, "max", inside)
            own_scores = None if own_scores is None else combine_views(own_scores, views, recipe.view_map)
        scores = select_scores(amap, maps, maximum, own_scores, recipe, inside)
        clock.mark("maps")
        return maps, scores

    def load(start: int) -> tuple[Tensor, Tensor | None]:
        index = np.arange(start, min(start + batch, count))
        own = index if views == 1 else np.arange(index[0] * views, (index[-1] + 1) * views)
        pixels = torch.from_numpy(np.ascontiguousarray(images[own]))
        masks = None if rois is None or is_shared else torch.from_numpy(np.ascontiguousarray(rois[index]))
        return pixels.pin_memory() if weight.device.type == "cuda" else pixels, masks

    was_training = model.training
    model.eval()
    start_threads(weight.device)
    try:
        for maps, scores in compute_batches(load, score_batch, count, batch):
            yield maps, scores
            after_step(weight.device)
    finally:
        model.train(was_training)


def build_anomaly_map(model: Network, recipe: Recipe, method: Literal["auto", "matmul"] = "auto") -> AnomalyMap:
    """Build the function that computes the anomaly maps of a network from its distances.

    Args:
        model: Network, for the sizes of its distances and how they are upsampled.
        recipe: Recipe, for the size, ``blur`` and ``reduce``.
        method: How maps are computed, see `AnomalyMap`.

    Returns:
        The anomaly map.

    Raises:
        ValueError: If the image size is not a multiple of the model's stride.
    """
    return AnomalyMap(
        model.map_sizes(recipe.out), recipe.map_out, recipe.blur, recipe.reduce, method,
        align_corners=model.align_corners, through=None if recipe.map_size is None else recipe.out,
    )  # fmt: skip


def select_scores(
    amap: AnomalyMap, maps: Tensor, maximum: Tensor, own: Tensor | None, recipe: Recipe, inside: Tensor | None = None
) -> Tensor:
    """Return the image scores that a recipe asks for.

    Args:
        amap: Function that computed the maps.
        maps: Anomaly maps (N, H, W).
        maximum: Largest value of each map, (N,).
        own: The network's own scores, (N,); None if it has none.
        recipe: Recipe, for ``score``.
        inside: Whether each pixel is in the region of interest, (N, H, W) or (1, H, W) bool; None: the whole image.

    Returns:
        Scores (N,), float32; NaN where a map is not finite.

    Raises:
        ValueError: If the recipe asks for the network's own scores, and it has none.
    """
    if recipe.score == "max":
        return maximum
    if recipe.score != "model":
        return amap.score(maps, recipe.score, inside)
    if own is None:
        raise ValueError("score: wanted 'max', 'mean' or a share for a network without scores of its own, got 'model'")
    return void_unless_finite(own, maps)


def max_map_value(model: Network, recipe: Recipe) -> float:
    """Compute the upper end of the scale of anomaly maps.

    Args:
        model: Model, for `Network.max_distance` and the number of its levels and encoders.
        recipe: Recipe, for ``views``, ``reduce`` and the size.

    Returns:
        The largest distance if distances are averaged, or as many times it as there are distances if they are summed.

    Raises:
        ValueError: If the image size is not a multiple of the model's stride.
    """
    groups = 2 if model.frozen is not None and recipe.views == "both" else 1
    return model.max_distance * (groups * len(model.map_sizes(recipe.out)) if recipe.reduce == "sum" else 1)
