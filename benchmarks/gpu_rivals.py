"""Stage `rivals` of `gpu.sh`: PatchCore, PaDiM and UniAD with the sizes of their published results."""

from functools import partial

import numpy as np
import torch
from measurements import Run

from recontrast.architectures import build_model
from recontrast.data.images import normalise
from recontrast.models.coreset import find_nearest, select_coreset
from recontrast.models.network import Network
from recontrast.recipes.paper import RECIPES
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import move_model
from recontrast.training.optimisers import build_optimisers
from recontrast.training.step import train_step

TINY = {"backbone": "resnet18", "size": 64}


def rivals(run: Run) -> None:
    """Measure the parts of fitting and prediction, those that take longest first."""
    _measure_patchcore(run)
    _measure_uniad(run)
    _measure_padim(run)


def _build(run: Run, name: str, **changes) -> tuple[Recipe, Network, torch.Tensor]:
    """Build the network of a recipe with random weights, and normalised images of noise."""
    recipe = RECIPES[name].replace(weights="random", **changes)
    if run.tiny:
        recipe = recipe.replace(**TINY, **({} if recipe.crop is None else {"crop": None}))
    model = build_model(recipe, "all")
    channels_last = move_model(model, run.device, recipe.channels_last) == torch.channels_last
    count = 2 if run.tiny else 64
    pixels = np.random.default_rng(0).integers(0, 256, (count, *recipe.out, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).to(run.device)
    return recipe, model.eval(), normalise(images, model.mean, model.std, channels_last=channels_last)


@torch.no_grad()
def _measure_patchcore(run: Run) -> None:
    """Measure the coreset of one category of MVTec AD (242 images on average), the search in it, and the features."""
    recipe, model, images = _build(run, "patchcore_mvtec")
    height, width = model.map_sizes(recipe.out)[0]
    points, share = height * width, recipe.bank_share
    total = (8 if run.tiny else 242) * points
    group = f"PatchCore, {recipe.backbone}, {recipe.out[0]} px"
    projected = torch.randn(total, 128, device=run.device)
    count = int(share * total)
    name = f"coreset, {count} of {total} vectors"
    run.measure(group, name, partial(select_coreset, projected, count), seconds=1.0, most=3)
    del projected
    if run.is_out_of_time():
        return
    bank = torch.randn(count, model.width, device=run.device)
    queries = torch.randn(len(images) * points, model.width, device=run.device)
    run.measure(group, f"search in {count} vectors", partial(find_nearest, queries, bank), images=len(images), most=10)
    del queries
    run.measure(group, "features", lambda: model(images), images=len(images), most=10)
    model.bank = bank.half()
    run.measure(group, "distances and scores", lambda: model.distances(images), images=len(images), most=10)


def _measure_uniad(run: Run) -> None:
    """Measure a training step and a prediction of the batch of the authors' configuration."""
    for precision in ("bfloat16", "float32"):
        if run.is_out_of_time():
            return
        recipe, model, images = _build(run, "uniad_mvtec", precision=precision)
        optimisers = build_optimisers(model, recipe, run.device)
        group = f"UniAD, {recipe.backbone}, {recipe.out[0]} px, batch {len(images)}"

        def step(model=model, optimisers=optimisers, images=images, recipe=recipe):
            model.train()
            return train_step(model, optimisers, images, 0.0, recipe)

        run.measure(group, f"training step, {precision}", step, images=len(images), seconds=1.0, most=10)
    model.eval()
    with torch.no_grad():
        run.measure(group, "distances and scores", lambda: model.distances(images), images=len(images), most=10)


@torch.no_grad()
def _measure_padim(run: Run) -> None:
    """Measure the moments of a batch, the factors of all points, and a prediction."""
    if run.is_out_of_time():
        return
    recipe, model, images = _build(run, "padim_mvtec", **({"gaussian_features": 20} if run.tiny else {}))
    group = f"PaDiM, {recipe.backbone}, {recipe.out[0]} px, {recipe.gaussian_features} features"

    def fit():
        model.observe(images)
        model.fit_gaussians()

    run.measure(group, f"fit to {len(images)} images", fit, images=len(images), seconds=1.0, most=3)
    run.measure(group, "distances and scores", lambda: model.distances(images), images=len(images), most=5)
