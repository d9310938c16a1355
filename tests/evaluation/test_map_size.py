"""Masks have the size of the maps if the recipe sets one."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from recontrast.data.datasets import Sample
from recontrast.evaluation.ground_truth import read_ground_truth
from recontrast.recipes.recipe import Recipe


@pytest.mark.parametrize("size", [24, (40, 17), 64])
@pytest.mark.parametrize("rule", ["any", "half"])
def test_masks_are_resized_by_nearest_neighbour(size, rule, tmp_path):
    generator = np.random.default_rng(3)
    mask = (generator.random((70, 90)) > 0.7).astype(np.uint8) * 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(mask).convert("RGB").save(tmp_path / "image.png")
    sample = Sample(tmp_path / "image.png", tmp_path / "mask.png", 1, "nut", "test", "bad")
    recipe = Recipe(size=56, crop=48, mask_rule=rule)
    large = torch.from_numpy(read_ground_truth(sample, recipe)).float()[None, None]
    expected = F.interpolate(large, size=size, mode="nearest")[0, 0].numpy() > 0
    resized = recipe.replace(map_size=size)
    np.testing.assert_array_equal(read_ground_truth(sample, resized), expected)
    assert expected.shape == resized.map_out and 0 < expected.mean() < 1
