"""Training loop: steps, log lines and checkpoints of one run.

The loss stays on the device and is read only for log lines and checkpoints, so that the host never waits for the device
between them.
"""

import math
import time
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from recontrast import checkpoint
from recontrast.architectures import build_model, compute_rule_parameter
from recontrast.calibration.conformal import Calibration
from recontrast.checkpoint import Checkpoint
from recontrast.data.augment import augment_images, count_views
from recontrast.data.fingerprint import describe_images
from recontrast.data.groups import list_groups
from recontrast.data.images import normalise
from recontrast.data.sources import Images, SelectedImages
from recontrast.data.window import AUTO
from recontrast.models.network import Network
from recontrast.models.norm_act import fuse_norm_act
from recontrast.runtime import distributed, threads
from recontrast.runtime.device import move_model
from recontrast.training import interrupts
from recontrast.training.cuda_graph import GraphedStep
from recontrast.training.device_images import DeviceImages
from recontrast.training.holdout import calibrate_holdout
from recontrast.training.open_images import OpenImages, list_classes, open_images
from recontrast.training.optimisers import build_optimisers, schedule_optimisers
from recontrast.training.progress import ProgressMeter
from recontrast.training.rois import TrainingRois
from recontrast.training.run_files import CHECKPOINT, RunFiles
from recontrast.training.sampler import BatchSampler
from recontrast.training.settings import RunSettings
from recontrast.training.state import TrainingState, check_resume, read_losses, restore, snapshot
from recontrast.training.step import train_step
from recontrast.training.teacher_cache import TeacherCache

RULE_PARAMETERS = {"hardest": "fraction", "power": "exponent"}  # names in the log; others: alpha


