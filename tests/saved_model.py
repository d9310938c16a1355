"""Checkpoints of an untrained model, and images for it."""

import numpy as np
import torch
from PIL import Image

from recontrast import checkpoint as checkpoints
from recontrast.recipes.recipe import Recipe
from recontrast.training.train import build_model

RECIPE = Recipe(backbone="test_resnet", weights="random", size=64, encoder_bn="eval")


def save(path, recipe):
    """Save a checkpoint of an untrained model."""
    torch.manual_seed(0)
    model = build_model(recipe, "tile")
    preprocessing = {"size": list(recipe.out), "crop": None, "mean": list(model.mean), "std": list(model.std)}
    state = model.state_dict()
    return checkpoints.save(
        path, checkpoints.Checkpoint(1, "tile", recipe, model.config, preprocessing, {"count": 1, "digest": ""}, state)
    )


def draw(folder, count, *, seed, spread=12.0):
    """Write ``count`` images of stripes with noise of the standard deviation ``spread``."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    stripes = 110 + 60 * np.sin(np.arange(64) / 3)[:, None, None]
    for i in range(count):
        pixels = stripes + random.normal(0, spread, (64, 64, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:03}.png")
    return folder
