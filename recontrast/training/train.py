"""Training loop of the reference (`train` in `recontrast_mvtec.py`), for any number of steps and with resume.

There is no augmentation: each image is decoded once and enters every epoch as the same tensor. The loss stays on the
device and is read only for log lines and checkpoints, so that the host never waits for the device between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

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
from recontrast.training import interrupts
from recontrast.training.cuda_graph import GraphedStep
from recontrast.training.device_images import DeviceImages
from recontrast.training.holdout import calibrate_holdout, split_holdout
from recontrast.training.json_log import JsonLog
from recontrast.training.optimisers import build_optimisers, schedule_optimisers
from recontrast.training.progress import ProgressMeter
from recontrast.training.sampler import BatchSampler
from recontrast.training.settings import OnLog, RunSettings, check_options
from recontrast.training.state import TrainingState, check_resume, read_losses, restore, snapshot
from recontrast.training.teacher_cache import TeacherCache


@dataclass(frozen=True)
class TrainResult:
    """Result of `train`.

    Attributes:
        model: Trained model, in eval mode.
        recipe: Recipe of the run.
        category: Category of the run, as given or derived from the samples.
        checkpoint: Path of the checkpoint; None if nothing was written.
        losses: Loss of each step made in this call.
        seconds: Duration of these steps, without decoding, log lines and checkpoints.
        state: Content of the final checkpoint, without optimiser and random states.
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
        """Calibration on the held-out images, in the first process; None in others and without held-out images."""
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
    """Train a detector on the good training images in ``samples``.

    If the recipe holds out a share of the good images, the detector is calibrated on them after the last step.

    Under torchrun all processes train one detector together, with the same result as one process with the full batch
    (see `recontrast.runtime.distributed`). Only the first process writes files.

    Args:
        recipe: Recipe of the run.
        samples: Samples of one category, or of several categories for one unified detector; test samples are ignored.
            Alternatively, decoded good images of size ``recipe.out``: an array (n, H, W, 3) uint8 or any other
            `Images`.
        category: Name of the category, for the checkpoint and for `Recipe.encoder_bn_for`. By default the categories
            of the samples joined by "+", or "images" for decoded images.
        out: Folder for ``checkpoint.pt``, ``log.jsonl`` and ``recipe.yaml``; None writes nothing.
        device: Device to train on; by default the GPU if there is one, else the CPU.
        resume: Checkpoint to resume from; its recipe and training images must be the same.
        on_log: Callback that receives the step, the mean loss since the last call, the images per second and alpha,
            every ``recipe.log_every`` steps and after the last step.
        cache_dir: Folder for decoded images; None keeps them in memory.
        model: Model to train in place; by default a new one is built.
        teacher_cache: Size of the cache of frozen features on the device, bytes; see `TeacherCache`.

    Returns:
        The trained model in eval mode, the losses and the path of the checkpoint.

    Raises:
        ValueError: If there are no good training images, or too few for the batch or the calibration; if two options
            exclude each other; if the loss is not finite; or if the checkpoint does not fit.
        OSError: If a file cannot be read or written.
        KeyboardInterrupt: After Ctrl-C, or SIGTERM in a single process, once the current step is complete and a
            checkpoint is written.
    """
    images: Images | None = None if isinstance(samples, Sequence) else samples
    good = _select_good(samples) if isinstance(samples, Sequence) else []
    count = len(good) if images is None else len(images)
    if not count:
        raise ValueError(f"train: samples: wanted good training images, got none among {len(samples)} samples")
    category = category or "+".join(dict.fromkeys(sample.category for sample in good)) or "images"
    if images is not None and recipe.holdout:
        raise ValueError(f"train: holdout: wanted 0 for images that are decoded already, got {recipe.holdout:g}")
    training, held_out = split_holdout(good, recipe.holdout, recipe.seed)
    count -= len(held_out)
    if recipe.drop_last and count < recipe.batch:
        raise ValueError(f"train: batch: wanted at most the {count} training images, got {recipe.batch}")
    with distributed.join_processes(device) as (world, resolved_device), convolution_precision(recipe.tf32):
        return _run(
            RunSettings(
                recipe=recipe,
                category=category,
                samples=training,
                held_out=held_out,
                images=images,
                out=None if out is None else Path(out),
                resume=resume,
                on_log=on_log,
                cache_dir=cache_dir,
                model=model,
                teacher_cache=teacher_cache,
                world=world,
                device=resolved_device,
            )
        )


