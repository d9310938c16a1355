"""One training step."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recontrast.architectures import build_model, get_architecture
from recontrast.recipes.recipe import Recipe

__all__ = ["build_model", "train_step"]


def train_step(
    model: nn.Module,
    active: Sequence[Optimizer],
    images: Tensor,
    parameter: float | Tensor,
    recipe: Recipe,
    shares: Sequence[int] | None = None,
    frozen_features: Sequence[Tensor] | None = None,
    inside: Tensor | None = None,
) -> Tensor:
    """Make one training step.

    Args:
        model: Network of the recipe in training mode, possibly compiled or wrapped in DistributedDataParallel.
        active: Optimisers that update their parameters in this step.
        images: Normalised images, (N, 3, H, W), in the dtype of the weights.
        parameter: Parameter of the mining rule, see `recontrast.architectures.compute_rule_parameter`. For the paper's
            rule: threshold of hard points, in standard deviations above the mean.
        recipe: Recipe that sets the precision, the loss and the largest norm of the gradient.
        shares: Number of images in each process; None for a single process.
        frozen_features: Cached features of the frozen encoder for these images, (N, C, h, w) of each level. None
            computes them.
        inside: Whether each pixel is in the region of interest, (N, H, W), or (1, H, W) for all images, bool, of any
            size. Ignored by an architecture that does not mask its loss. None: the whole image.

    Returns:
        The loss before the update, a scalar on the device, float32 (float64 for float64 weights). With several
        processes, the part of this process.

    Raises:
        ValueError: If the architecture is not trained by steps.
    """
    architecture = get_architecture(recipe)
    compute_loss = architecture.compute_loss
    if compute_loss is None:
        raise ValueError(f"train_step: wanted an architecture that is trained by steps, got {recipe.architecture!r}")
    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        outputs = model(images, frozen_features=frozen_features)
    options = {} if inside is None or not architecture.masks_loss else {"inside": inside}
    loss = compute_loss(outputs, recipe, parameter, shares, **options)
    model.zero_grad(set_to_none=True)  # also of parameters whose optimiser is not active
    loss.backward()
    if recipe.clip is not None:
        weights = [p for optimiser in active for group in optimiser.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(weights, recipe.clip)
    for optimiser in active:
        optimiser.step()
    return loss.detach()
