"""State of a training run between two steps: written to a checkpoint, and restored from one."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from recontrast import checkpoint
from recontrast.checkpoint import Checkpoint
from recontrast.models.network import Network
from recontrast.recipes.recipe import Recipe, list_differences, to_pair
from recontrast.runtime import distributed
from recontrast.runtime.device import get_random_states, set_random_states
from recontrast.runtime.distributed import World
from recontrast.training.sampler import BatchSampler

FREE_ON_RESUME = ("log_every", "checkpoint_every")  # recipe fields that may change: they do not affect the weights


@dataclass
class TrainingState:
    """State of a training run between two steps.

    Attributes:
        recipe: Recipe of the run.
        category: Category of the run.
        device: Device of the model.
        model: Model in training.
        optimisers: Optimisers of the model, see `build_optimisers`.
        sampler: Order of the training images.
        images: Count and digest of the training images, see `describe_images`.
        world: Rank of this process and number of processes.
        step: Number of completed steps.
        pending_losses: Losses that are still on the device.
        losses: Losses already read from the device, of the steps made in this process.
    """

    recipe: Recipe
    category: str
    device: torch.device
    model: Network
    optimisers: list[Optimizer]
    sampler: BatchSampler
    images: dict[str, Any]
    world: World = field(default_factory=World)
    step: int = 0
    pending_losses: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def read_losses(state: TrainingState) -> None:
    """Move the pending losses from the device to ``state.losses``.

    Args:
        state: State of the run; all processes must call this at the same step.

    Raises:
        ValueError: If a loss is not finite.
    """
    pending = state.pending_losses
    values = distributed.mean_loss(state.world, torch.stack(pending)).tolist() if pending else []
    pending.clear()
    for number, value in enumerate(values, state.step - len(values) + 1):
        if not math.isfinite(value):
            advice = _advise_on_divergence(state.recipe)
            raise ValueError(f"train: the loss of {state.category} is {value} at step {number}: {advice}")
    state.losses.extend(values)


def snapshot(state: TrainingState) -> Checkpoint:
    """Return the state as a checkpoint.

    Args:
        state: State of the run.

    Returns:
        The checkpoint; its tensors share memory with the state.

    Raises:
        ValueError: If a loss or a weight is not finite.
    """
    read_losses(state)
    weights = state.model.state_dict()
    is_finite = torch.stack([value.isfinite().all() for value in weights.values()]).tolist()
    if not all(is_finite):
        name = list(weights)[is_finite.index(False)]
        advice = _advise_on_divergence(state.recipe)
        raise ValueError(f"train: {name} of {state.category} is not finite at step {state.step}: {advice}")
    size, crop = state.recipe.size, state.recipe.crop
    return Checkpoint(
        step=state.step,
        category=state.category,
        recipe=state.recipe,
        model_config=state.model.config,
        preprocessing={
            "size": None if state.recipe.tile is not None else list(to_pair(size)),  # None: tiles at full scale
            "tile": state.recipe.tile,
            "crop": None if crop is None else list(to_pair(crop)),
            "mean": list(state.model.mean),
            "std": list(state.model.std),
        },
        images=state.images,
        model=weights,
        optimisers=[optimiser.state_dict() for optimiser in state.optimisers],
        rng={
            "batches": state.sampler.state(),
            **get_random_states(state.device),
        },
    )


def restore(state: TrainingState, saved: Checkpoint, path: str) -> None:
    """Restore ``state`` from a checkpoint.

    Args:
        state: State of a run that was set up with the same recipe.
        saved: Content of the checkpoint.
        path: Path of the checkpoint, for errors.

    Raises:
        ValueError: If the checkpoint holds no training state, other training images or weights that do not fit.
    """
    if not saved.rng:
        raise ValueError(f"{path}: wanted the checkpoint of a run, got a detector alone, which has no training state")
    if any(saved.images.get(name) != state.images[name] for name in ("count", "digest")):
        wanted, got = saved.images.get("count", "new and former"), state.images["count"]
        raise ValueError(
            f"{path}: images: wanted the {wanted} training images that the run was started with, got "
            + (f"{got}" if wanted != got else "as many with other pixels or in another order")
        )
    checkpoint.restore(state.model, saved, path)
    restore_optimisers(state, saved, path)
    with _describe_misfit(path):
        state.sampler.restore(saved.rng["batches"])
        set_random_states(saved.rng, state.device)
    state.step = saved.step


def restore_optimisers(state: TrainingState, saved: Checkpoint, path: str) -> None:
    """Restore the optimisers of ``state`` from a checkpoint.

    Args:
        state: State of a run with the same network and recipe.
        saved: Content of the checkpoint.
        path: Path of the checkpoint, for errors.

    Raises:
        ValueError: If they do not fit.
    """
    with _describe_misfit(path):
        for optimiser, values in zip(state.optimisers, saved.optimisers, strict=True):
            names = [set(group) for group in optimiser.param_groups]
            optimiser.load_state_dict(values)
            if [set(group) & names[0] for group in optimiser.param_groups] != names:
                raise ValueError("an optimiser lacks settings")


@contextmanager
def _describe_misfit(path: str) -> Iterator[None]:
    """Convert errors of a training state that does not fit to one sentence with the path of the checkpoint."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{path}: wanted the training state of this run, got one that does not fit: {reason}"
        ) from error


def check_resume(saved: Checkpoint, path: str, recipe: Recipe, category: str) -> None:
    """Check that a run can resume from a checkpoint.

    Args:
        saved: Content of the checkpoint.
        path: Path of the checkpoint, for errors.
        recipe: Recipe of the run.
        category: Category of the run.

    Raises:
        ValueError: If the category, or a recipe field that affects the weights, differs.
    """
    if saved.category != category:
        raise ValueError(
            f"{path}: category: wanted the {saved.category!r} that the run was started with, got {category!r}"
        )
    if changes := list_differences(saved.recipe, recipe, ignore=FREE_ON_RESUME):
        raise ValueError(f"{path}: wanted the recipe that the run was started with, got another ({'; '.join(changes)})")


def _advise_on_divergence(recipe: Recipe) -> str:
    """Return what to change in a recipe whose training diverged."""
    text = f"lower decoder_lr ({recipe.decoder_lr:g}) and encoder_lr ({recipe.encoder_lr:g})"
    return text if recipe.precision == "float32" else text + ", or set precision to float32"