def _run(settings: RunSettings) -> TrainResult:
    """Train within joined processes; on return DistributedDataParallel is freed, before the process group ends."""
    check_options(settings)
    trainer = _Trainer(settings)
    trainer.run_loop()
    return trainer.finish()


def _select_good(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.split == "train" and sample.label == 0]


class _Trainer:
    """One training run: the constructor sets it up, `run_loop` makes the steps, `finish` calibrates."""

    def __init__(self, settings: RunSettings) -> None:
        recipe, world, out = settings.recipe, settings.world, settings.out
        self.settings = settings
        resumed = checkpoint.load(settings.resume) if settings.resume is not None else None
        if resumed is not None:
            check_resume(resumed, f"{settings.resume}", recipe, settings.category)
        torch.manual_seed(recipe.seed)
        model = _prepare_model(settings, resumed)
        self.channels_last = move_model(model, settings.device, recipe.channels_last) == torch.channels_last
        model.train()
        self.dtype = next(model.parameters()).dtype
        images = _open_images(settings)
        self.state = _build_state(settings, model, images)
        self.calibration: Calibration | None = None
        if resumed is not None:
            restore(self.state, resumed, f"{settings.resume}")
            self.calibration = resumed.calibration if resumed.step >= recipe.steps else None
        self.checkpoint_path = out / "checkpoint.pt" if out is not None else None
        self.log: JsonLog | None = None
        if out is not None and world.first:
            self.log = JsonLog(out / "log.jsonl", keep=self.state.step)
            yaml_file.write_recipe(out / yaml_file.FILE_NAME, recipe)
        self.saved_step = self.state.step
        self._prepare_step(images)
        self.is_between_steps = True  # only then the state may be saved
        self.progress = ProgressMeter()

    def _prepare_step(self, images: Images) -> None:
        """Wrap the model for several processes, compile it, and set up caches and the CUDA graph."""
        recipe, world, device, model = self.settings.recipe, self.settings.world, self.settings.device, self.state.model
        self.network: Any = distributed.wrap_model(model, world, device)  # shares the parameters of ``model``
        if recipe.compile:
            self.network = torch.compile(self.network, dynamic=False)
        self.teacher: TeacherCache | None = None
        if self.settings.teacher_cache and model.frozen is not None:
            autocast = recipe.precision == "bfloat16"
            self.teacher = TeacherCache(model.frozen, len(images), self.settings.teacher_cache, autocast=autocast)
        self.images = DeviceImages(images, device)
        self.graphed_step: GraphedStep | None = None
        if recipe.graph and device.type == "cuda":
            batch, network = self.state.sampler.batch, self.network  # a reference to self would delay freeing the GPU
            self.graphed_step = GraphedStep(
                lambda active, x, alpha: train_step(network, active, x, alpha, recipe, [batch]), batch, device
            )

    def run_loop(self) -> None:
        """Make the remaining steps, with log lines and checkpoints at the recipe's intervals.

        An interrupt is held back until the current step is complete, so that the checkpoint holds the same state as in
        an uninterrupted run.
        """
        state, recipe, world = self.state, self.settings.recipe, self.settings.world
        self.progress.start_interval()
        with interrupts.defer_interrupts(world.size == 1) as is_interrupted:
            try:
                while state.step < recipe.steps:
                    alpha = self._make_step()
                    is_logged = self._is_due(recipe.log_every)
                    if is_logged:
                        self._log(alpha)
                    # Several processes agree at log lines only, so that all stop after the same step.
                    if is_interrupted() if world.size == 1 else is_logged and world.any(is_interrupted()):
                        raise KeyboardInterrupt
                    if self._is_due(recipe.checkpoint_every):
                        with self.progress.paused():
                            self._save()
            except KeyboardInterrupt:
                if self.is_between_steps:
                    self._save()
                raise

    def finish(self) -> TrainResult:
        """Calibrate on the held-out images, unless the resumed run already did, and return the result."""
        settings, state = self.settings, self.state
        calibration = self.calibration
        if settings.held_out and calibration is None and settings.world.first:
            calibration = calibrate_holdout(state, settings.held_out, self.checkpoint_path, settings.cache_dir)
        final = replace(snapshot(state), optimisers=[], rng={}, calibration=calibration)
        return TrainResult(
            state.model.eval(), settings.recipe, settings.category, self.checkpoint_path, state.losses,
            self.progress.seconds, final,
        )  # fmt: skip

    def _make_step(self) -> float:
        """Train on the next batch and return the alpha of the step."""
        state, recipe, world, model = self.state, self.settings.recipe, self.settings.world, self.state.model
        self.is_between_steps = False
        indices = next(state.sampler)
        own, shares = indices[world.share(len(indices))], world.shares(len(indices))
        batch = normalise(self.images[own], model.mean, model.std, dtype=self.dtype, channels_last=self.channels_last)
        alpha = alpha_at(state.step, recipe.steps, recipe.ramp, recipe.alpha_start, recipe.alpha_end)
        active = schedule_optimisers(state.optimisers, recipe, state.step)
        state.pending_losses.append(self._update(active, batch, alpha, own, shares))
        state.step += 1
        self.progress.count(len(indices))
        self.is_between_steps = True
        return alpha

    def _update(
        self, active: list[AdamW], batch: Tensor, alpha: float, indices: NDArray[np.int64], shares: list[int]
    ) -> Tensor:
        """Run or replay `train_step` on this process's images of the batch."""
        if self.graphed_step is not None:
            return self.graphed_step(active, batch, alpha)
        frozen_features = self.teacher(indices, batch) if self.teacher is not None and len(indices) else None
        return train_step(self.network, active, batch, alpha, self.settings.recipe, shares, frozen_features)

    def _is_due(self, every: int) -> bool:
        """Return whether the last step ends an interval of ``every`` steps, or the run."""
        return self.state.step % every == 0 or self.state.step == self.settings.recipe.steps

    def _log(self, alpha: float) -> None:
        """Read the losses from the device and report them, and begin a new interval."""
        state, on_log = self.state, self.settings.on_log
        read_losses(state)
        loss, rate = self.progress.end_interval(state.losses)
        if self.log is not None:
            seconds = self.progress.seconds
            self.log.write(step=state.step, loss=loss, alpha=alpha, images_per_second=rate, seconds=seconds)
        if on_log is not None and self.settings.world.first:
            on_log(state.step, loss, rate, alpha)
        self.progress.start_interval()

    def _save(self) -> None:
        """Check that losses and weights are finite, and write a checkpoint unless the current step has one."""
        content = snapshot(self.state)
        if self.checkpoint_path is not None and self.saved_step < self.state.step:
            if self.settings.world.first:
                checkpoint.save(self.checkpoint_path, content)
            self.saved_step = self.state.step


