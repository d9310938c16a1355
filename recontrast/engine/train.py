"""Training: the loop of the reference's `recontrast_mvtec.py` (`train`), any step count, resumable, no host waits.

There is no augmentation: an image is decoded once and always enters as the same tensor. The loss stays on the device
and is read only when a line is logged or a checkpoint written.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW

from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample
from recontrast.data.images import normalise
from recontrast.engine import checkpoint, interrupt
from recontrast.engine.batches import Batches, digest
from recontrast.engine.checkpoint import Checkpoint
from recontrast.engine.device import choose, put
from recontrast.engine.graph import Replay
from recontrast.engine.log import Log
from recontrast.engine.pixels import Pixels
from recontrast.engine.recipes import Recipe, differences, pair
from recontrast.loss import alpha_at, deviation, pairs_loss
from recontrast.model import ReContrast

FREE_ON_RESUME = ("log_every", "checkpoint_every")  # recipe fields that do not change what is computed

OnLog = Callable[[int, float, float, float], None]  # step, loss, images per second, alpha


@dataclass(frozen=True)
class TrainResult:
    """What `train` leaves."""

    model: ReContrast  # in eval mode
    recipe: Recipe
    category: str
    checkpoint: Path | None
    losses: list[float]  # one for each step made in this call
    seconds: float  # of those steps; decoding and checkpoints left out


@dataclass
class Run:
    """A run between two steps: all that changes in training, and what a checkpoint says beside it."""

    recipe: Recipe
    category: str
    device: torch.device
    model: ReContrast
    optimisers: list[AdamW]
    batches: Batches
    images: dict[str, Any]  # count and digest of the training images
    done: int = 0  # steps
    pending: list[Tensor] = field(default_factory=list)  # losses that are still on the device
    losses: list[float] = field(default_factory=list)  # losses read, of this process


def train(
    recipe: Recipe,
    samples: Sequence[Sample],
    *,
    category: str | None = None,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    resume: str | Path | None = None,
    on_log: OnLog | None = None,
    cache_dir: str | Path | None = None,
    model: ReContrast | None = None,
) -> TrainResult:
    """Train a detector on the good training images among ``samples``.

    Args:
        recipe: what to do.
        samples: of one category, or of several for one unified detector; those of the test split are passed over.
        category: the name that decides `Recipe.encoder_bn_for` and goes into the checkpoint; by default the
            categories of the samples joined by "+".
        out: folder for ``checkpoint.pt`` and ``log.jsonl``; None writes nothing.
        device: by default the GPU where there is one.
        resume: checkpoint to go on from; recipe and images must be those it was begun with.
        on_log: called with step, mean loss since the last call, images per second and alpha, every
            ``recipe.log_every`` steps and after the last.
        cache_dir: folder for decoded images; None keeps them in memory.
        model: trained in place, instead of a new one.

    Returns:
        The trained model in eval mode, the losses, and where the checkpoint is.

    Raises:
        ValueError: there is nothing to train on, the loss is no number any more, or a checkpoint does not fit.
        KeyboardInterrupt: Ctrl-C, after the running step is complete and a checkpoint written.
    """
    used = [sample for sample in samples if sample.split == "train" and sample.label == 0]
    if not used:
        raise ValueError(f"train: samples: wanted good training images, got none among {len(samples)} samples")
    if recipe.drop_last and len(used) < recipe.batch:
        raise ValueError(f"train: batch: wanted at most the {len(used)} training images, got {recipe.batch}")
    category = category or "+".join(dict.fromkeys(sample.category for sample in used))
    device = choose(device)
    found = checkpoint.load(resume) if resume is not None else None
    if found is not None:
        _check_resumed(found, f"{resume}", recipe, category)

    torch.manual_seed(recipe.seed)
    if model is None:
        model = new_model(recipe, category) if found is None else checkpoint.build(found, f"{resume}")
    model.map_sizes(recipe.out)  # refuses a size that its strides do not divide
    last = put(model, recipe, device) == torch.channels_last
    model.train()
    dtype = next(model.parameters()).dtype
    images = ImageCache(used, recipe.size, recipe.crop, directory=cache_dir)
    batches = Batches(len(used), recipe.batch, drop_last=recipe.drop_last, seed=recipe.seed)
    about = {"count": len(used), "digest": digest(images)}
    run = Run(recipe, category, device, model, optimisers(model, recipe, device), batches, about)
    if found is not None:
        restore(run, found, f"{resume}")

    target = Path(out) / "checkpoint.pt" if out is not None else None
    log = Log(Path(out) / "log.jsonl", keep=run.done) if out is not None else None
    saved = run.done  # the step of the last checkpoint

    def save() -> None:
        nonlocal saved
        state = snapshot(run)
        if target is not None and saved < run.done:
            checkpoint.save(target, state)
            saved = run.done

    pixels = Pixels(images, device)

    def one_step(moving: Sequence[Any], batch: Tensor, alpha: float | Tensor) -> Tensor:
        return step(model, moving, batch, alpha, recipe)

    if recipe.graph and device.type == "cuda":
        one_step = Replay(one_step, batches.batch, device)  # type: ignore[assignment]
    busy, since = 0.0, time.perf_counter()
    seen, logged = 0, 0  # images, and losses read, since and up to the last line
    between = True  # two steps, and so in a state that may be saved
    with interrupt.held_back() as asked:
        try:
            while run.done < recipe.steps:
                between = False
                index = next(batches)
                batch = normalise(pixels[index], model.mean, model.std, dtype=dtype, channels_last=last)
                alpha = alpha_at(run.done, recipe.steps, recipe.ramp, recipe.alpha_start, recipe.alpha_end)
                run.pending.append(one_step(run.optimisers, batch, alpha))
                run.done, seen, between = run.done + 1, seen + len(index), True
                if run.done % recipe.log_every == 0 or run.done == recipe.steps:
                    read(run)
                    elapsed = time.perf_counter() - since
                    loss, rate = math.fsum(run.losses[logged:]) / (len(run.losses) - logged), seen / elapsed
                    busy, seen, logged = busy + elapsed, 0, len(run.losses)
                    if log is not None:
                        log.write(step=run.done, loss=loss, alpha=alpha, images_per_second=rate, seconds=busy)
                    if on_log is not None:
                        on_log(run.done, loss, rate, alpha)
                    since = time.perf_counter()
                if asked():
                    raise KeyboardInterrupt
                if run.done % recipe.checkpoint_every == 0 or run.done == recipe.steps:
                    begun = time.perf_counter()
                    save()
                    since += time.perf_counter() - begun
        except KeyboardInterrupt:
            if between:
                save()
            raise
    return TrainResult(model.eval(), recipe, category, target, run.losses, busy)


def step(model: ReContrast, both: Sequence[AdamW], images: Tensor, alpha: float | Tensor, recipe: Recipe) -> Tensor:
    """One step of training.

    Args:
        model: in training mode.
        both: as `optimisers` makes them.
        images: (N, 3, H, W), normalised.
        alpha: standard deviations above the mean from which on a point is hard.
        recipe: for precision and factor.

    Returns:
        The loss of before the step, a scalar on the device.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        pairs = model(images)
    loss = pairs_loss(pairs, deviation(alpha, recipe.factor))
    for optimiser in both:
        optimiser.zero_grad(set_to_none=True)
    loss.backward()
    for optimiser in both:
        optimiser.step()
    return loss.detach()


