"""Training: the loop of the reference's `recontrast_mvtec.py` (`train`), any step count, resumable, no host waits.

There is no augmentation: an image is decoded once and always enters as the same tensor. The loss stays on the device
and is read only when a line is logged or a checkpoint written.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from recontrast import checkpoint
from recontrast.calibration.conformal import Calibration
from recontrast.checkpoint import Checkpoint
from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample
from recontrast.data.fingerprint import describe_images
from recontrast.data.images import normalise
from recontrast.data.sources import Images
from recontrast.inference.options import InferenceOptions
from recontrast.loss import pairs_loss
from recontrast.mining import alpha_at, deviation
from recontrast.models.recontrast import ReContrast
from recontrast.recipes import yaml_file
from recontrast.recipes.recipe import Recipe
from recontrast.runtime import distributed
from recontrast.runtime.device import convolution_precision, move_model
from recontrast.runtime.distributed import World
from recontrast.training import interrupts
from recontrast.training.cuda_graph import GraphedStep
from recontrast.training.device_images import DeviceImages
from recontrast.training.holdout import calibrate_holdout, split_holdout
from recontrast.training.json_log import JsonLog
from recontrast.training.optimisers import build_optimisers, schedule
from recontrast.training.sampler import BatchSampler
from recontrast.training.state import TrainingState, check_resume, read_losses, restore, snapshot
from recontrast.training.teacher_cache import TeacherCache

OnLog = Callable[[int, float, float, float], None]  # step, loss, images per second, alpha


@dataclass(frozen=True)
class TrainResult:
    """What `train` leaves.

    Attributes:
        model: in eval mode.
        recipe: that it was trained with.
        category: as it was given, or made of the samples'.
        checkpoint: the file; None where nothing is written.
        losses: one for each step made in this call.
        seconds: of those steps; decoding and checkpoints left out.
        state: as it would be written, without what only another step would need.
    """

    model: ReContrast
    recipe: Recipe
    category: str
    checkpoint: Path | None
    losses: list[float]
    seconds: float
    state: Checkpoint

    @property
    def calibration(self) -> Calibration | None:
        """The calibration where images were held out, in the first process; else None."""
        return InferenceOptions().valid_calibration(self.recipe, self.state.calibration)


def train(
    recipe: Recipe,
    samples: Sequence[Sample] | Images,
    *,
    category: str | None = None,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    resume: str | Path | None = None,
    on_log: OnLog | None = None,
    cache_dir: str | Path | None = None,
    model: ReContrast | None = None,
    teacher_cache: int = 0,
) -> TrainResult:
    """Train a detector on the good training images among ``samples``.

    Under torchrun all processes make one run together, that of one process with the whole batch: see
    `recontrast.runtime.distributed`. The first one writes.

    Where the recipe holds out a share of the good images, the detector is calibrated on them after the last step.

    Args:
        recipe: what to do.
        samples: of one category, or of several for one unified detector; those of the test split are passed over. Or
            good images decoded already, at ``recipe.out``: an array (n, H, W, 3) uint8, or whatever `infer` takes.
        category: the name that decides `Recipe.encoder_bn_for` and goes into the checkpoint; by default the
            categories of the samples joined by "+", of decoded images "images".
        out: folder for ``checkpoint.pt``, ``log.jsonl`` and ``recipe.yaml``; None writes nothing.
        device: by default the GPU where there is one.
        resume: checkpoint to go on from; recipe and images must be those it was begun with.
        on_log: called with step, mean loss since the last call, images per second and alpha, every
            ``recipe.log_every`` steps and after the last.
        cache_dir: folder for decoded images; None keeps them in memory.
        model: trained in place, instead of a new one.
        teacher_cache: bytes on the device for features of the frozen encoder, which never change; see `TeacherCache`.

    Returns:
        The trained model in eval mode, the losses, and where the checkpoint is.

    Raises:
        ValueError: there is nothing to train on, too little for the batch or the calibration, options that exclude each
            other, the loss is no number any more, or a checkpoint does not fit.
        OSError: a file cannot be read or written.
        KeyboardInterrupt: Ctrl-C, or SIGTERM to a process alone, after the running step is complete and a checkpoint
            written.
    """
    images: Images | None = None if isinstance(samples, Sequence) else samples
    used = _good(samples) if isinstance(samples, Sequence) else ()
    count = len(used) if images is None else len(images)
    if not count:
        raise ValueError(f"train: samples: wanted good training images, got none among {len(samples)} samples")
    category = category or "+".join(dict.fromkeys(sample.category for sample in used)) or "images"
    if images is not None and recipe.holdout:
        raise ValueError(f"train: holdout: wanted 0 for images that are decoded already, got {recipe.holdout:g}")
    used, kept = split_holdout(used, recipe.holdout, recipe.seed)
    count -= len(kept)
    if recipe.drop_last and count < recipe.batch:
        raise ValueError(f"train: batch: wanted at most the {count} training images, got {recipe.batch}")
    with distributed.join_processes(device) as (place, chosen), convolution_precision(recipe.tf32):
        for name in ("compile", "graph"):
            if getattr(recipe, name) and place.size > 1:
                raise ValueError(f"train: {name}: wanted false for the {place.size} processes of torchrun, got true")
        if recipe.graph and teacher_cache and chosen.type == "cuda":
            raise ValueError(f"train: teacher_cache: wanted 0 where steps are replayed as a graph, got {teacher_cache}")
        return _train(
            recipe, used, kept, images, category, out, place, chosen, resume, on_log, cache_dir, model, teacher_cache
        )


def _train(
    recipe: Recipe,
    used: Sequence[Sample],
    kept: Sequence[Sample],
    images: Images | None,
    category: str,
    out: str | Path | None,
    place: World,
    device: torch.device,
    resume: str | Path | None,
    on_log: OnLog | None,
    cache_dir: str | Path | None,
    model: ReContrast | None,
    teacher_cache: int,
) -> TrainResult:
    found = checkpoint.load(resume) if resume is not None else None
    if found is not None:
        check_resume(found, f"{resume}", recipe, category)

    torch.manual_seed(recipe.seed)
    if model is None:
        model = build_model(recipe, category) if found is None else checkpoint.build(found, f"{resume}")
    model.map_sizes(recipe.out)  # refuses a size that its strides do not divide
    last = move_model(model, device, recipe.channels_last) == torch.channels_last
    model.train()
    dtype = next(model.parameters()).dtype
    if images is None:
        images = ImageCache(used, recipe.size, recipe.crop, directory=cache_dir, tile=recipe.tile, stride=recipe.stride)
    batches = BatchSampler(len(images), recipe.batch, drop_last=recipe.drop_last, seed=recipe.seed)
    about = describe_images(images)
    same = {name: about[name] for name in ("count", "digest")}
    distributed.check_agreement(
        place, {"recipe": recipe.to_dict(), "category": category, "training images": same}, "train"
    )
    run = TrainingState(recipe, category, device, model, build_optimisers(model, recipe, device), batches, about, place)
    if found is not None:
        restore(run, found, f"{resume}")

    target = Path(out) / "checkpoint.pt" if out is not None else None
    log = JsonLog(Path(out) / "log.jsonl", keep=run.done) if out is not None and place.first else None
    if out is not None and place.first:
        yaml_file.write_recipe(Path(out) / yaml_file.FILE_NAME, recipe)
    saved = run.done  # the step of the last checkpoint

    def save() -> None:
        nonlocal saved
        state = snapshot(run)
        if target is not None and saved < run.done:
            if place.first:
                checkpoint.save(target, state)
            saved = run.done

    network: Any = distributed.wrap_model(model, place, device)  # the same parameters
    network = torch.compile(network, dynamic=False) if recipe.compile else network
    teacher = None
    if teacher_cache and model.frozen is not None:
        teacher = TeacherCache(model.frozen, len(images), teacher_cache, autocast=recipe.precision == "bfloat16")
    pixels = DeviceImages(images, device)
    replay: Any = None
    if recipe.graph and device.type == "cuda":
        alone = [batches.batch]
        replay = GraphedStep(
            lambda moving, x, alpha: train_step(network, moving, x, alpha, recipe, alone), alone[0], device
        )
    busy, since = 0.0, time.perf_counter()
    seen, logged = 0, 0  # images, and losses read, since and up to the last line
    between = True  # two steps, and so in a state that may be saved
    with interrupts.defer_interrupts(place.size == 1) as asked:
        try:
            while run.done < recipe.steps:
                between = False
                whole = next(batches)
                mine, shares = whole[place.share(len(whole))], place.shares(len(whole))
                batch = normalise(pixels[mine], model.mean, model.std, dtype=dtype, channels_last=last)
                alpha = alpha_at(run.done, recipe.steps, recipe.ramp, recipe.alpha_start, recipe.alpha_end)
                moving = schedule(run.optimisers, recipe, run.done)
                if replay is not None:
                    loss = replay(moving, batch, alpha)
                else:
                    known = teacher(mine, batch) if teacher is not None and len(mine) else None
                    loss = train_step(network, moving, batch, alpha, recipe, shares, known)
                run.pending.append(loss)
                run.done, seen, between = run.done + 1, seen + len(whole), True
                lines = run.done % recipe.log_every == 0 or run.done == recipe.steps
                if lines:
                    read_losses(run)
                    elapsed = time.perf_counter() - since
                    mean, rate = math.fsum(run.losses[logged:]) / (len(run.losses) - logged), seen / elapsed
                    busy, seen, logged = busy + elapsed, 0, len(run.losses)
                    if log is not None:
                        log.write(step=run.done, loss=mean, alpha=alpha, images_per_second=rate, seconds=busy)
                    if on_log is not None and place.first:
                        on_log(run.done, mean, rate, alpha)
                    since = time.perf_counter()
                if asked() if place.size == 1 else lines and place.any(asked()):  # all stop at one step
                    raise KeyboardInterrupt
                if run.done % recipe.checkpoint_every == 0 or run.done == recipe.steps:
                    begun = time.perf_counter()
                    save()
                    since += time.perf_counter() - begun
        except KeyboardInterrupt:
            if between:
                save()
            raise
    calibration = None if found is None or found.step < recipe.steps else found.calibration
    if kept and calibration is None and place.first:
        calibration = calibrate_holdout(run, kept, target, cache_dir)
    state = replace(snapshot(run), optimisers=[], rng={}, calibration=calibration)
    return TrainResult(model.eval(), recipe, category, target, run.losses, busy, state)


def _good(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.split == "train" and sample.label == 0]


def train_step(
    model: nn.Module,
    moving: Sequence[Optimizer],
    images: Tensor,
    alpha: float | Tensor,
    recipe: Recipe,
    shares: Sequence[int] | None = None,
    known: Sequence[Tensor] | None = None,
) -> Tensor:
    """One step of training.

    Args:
        model: `ReContrast` in training mode; compiled, or spread over processes.
        moving: the optimisers that take part.
        images: (N, 3, H, W), normalised, in the dtype of the weights.
        alpha: standard deviations above the mean from which on a point is hard.
        recipe: for precision, and for the loss.
        shares: images of each process; None: there is one.
        known: features of the frozen encoder, (N, C, h, w) of each level, where they are kept.

    Returns:
        The loss of before the step, a scalar on the device, float32 (float64 for such weights); of several processes,
        this one's part.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        pairs = model(images, frozen_features=known)
    rule = deviation(alpha, recipe.factor) if recipe.mining else None
    groups = 2 if recipe.pairs == "cross" else 1
    loss = pairs_loss(pairs, rule, form=recipe.loss, groups=groups, stop_gradient=recipe.stop_gradient, shares=shares)
    model.zero_grad(set_to_none=True)  # also of what rests
    loss.backward()
    for optimiser in moving:
        optimiser.step()
    return loss.detach()


def build_model(recipe: Recipe, category: str) -> ReContrast:
    """The model that a recipe asks for.

    Args:
        recipe: for backbone, weights and the switches of the model.
        category: that decides `Recipe.encoder_bn_for`.

    Returns:
        An untrained model on the CPU, in training mode.

    Raises:
        ValueError: as `ReContrast`.
        OSError: the weights cannot be read.
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
