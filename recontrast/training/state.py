"""A run between two steps: what a checkpoint holds of it, and going on from one."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from recontrast import checkpoint
from recontrast.checkpoint import Checkpoint
from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe, list_differences, to_pair
from recontrast.runtime import distributed
from recontrast.runtime.distributed import World
from recontrast.training.sampler import BatchSampler

FREE_ON_RESUME = ("log_every", "checkpoint_every")  # recipe fields that do not change what is computed


@dataclass
class TrainingState:
    """A run between two steps: all that changes in training, and what a checkpoint says beside it."""

    recipe: Recipe
    category: str
    device: torch.device
    model: ReContrast
    optimisers: list[AdamW]
    batches: BatchSampler
    images: dict[str, Any]  # of training, as `batches.described` says
    place: World = field(default_factory=World)  # among the processes that torchrun started
    done: int = 0  # steps
    pending: list[Tensor] = field(default_factory=list)  # losses that are still on the device
    losses: list[float] = field(default_factory=list)  # losses read, of this process


def read_losses(run: TrainingState) -> None:
    """Bring the pending losses from the device; one that is no number ends training."""
    values = distributed.mean_loss(run.place, torch.stack(run.pending)).tolist() if run.pending else []
    run.pending.clear()
    for number, value in enumerate(values, run.done - len(values) + 1):
        if not math.isfinite(value):
            raise ValueError(f"train: the loss of {run.category} is {value} at step {number}: {_advice(run.recipe)}")
    run.losses.extend(values)


def snapshot(run: TrainingState) -> Checkpoint:
    """The run as a checkpoint; refused where losses or weights are not finite."""
    read_losses(run)
    weights = run.model.state_dict()
    finite = torch.stack([value.isfinite().all() for value in weights.values()]).tolist()
    if not all(finite):
        name = list(weights)[finite.index(False)]
        raise ValueError(f"train: {name} of {run.category} is not finite at step {run.done}: {_advice(run.recipe)}")
    size, crop = run.recipe.size, run.recipe.crop
    return Checkpoint(
        step=run.done,
        category=run.category,
        recipe=run.recipe,
        model_config=run.model.config,
        preprocessing={
            "size": None if run.recipe.tile is not None else list(to_pair(size)),  # none: at their own scale, in tiles
            "tile": run.recipe.tile,
            "crop": None if crop is None else list(to_pair(crop)),
            "mean": list(run.model.mean),
            "std": list(run.model.std),
        },
        images=run.images,
        model=weights,
        optimisers=[optimiser.state_dict() for optimiser in run.optimisers],
        rng={
            "batches": run.batches.state(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None,
        },
    )


def restore(run: TrainingState, found: Checkpoint, path: str) -> None:
    """Put ``run`` where ``found``, read from ``path``, was taken."""
    if not found.rng:
        raise ValueError(f"{path}: wanted the checkpoint of a run, got a detector alone, from which no step can follow")
    if any(found.images[name] != run.images[name] for name in ("count", "digest")):
        wanted, got = found.images["count"], run.images["count"]
        raise ValueError(
            f"{path}: images: wanted the {wanted} training images that the run was begun with, got "
            + (f"{got}" if wanted != got else "as many with other pixels or in another order")
        )
    checkpoint.restore(run.model, found, path)
    for optimiser, state in zip(run.optimisers, found.optimisers, strict=True):
        optimiser.load_state_dict(state)
    run.batches.restore(found.rng["batches"])
    torch.set_rng_state(found.rng["torch"])
    if run.device.type == "cuda" and found.rng["cuda"] is not None:
        torch.cuda.set_rng_state(found.rng["cuda"], run.device)
    run.done = found.step


def check_resume(found: Checkpoint, path: str, recipe: Recipe, category: str) -> None:
    """Refuse to go on from ``found``, read from ``path``, with another recipe or category."""
    if found.category != category:
        raise ValueError(
            f"{path}: category: wanted the {found.category!r} that the run was begun with, got {category!r}"
        )
    if differ := list_differences(found.recipe, recipe, ignore=FREE_ON_RESUME):
        raise ValueError(f"{path}: wanted the recipe that the run was begun with, got another ({'; '.join(differ)})")


def _advice(recipe: Recipe) -> str:
    text = f"lower decoder_lr ({recipe.decoder_lr:g}) and encoder_lr ({recipe.encoder_lr:g})"
    return text if recipe.precision == "float32" else text + ", or set precision to float32"
