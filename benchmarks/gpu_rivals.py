"""Stage `rivals` of `gpu.sh`: other methods with the sizes of their published results."""

from functools import partial

import numpy as np
import torch
from bench_transformers import GROUPS, RULES, SHAPES, weight_by_hook
from measurements import Run

from recontrast import pairs_loss
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
    _measure_token_loss(run)
    _measure_transformers(run)
    _measure_uniad(run)
    _measure_padim(run)


def _build(run: Run, name: str, **changes) -> tuple[Recipe, Network, torch.Tensor]:
    """Build the network of a recipe with random weights, and normalised images of noise."""
    recipe = RECIPES[name].replace(weights="random", **changes)
    if run.tiny:
        tokens = {"backbone": "test_vit", "layers": None, "map_size": None} if recipe.layers is not None else {}
        recipe = recipe.replace(**{**TINY, **tokens}, **({} if recipe.crop is None else {"crop": None}))
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


def _measure_token_loss(run: Run) -> None:
    """Measure the losses of Dinomaly and INP-Former beside the hooks of both codes, on two groups of ViT-B."""
    shape = (2, 8, 4, 4) if run.tiny else SHAPES[-1]
    teachers, leaves = ([torch.randn(shape, device=run.device) for _ in range(GROUPS)] for _ in range(2))
    for rule in RULES:
        if run.is_out_of_time():
            return

        def work(compute, rule=rule):
            students = [leaf.requires_grad_() * 1 for leaf in leaves]
            return torch.autograd.grad(compute(list(zip(teachers, students, strict=True)), rule), leaves)

        group = f"loss of token groups, forward and backward, {rule}, {shape}"
        run.measure(group, "ours", partial(work, lambda pairs, rule: pairs_loss(pairs, RULES[rule], groups=GROUPS)))
        run.measure(group, "hook", partial(work, weight_by_hook), seconds=0.4, most=10)


def _measure_transformers(run: Run) -> None:
    """Measure a training step of Dinomaly and INP-Former with computed and with cached features, and a prediction."""
    for name in ("dinomaly_mvtec", "inp_former_mvtec"):
        if run.is_out_of_time():
            return
        recipe, model, images = _build(run, name, precision="bfloat16")
        images = images[:2] if run.tiny else images[: recipe.batch]
        optimisers = build_optimisers(model, recipe, run.device)
        group = f"{recipe.architecture}, {recipe.backbone}, {recipe.out[0]} px, batch {len(images)}, bfloat16"
        with torch.autocast(run.device.type, torch.bfloat16):
            features = [part.clone() for part in model.constant_features(images)]
        parameter = 0.1 if recipe.rule == "hardest" else 3.0
        for label, cached in (("computed", None), ("cached", features)):

            def step(cached=cached, model=model, optimisers=optimisers, images=images, recipe=recipe, p=parameter):
                model.train()
                return train_step(model, optimisers, images, p, recipe, frozen_features=cached)

            run.measure(group, f"training step, features {label}", step, images=len(images), seconds=1.0, most=10)
        model.eval()
        with torch.no_grad(), torch.autocast(run.device.type, torch.bfloat16):
            run.measure(group, "distances", partial(model.distances, images), images=len(images), most=10)


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
