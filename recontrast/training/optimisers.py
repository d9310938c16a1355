"""The optimisers of a run, and what happens to them on the way.

It depends on the step alone: a resumed run needs to know nothing else.
"""

import torch
from torch.optim import AdamW

from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe


def build_optimisers(model: ReContrast, recipe: Recipe, device: torch.device) -> list[AdamW]:
    """AdamW of bottleneck and decoder and, where it is trained, AdamW of the encoder."""
    groups = ((model.decoder_parameters(), recipe.decoder_lr), (model.encoder_parameters(), recipe.encoder_lr))
    fused = device.type in ("cpu", "cuda")  # one kernel for all parameters
    settings = (recipe.betas, recipe.eps, recipe.weight_decay, recipe.amsgrad)
    return [AdamW(some, lr, *settings, fused=fused) for parameters, lr in groups if (some := list(parameters))]


def schedule(both: list[AdamW], recipe: Recipe, done: int) -> list[AdamW]:
    """Make the optimisers ready for a step.

    The learning rates fall once (`MultiStepLR` of upstream's unified scripts); the decoder's moments and step count are
    wiped at intervals, after which the encoder rests (`train` of its stable scripts: stale moments of rare
    channels are named as the cause of loss spikes, appendix E).

    Args:
        both: as `build_optimisers` makes them.
        recipe: for ``lr_drop``, ``lr_drop_at``, ``wipe_every`` and ``rest``.
        done: steps before this one.

    Returns:
        Those that take part in the step.
    """
    scale = recipe.lr_drop if done >= int(recipe.steps * recipe.lr_drop_at) else 1.0
    for optimiser, lr in zip(both, (recipe.decoder_lr, recipe.encoder_lr), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = lr * scale
    if recipe.wipe_every is None or done < recipe.wipe_every:
        return both
    since = done % recipe.wipe_every
    if since == 0:
        both[0].state.clear()
    return both[:1] if since < recipe.rest else both