def _prepare_model(settings: RunSettings, resumed: Checkpoint | None) -> ReContrast:
    """Return the given model, or a new one, or the one of the checkpoint; check that it takes images of this size."""
    if settings.model is not None:
        model = settings.model
    elif resumed is None:
        model = build_model(settings.recipe, settings.category)
    else:
        model = checkpoint.build(resumed, f"{settings.resume}")
    model.map_sizes(settings.recipe.out)  # raises for a size that its strides do not divide
    return model


def _open_images(settings: RunSettings) -> Images:
    """Return the decoded training images, from memory or from the cache."""
    if settings.images is not None:
        return settings.images
    recipe, folder = settings.recipe, settings.cache_dir
    return ImageCache(
        settings.samples, recipe.size, recipe.crop, directory=folder, tile=recipe.tile, stride=recipe.stride
    )


def _build_state(settings: RunSettings, model: ReContrast, images: Images) -> TrainingState:
    """Check that all processes have the same settings and images, and return the state before the first step."""
    recipe, category, device, world = settings.recipe, settings.category, settings.device, settings.world
    sampler = BatchSampler(len(images), recipe.batch, drop_last=recipe.drop_last, seed=recipe.seed)
    description = describe_images(images)
    compared = {name: description[name] for name in ("count", "digest")}
    distributed.check_agreement(
        world, {"recipe": recipe.to_dict(), "category": category, "training images": compared}, "train"
    )
    optimisers = build_optimisers(model, recipe, device)
    return TrainingState(recipe, category, device, model, optimisers, sampler, description, world)


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