class Trainer:
    """One training run: the constructor sets it up, `run_loop` makes the steps, `calibrate` sets the threshold.

    Args:
        settings: Settings of the run.
        files: Files of the run; None writes nothing.

    Attributes:
        state: State of the run.
        progress: Duration of the steps.
    """

    def __init__(self, settings: RunSettings, files: RunFiles | None) -> None:
        limit = settings.time_limit
        self.deadline = math.inf if limit is None else time.perf_counter() + limit
        resumed = checkpoint.load(settings.resume) if settings.resume is not None else None
        if resumed is not None:  # the run has detected them when it was started
            found: dict[str, Any] = {"bits": resumed.recipe.bits} if settings.recipe.bits is None else {}
            found |= {"window": resumed.recipe.window} if settings.recipe.window == AUTO else {}
            settings = replace(settings, recipe=settings.recipe.replace(**found))
            if files is not None:
                files.recipe = settings.recipe
        recipe = settings.recipe
        self.settings, self.files = settings, files
        if resumed is not None:
            check_resume(resumed, f"{settings.resume}", recipe, settings.category)
        threads.start_threads()
        torch.manual_seed(recipe.seed)
        model = _prepare_model(settings, resumed)
        self.channels_last = move_model(model, settings.device, recipe.channels_last) == torch.channels_last
        model.train()
        self.dtype = next(model.parameters()).dtype
        self.opened = open_images(settings, resumed)
        images, self.rois = self.opened.training, None
        if recipe.roi is not None:
            self.rois = TrainingRois(recipe, self.opened.samples, images, settings.device)
            if len(self.rois.inside) < len(images):
                images = SelectedImages(images, self.rois.inside)
        self.state = _build_state(settings, model, self.opened, self.rois)
        images = augment_images(images, recipe.augment)
        self.calibration: Calibration | None = None
        if resumed is not None:
            restore(self.state, resumed, f"{settings.resume}")
            self.calibration = resumed.calibration if self.is_complete else None
        if files is not None:
            files.start(self.state.step)
        self.saved_step = self.state.step
        self._prepare_step(images)
        self.is_between_steps = True  # only then the state may be saved
        self.progress = ProgressMeter()

    @property
    def is_complete(self) -> bool:
        """Whether all steps are made."""
        return self.state.step >= self.settings.recipe.steps

    def _prepare_step(self, images: Images) -> None:
        """Wrap the model for several processes, compile it, and set up caches and the CUDA graph."""
        recipe, world, device, model = self.settings.recipe, self.settings.world, self.settings.device, self.state.model
        if recipe.fused_norm and world.size == 1:  # several processes share their batch statistics
            fuse_norm_act(model)
        self.network: Any = distributed.wrap_model(model, world, device)  # shares the parameters of ``model``
        if recipe.compile:
            self.network = torch.compile(self.network, dynamic=False)
        self.teacher: TeacherCache | None = None
        if self.settings.teacher_cache and model.constant_encoder is not None:
            budget, autocast = self.settings.teacher_cache, recipe.precision == "bfloat16"
            self.teacher = TeacherCache(model.constant_features, len(images), budget, autocast=autocast)
        self.images = DeviceImages(images, device)
        self.graphed_step: GraphedStep | None = None
        if recipe.graph and device.type == "cuda" and (self.rois is None or self.rois.is_shared):
            inside = None if self.rois is None else self.rois[np.arange(1)]
            batch, network = self.state.sampler.batch, self.network  # a reference to self would delay freeing the GPU
            self.graphed_step = GraphedStep(
                lambda active, x, parameter, features: train_step(
                    network, active, x, parameter, recipe, [batch], features, inside
                ),
                batch,
                device,
            )

    def run_loop(self) -> None:
        """Make the remaining steps, or those that the time allows, with log lines and checkpoints at their intervals.

        An interrupt is held back until the current step is complete, so that the checkpoint holds the same state as in
        an uninterrupted run.
        """
        recipe, world = self.settings.recipe, self.settings.world
        is_late = False
        threads.start_threads(self.settings.device)
        self.progress.start_interval()
        with interrupts.defer_interrupts(world.size == 1) as is_interrupted:
            try:
                while not self.is_complete and not is_late:
                    parameter = self._make_step()
                    # Several processes agree at log lines only, so that all stop after the same step.
                    is_logged = self._is_due(recipe.log_every)
                    if self.deadline < math.inf and (world.size == 1 or is_logged):
                        is_late = world.any(not self.is_complete and time.perf_counter() >= self.deadline)
                    if is_logged or is_late:
                        self._log(parameter)
                    if is_interrupted() if world.size == 1 else is_logged and world.any(is_interrupted()):
                        raise KeyboardInterrupt
                    if self._is_due(recipe.checkpoint_every) or is_late:
                        with self.progress.paused():
                            self._save()
            except KeyboardInterrupt:
                if self.is_between_steps:
                    self._save()
                raise
        if not self.is_complete and world.first:
            warnings.warn(
                f"train: the time was enough for {self.state.step} of {recipe.steps} steps: resume it, give more time, "
                "or choose a smaller size",
                RuntimeWarning,
                stacklevel=2,
            )

    def calibrate(self) -> Checkpoint:
        """Calibrate on the held-out images, unless the resumed run already did.

        Returns:
            The final checkpoint, without optimiser and random states.
        """
        settings, calibration = self.settings, self.calibration
        if settings.held_out and calibration is None and settings.world.first:
            path = None if self.files is None else self.files.folder / CHECKPOINT
            opened = self.opened
            calibration = calibrate_holdout(
                self.state, opened.held_out, path, opened.held_out_images, opened.held_out_groups
            )
        return replace(snapshot(self.state), optimisers=[], rng={}, calibration=calibration)

    def _make_step(self) -> float:
        """Train on the next batch and return the parameter of the mining rule in this step."""
        state, recipe, world, model = self.state, self.settings.recipe, self.settings.world, self.state.model
        self.is_between_steps = False
        indices = next(state.sampler)
        own, shares = indices[world.share(len(indices))], world.shares(len(indices))
        batch = normalise(self.images[own], model.mean, model.std, dtype=self.dtype, channels_last=self.channels_last)
        parameter = compute_rule_parameter(recipe, state.step)
        active = schedule_optimisers(state.optimisers, recipe, state.step)
        state.pending_losses.append(self._update(active, batch, parameter, own, shares))
        state.step += 1
        self.progress.count(len(indices))
        self.is_between_steps = True
        threads.after_step(self.settings.device)
        return parameter

    def _update(
        self, active: list[Optimizer], batch: Tensor, parameter: float, indices: NDArray[np.int64], shares: list[int]
    ) -> Tensor:
        """Run or replay `train_step` on this process's images of the batch."""
        frozen_features = self.teacher(indices, batch) if self.teacher is not None and len(indices) else None
        if self.graphed_step is not None:
            return self.graphed_step(active, batch, parameter, frozen_features)
        inside = None if self.rois is None else self.rois[indices]
        return train_step(self.network, active, batch, parameter, self.settings.recipe, shares, frozen_features, inside)

    def _is_due(self, every: int) -> bool:
        """Return whether the last step ends an interval of ``every`` steps, or the run."""
        return self.state.step % every == 0 or self.is_complete

    def _log(self, parameter: float) -> None:
        """Read the losses from the device and report them, and begin a new interval."""
        state, on_log = self.state, self.settings.on_log
        read_losses(state)
        loss, rate = self.progress.end_interval(state.losses)
        if self.files is not None:
            seconds = self.progress.seconds
            named = {RULE_PARAMETERS.get(state.recipe.rule, "alpha"): parameter}
            count = threads.measured_threads()
            chosen = {} if count is None or state.device.type != "cpu" else {"threads": count}
            self.files.log(step=state.step, loss=loss, **named, images_per_second=rate, seconds=seconds, **chosen)
        if on_log is not None and self.settings.world.first:
            on_log(state.step, loss, rate, parameter)
        self.progress.start_interval()

    def _save(self) -> None:
        """Check that losses and weights are finite, and write a checkpoint unless the current step has one."""
        content = snapshot(self.state)
        if self.saved_step < self.state.step:
            if self.files is not None:
                self.files.save(content)
            self.saved_step = self.state.step


