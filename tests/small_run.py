"""A training run of a few steps on tiny images."""

import json

import torch

from recontrast.recipes.recipe import Recipe

RECIPE = Recipe(
    backbone="test_resnet", weights="random", steps=6, batch=4, size=32, seed=1, log_every=2, checkpoint_every=3
)


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
