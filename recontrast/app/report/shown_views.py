"""The views of a part that a report shows: all of them or, if there are many, those with the highest map values."""

from collections.abc import Sequence

from recontrast.data.datasets import Sample
from recontrast.data.image_files import IMAGE_ERRORS
from recontrast.data.views import Views
from recontrast.inference.infer import infer
from recontrast.inference.rois import read_sample
from recontrast.inference.tiling import score_tiled_image
from recontrast.models.network import Network
from recontrast.recipes.recipe import Recipe

MOST_VIEWS = 4  # of a part: one beside the heat map, and three in one line below


def select_views(model: Network, sample: Sample, recipe: Recipe, batch: int = 16) -> list[int]:
    """Select the views of a part to show.

    Args:
        model: Network of the detector; it scores the views again if they are more than `MOST_VIEWS`.
        sample: Part, or image.
        recipe: Recipe of the detector.
        batch: Batch size in images.

    Returns:
        Positions of all views in their order, or of the `MOST_VIEWS` with the highest map values, the highest first;
        the first ones if the files cannot be read again. [0] without views.
    """
    views = recipe.image_views
    if views is None:
        return [0]
    positions = list(range(len(views)))
    if len(views) <= MOST_VIEWS:
        return positions
    try:
        peaks = _measure_peaks(model, sample, views, recipe, batch)
    except IMAGE_ERRORS:  # named where the pictures are read
        return positions[:MOST_VIEWS]
    return sorted(positions, key=lambda position: -peaks[position])[:MOST_VIEWS]


def _measure_peaks(model: Network, sample: Sample, views: Views, recipe: Recipe, batch: int) -> Sequence[float]:
    """Return the largest value of the map of each view."""
    size, crop = (recipe.size, recipe.crop) if recipe.tile is None else (None, None)
    pixels = views.read(sample.path, size=size, crop=crop, bits=recipe.bits, window=recipe.window)
    single = recipe.of_single_images
    if recipe.tile is None:
        return [peak for maps, _ in infer(model, pixels, single, batch=batch) for peak in maps.amax((1, 2)).tolist()]
    inside = read_sample(recipe, sample, pixels.shape[1:3])
    maps = (score_tiled_image(model, view, single, batch=batch, inside=inside)[0] for view in pixels)
    return [float(anomaly.max()) for anomaly in maps]
