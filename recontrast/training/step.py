"""One training step of the reference, and the model that it trains."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recontrast.loss import pairs_loss
from recontrast.mining import deviation
from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe


def train_step(
    model: nn.Module,
    active: Sequence[Optimizer],
    images: Tensor,
    alpha: float | Tensor,
    recipe: Recipe,
    shares: Sequence[int] | None = None,
    frozen_features: Sequence[Tensor] | None = None,
) -> Tensor:
    """Make one training step.

    Args:
        model: `ReContrast` in training mode, possibly compiled or wrapped in DistributedDataParallel.
        active: Optimisers that update their parameters in this step.
        images: Normalised images, (N, 3, H, W), in the dtype of the weights.
        alpha: Threshold of hard points, in standard deviations above the mean.
        recipe: Recipe that sets the precision and the loss.
        shares: Number of images in each process; None for a single process.
        frozen_features: Cached features of the frozen encoder for these images, (N, C, h, w) of each level. None
            computes them.

    Returns:
        The loss before the update, a scalar on the device, float32 (float64 for float64 weights). With several
        processes, the part of this process.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        pairs = model(images, frozen_features=frozen_features)
    rule = deviation(alpha, recipe.factor) if recipe.mining else None
    groups = 2 if recipe.pairs == "cross" else 1
    loss = pairs_loss(pairs, rule, form=recipe.loss, groups=groups, stop_gradient=recipe.stop_gradient, shares=shares)
    model.zero_grad(set_to_none=True)  # also of parameters whose optimiser is not active
    loss.backward()
    for optimiser in active:
        optimiser.step()
    return loss.detach()


def build_model(recipe: Recipe, category: str) -> ReContrast:
    """Build the model of a recipe.

    Args:
        recipe: Recipe that sets the backbone, the weights and the model's options.
        category: Category, for `Recipe.encoder_bn_for`.

    Returns:
        An untrained model on the CPU, in training mode.

    Raises:
        ValueError: If `ReContrast` rejects an argument.
        OSError: If the weights cannot be read.
    """
    return ReContrast(
        recipe.backbone,
        weights=recipe.weights,
        encoder_bn=recipe.encoder_bn_for(category),
        activation=recipe.activation,
        partial_norm=recipe.partial_norm,
        pairs=recipe.pairs,
        train_encoder=recipe.train_encoder,
    )
