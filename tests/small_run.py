"""Recipe of a short training run on tiny images, and comparisons of its results."""

import json

import torch

from recontrast.recipes.recipe import Recipe

RECIPE = Recipe(
    backbone="test_resnet", weights="random", steps=6, batch=4, size=32, seed=1, log_every=2, checkpoint_every=3
)


def same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
