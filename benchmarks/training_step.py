"""Network and optimisers of a training step as `recontrast.training` prepares them, for the benchmarks of steps."""

from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from recontrast import ReContrast
from recontrast.models.norm_act import fuse_norm_act
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import move_model
from recontrast.training.optimisers import build_optimisers
from recontrast.training.teacher_cache import TeacherCache

CACHE = 2**34  # bytes for the features of all images


class PreparedStep(NamedTuple):
    """What a training step needs besides images.

    Attributes:
        network: Model on the device, in train mode, with fused norms and compiled as the recipe says.
        optimisers: Optimisers of its weights.
        layout: Memory format of images (N, 3, H, W).
        teacher: Cache of the frozen encoder's features, or None.
    """

    network: Any
    optimisers: list[Optimizer]
    layout: torch.memory_format
    teacher: TeacherCache | None


def prepare_step(model: ReContrast, recipe: Recipe, device: torch.device, cached: int = 0) -> PreparedStep:
    """Prepare a model for training steps.

    Args:
        model: Model, changed in place.
        recipe: Recipe of the steps.
        device: Device of the steps.
        cached: Number of images whose frozen features are cached; 0 caches none.

    Returns:
        Network, optimisers, memory format and cache.
    """
    layout = move_model(model, device, recipe.channels_last)
    optimisers = build_optimisers(model.train(), recipe, device)
    if recipe.fused_norm:
        fuse_norm_act(model)
    network = torch.compile(model, dynamic=False) if recipe.compile else model
    autocast = recipe.precision == "bfloat16"
    teacher = TeacherCache(model.frozen, cached, CACHE, autocast=autocast) if cached else None
    return PreparedStep(network, optimisers, layout, teacher)
