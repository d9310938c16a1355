"""Optimisers of a training run and their schedule, which depends on the step alone, so that a run can resume."""

import math

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from recontrast.models.network import Network
from recontrast.recipes.recipe import Recipe
from recontrast.training.stable_adamw import StableAdamW


def build_optimisers(model: Network, recipe: Recipe, device: torch.device) -> list[Optimizer]:
    """Build one optimiser for the decoder and all other new weights and, if the encoder is trained, one for it.

    Args:
        model: Model, already on ``device``.
        recipe: Recipe that sets ``optimiser``, its options and the learning rates.
        device: Device of the model.

    Returns:
        One or two optimisers, the decoder's first.
    """
    groups = ((model.decoder_parameters(), recipe.decoder_lr), (model.encoder_parameters(), recipe.encoder_lr))
    fused = device.type in ("cpu", "cuda")  # one kernel updates all parameters
    options = (recipe.betas, recipe.eps, recipe.weight_decay, recipe.amsgrad)
    optimisers: list[Optimizer] = []
    for parameters, lr in groups:
        trained = list(parameters)
        if not trained:
            continue
        if recipe.optimiser == "sgd":
            decay, momentum = recipe.weight_decay, recipe.betas[0]
            optimisers.append(SGD(trained, lr, momentum, weight_decay=decay, fused=fused))
        elif recipe.optimiser == "stableadamw":
            optimisers.append(StableAdamW(trained, lr, *options))
        else:
            kind = AdamW if recipe.optimiser == "adamw" else Adam
            optimisers.append(kind(trained, lr, *options, fused=fused))
    return optimisers


def schedule_optimisers(optimisers: list[Optimizer], recipe: Recipe, step: int) -> list[Optimizer]:
    """Set the learning rates of a step and select the optimisers that are active in it.

    With the schedule "drop", the learning rates drop once (`MultiStepLR` in the reference's unified scripts). The
    decoder's moments and step count are reset at intervals, after which the encoder pauses for some steps (`train` in
    the reference's stable scripts; appendix E of the paper names stale moments of rarely active channels as the cause
    of loss spikes).

    Args:
        optimisers: Result of `build_optimisers`.
        recipe: Recipe that sets the schedule, ``wipe_every`` and ``rest``.
        step: Number of completed steps.

    Returns:
        The optimisers that update their parameters in this step.
    """
    scale = compute_lr_factor(recipe, step)
    for optimiser, lr in zip(optimisers, (recipe.decoder_lr, recipe.encoder_lr), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = lr * scale
    if recipe.wipe_every is None or step < recipe.wipe_every:
        return optimisers
    steps_since_reset = step % recipe.wipe_every
    if steps_since_reset == 0:
        optimisers[0].state.clear()
    return optimisers[:1] if steps_since_reset < recipe.rest else optimisers


def compute_lr_factor(recipe: Recipe, step: int) -> float:
    """Compute the factor of a step on all learning rates.

    Args:
        recipe: Recipe that sets ``schedule``, ``warmup``, ``lr_drop``, ``lr_drop_at`` and ``lr_end``.
        step: Number of completed steps.

    Returns:
        The factor. "cosine" and "linear" reach ``lr_end`` after the last step. The warm-up of "cosine_from_zero"
        starts with a step of rate zero and ends with one of the full rate, as `WarmCosineScheduler` of Dinomaly's code.
    """
    warmup = int(recipe.steps * recipe.warmup)
    if step < warmup:
        if recipe.schedule == "cosine_from_zero":
            return step / max(warmup - 1, 1)
        return (step + 1) / (warmup + 1)
    if recipe.schedule == "drop":
        return recipe.lr_drop if step >= int(recipe.steps * recipe.lr_drop_at) else 1.0
    share = (step - warmup) / max(recipe.steps - warmup, 1)
    remaining = (1 + math.cos(math.pi * share)) / 2 if recipe.schedule != "linear" else 1 - share
    return recipe.lr_end + (1 - recipe.lr_end) * remaining
