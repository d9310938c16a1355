"""Networks that are fitted in one pass over the good images: PatchCore and PaDiM."""

import math
import time
import warnings
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from recontrast.architectures import get_architecture
from recontrast.data.images import normalise
from recontrast.data.listing import DataWarning
from recontrast.data.sources import Images
from recontrast.models.network import Network, OnePassNetwork
from recontrast.recipes.recipe import Recipe
from recontrast.runtime import threads
from recontrast.runtime.memory import measure_available_memory
from recontrast.training import interrupts
from recontrast.training.device_images import DeviceImages
from recontrast.training.trainer import Trainer

MIN_IMAGES = 10  # are observed whatever the time limit


class OnePassTrainer(Trainer):
    """One pass over the good images, in their order; see `Trainer` for arguments and attributes.

    A step is a batch. There is nothing to save between them: an interrupted pass begins anew.
    """

    @property
    def is_complete(self) -> bool:
        """Whether the network is fitted."""
        return self.state.step > 0

    def _prepare_step(self, images: Images) -> None:
        """Set up the images."""
        self.images = DeviceImages(images, self.settings.device)

    def _choose_order(self, count: int) -> np.ndarray:
        """Return the order of the images: theirs, or a random one if time may end before the last one."""
        if self.deadline == math.inf:
            return np.arange(count)
        return np.random.default_rng([self.settings.recipe.seed, count]).permutation(count)

    def run_loop(self) -> None:
        """Observe all images, fit the network and save it, unless the resumed run did already."""
        if self.is_complete:
            return
        state, recipe, on_log = self.state, self.settings.recipe, self.settings.on_log
        count, batch = state.sampler.count, state.sampler.batch
        starts = range(0, count, batch)
        order = self._choose_order(count)
        state.model.eval()
        plan_memory(state.model, recipe, count, self.settings.device)
        threads.start_threads(self.settings.device)
        self.progress.start_interval()
        observed = 0
        with interrupts.defer_interrupts(True) as is_interrupted:
            for number, start in enumerate(starts, 1):
                indices = order[start : start + batch]
                self._observe(indices)
                observed += len(indices)
                state.step = number
                threads.after_step(state.device)
                is_late = time.perf_counter() >= self.deadline and observed >= min(MIN_IMAGES, count)
                if is_interrupted():
                    raise KeyboardInterrupt
                if number % recipe.log_every == 0 or number == len(starts) or is_late:
                    rate = self.progress.end_interval_without_loss()
                    if on_log is not None:
                        on_log(number, math.nan, rate, math.nan)
                    self.progress.start_interval()
                if is_late:
                    break
        if observed < count:
            text = (
                f"train: the time was enough for {observed} of {count} images: give more time, or choose a smaller size"
            )
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        fit = get_architecture(recipe).fit
        if fit is not None:  # never None here
            fit(state.model, recipe)
        state.images["observed"] = observed
        self.progress.end_interval_without_loss()
        if self.files is not None:
            self.files.log(step=state.step, images=observed, seconds=self.progress.seconds)
        self._save()

    def _observe(self, indices: np.ndarray) -> None:
        """Run the network on the images at ``indices``."""
        inside = None if self.rois is None else self.rois[indices]
        recipe, channels_last = self.settings.recipe, self.channels_last
        observe(self.state.model, self.images[indices], recipe, channels_last=channels_last, inside=inside)
        self.progress.count(len(indices))


def plan_memory(model: Network, recipe: Recipe, count: int, device: torch.device) -> None:
    """Check before a pass that it fits into memory, and warn if only a share of the features does.

    Args:
        model: Network to fit.
        recipe: Recipe of the run.
        count: Number of images.
        device: Device of the network.

    Raises:
        ValueError: If what the network keeps does not fit.
    """
    plan, available = get_architecture(recipe).plan_memory, measure_available_memory(device)
    if plan is not None and available is not None and (note := plan(model, recipe, count, available)) is not None:
        warnings.warn(f"{recipe.architecture}: {note}", DataWarning, stacklevel=2)


@torch.no_grad()
def observe(
    model: Network, pixels: Tensor, recipe: Recipe, *, channels_last: bool, inside: Tensor | None = None
) -> None:
    """Let a network observe a batch of good images.

    Args:
        model: Network to fit, in eval mode.
        pixels: Images (N, H, W, 3) uint8, on the device of the network.
        recipe: Recipe of the run.
        channels_last: Whether the network computes in channels-last format.
        inside: Whether each pixel is in the region of interest, (N, H, W) or (1, H, W) bool; None: the whole image. A
            network without `Network.fits_inside` ignores it.
    """
    dtype = next(model.parameters()).dtype
    batch = normalise(pixels, model.mean, model.std, dtype=dtype, channels_last=channels_last)
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
        if inside is not None and model.fits_inside:
            cast(Any, model).observe(batch, inside.expand(len(batch), -1, -1))
        else:
            cast(OnePassNetwork, model).observe(batch)