def new_model(recipe: Recipe, category: str) -> ReContrast:
    """The model that ``recipe`` asks for, on the CPU."""
    return ReContrast(
        recipe.backbone,
        weights=recipe.weights,
        encoder_bn=recipe.encoder_bn_for(category),
        activation=recipe.activation,
        partial_norm=recipe.partial_norm,
    )


def optimisers(model: ReContrast, recipe: Recipe, device: torch.device) -> list[AdamW]:
    """AdamW of bottleneck and decoder, AdamW of the trained encoder."""
    groups = ((model.decoder_parameters(), recipe.decoder_lr), (model.encoder_parameters(), recipe.encoder_lr))
    fused = device.type in ("cpu", "cuda")  # one kernel for all parameters
    return [
        AdamW(list(p), lr=lr, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay, fused=fused)
        for p, lr in groups
    ]


# ---- reading the loss, saving, going on --------------------------------------


def read(run: Run) -> None:
    """Bring the pending losses from the device; one that is no number ends training."""
    values = torch.stack(run.pending).tolist() if run.pending else []
    run.pending.clear()
    for number, value in enumerate(values, run.done - len(values) + 1):
        if not math.isfinite(value):
            raise ValueError(f"train: the loss of {run.category} is {value} at step {number}: {_advice(run.recipe)}")
    run.losses.extend(values)


def snapshot(run: Run) -> Checkpoint:
    """The run as a checkpoint; refused where losses or weights are not finite."""
    read(run)
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
            "size": list(pair(size)),
            "crop": None if crop is None else list(pair(crop)),
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


def restore(run: Run, found: Checkpoint, path: str) -> None:
    """Put ``run`` where ``found``, read from ``path``, was taken."""
    if found.images != run.images:
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


def _check_resumed(found: Checkpoint, path: str, recipe: Recipe, category: str) -> None:
    if found.category != category:
        raise ValueError(
            f"{path}: category: wanted the {found.category!r} that the run was begun with, got {category!r}"
        )
    if differ := differences(found.recipe, recipe, ignore=FREE_ON_RESUME):
        raise ValueError(f"{path}: wanted the recipe that the run was begun with, got another ({'; '.join(differ)})")


def _advice(recipe: Recipe) -> str:
    text = f"lower decoder_lr ({recipe.decoder_lr:g}) and encoder_lr ({recipe.encoder_lr:g})"
    return text if recipe.precision == "float32" else text + ", or set precision to float32"