def _prepare_model(settings: RunSettings, resumed: Checkpoint | None) -> Network:
    """Return the given model, or a new one, or the one of the checkpoint; check that it takes images of this size."""
    if settings.model is not None:
        model = settings.model
    elif resumed is None:
        model = build_model(settings.recipe, settings.category)
    else:
        model = checkpoint.build(resumed, f"{settings.resume}")
    model.map_sizes(settings.recipe.out)  # raises for a size that its strides do not divide
    return model


def _build_state(settings: RunSettings, model: Network, opened: OpenImages, rois: TrainingRois | None) -> TrainingState:
    """Check that all processes have the same settings and images, and return the state before the first step."""
    recipe, category, device, world = settings.recipe, settings.category, settings.device, settings.world
    images = opened.training
    views = count_views(recipe.augment)
    used = slice(None) if rois is None else rois.inside
    classes = np.tile(list_classes(opened)[used], views) if recipe.sampling == "classes" else None
    count = (len(images) if rois is None else len(rois.inside)) * views
    if recipe.drop_last and count < recipe.batch:
        raise ValueError(
            f"train: batch: wanted at most the {count} training images with a pixel in the region of interest, got "
            f"{recipe.batch}"
        )
    sampler = BatchSampler(count, recipe.batch, drop_last=recipe.drop_last, seed=recipe.seed, classes=classes)
    description = describe_images(images)
    compared = {name: description[name] for name in ("count", "digest")}
    distributed.check_agreement(
        world, {"recipe": recipe.to_dict(), "category": category, "training images": compared}, "train"
    )
    if opened.sketches:
        description["sketches"] = opened.sketches
    if groups := list_groups(opened.samples):
        description["groups"] = groups
    optimisers = build_optimisers(model, recipe, device)
    return TrainingState(recipe, category, device, model, optimisers, sampler, description, world)
