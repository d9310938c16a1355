"""Optimisers of a training run and their schedule, which depends on the step alone, so that a run can resume."""

import torch
from torch.optim import AdamW

from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe


def build_optimisers(model: ReContrast, recipe: Recipe, device: torch.device) -> list[AdamW]:
    """Build one AdamW for bottleneck and decoder and, if the encoder is trained, one for the encoder.

    Args:
        model: Model, already on ``device``.
        recipe: Recipe that sets learning rates and AdamW's options.
        device: Device of the model.

    Returns:
        One or two optimisers, the decoder's first.
    """
    groups = ((model.decoder_parameters(), recipe.decoder_lr), (model.encoder_parameters(), recipe.encoder_lr))
    fused = device.type in ("cpu", "cuda")  # one kernel updates all parameters
    options = (recipe.betas, recipe.eps, recipe.weight_decay, recipe.amsgrad)
    optimisers = []
    for parameters, lr in groups:
        trained = list(parameters)
        if trained:
            optimisers.append(AdamW(trained, lr, *options, fused=fused))
    return optimisers


def schedule_optimisers(optimisers: list[AdamW], recipe: Recipe, step: int) -> list[AdamW]:
    """Set the learning rates of a step and select the optimisers that are active in it.

    The learning rates drop once (`MultiStepLR` in the reference's unified scripts). The decoder's moments and step
    count are reset at intervals, after which the encoder pauses for some steps (`train` in the reference's stable
    scripts; appendix E of the paper names stale moments of rarely active channels as the cause of loss spikes).

    Args:
        optimisers: Result of `build_optimisers`.
        recipe: Recipe that sets ``lr_drop``, ``lr_drop_at``, ``wipe_every`` and ``rest``.
        step: Number of completed steps.

    Returns:
        The optimisers that update their parameters in this step.
    """
    scale = recipe.lr_drop if step >= int(recipe.steps * recipe.lr_drop_at) else 1.0
    for optimiser, lr in zip(optimisers, (recipe.decoder_lr, recipe.encoder_lr), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = lr * scale
    if recipe.wipe_every is None or step < recipe.wipe_every:
        return optimisers
    steps_since_reset = step % recipe.wipe_every
    if steps_since_reset == 0:
        optimisers[0].state.clear()
    return optimisers[:1] if steps_since_reset < recipe.rest else optimisers
