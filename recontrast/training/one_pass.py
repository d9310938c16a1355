"""Networks that are fitted in one pass over the good images: PatchCore and PaDiM."""

import math

import numpy as np
import torch

from recontrast.architectures import get_architecture
from recontrast.data.images import normalise
from recontrast.data.sources import Images
from recontrast.training import interrupts
from recontrast.training.device_images import DeviceImages
from recontrast.training.trainer import Trainer


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

    def run_loop(self) -> None:
        """Observe all images, fit the network and save it, unless the resumed run did already."""
        if self.is_complete:
            return
        state, recipe, on_log = self.state, self.settings.recipe, self.settings.on_log
        count, batch = state.sampler.count, state.sampler.batch
        starts = range(0, count, batch)
        state.model.eval()
        self.progress.start_interval()
        with interrupts.defer_interrupts(True) as is_interrupted:
            for number, start in enumerate(starts, 1):
                self._observe(np.arange(start, min(start + batch, count)))
                if is_interrupted():
                    raise KeyboardInterrupt
                if number % recipe.log_every == 0 or number == len(starts):
                    rate = self.progress.end_interval_without_loss()
                    if on_log is not None:
                        on_log(number, math.nan, rate, math.nan)
                    self.progress.start_interval()
        fit = get_architecture(recipe).fit
        if fit is not None:  # never None here
            fit(state.model, recipe)
        rate = self.progress.end_interval_without_loss()
        state.step = len(starts)
        if self.files is not None:
            self.files.log(step=state.step, images=count, seconds=self.progress.seconds)
        self._save()

    @torch.no_grad()
    def _observe(self, indices: np.ndarray) -> None:
        """Run the network on the images at ``indices``."""
        model, recipe, device = self.state.model, self.settings.recipe, self.settings.device
        pixels = self.images[indices]
        batch = normalise(pixels, model.mean, model.std, dtype=self.dtype, channels_last=self.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            model.observe(batch)
        self.progress.count(len(indices))
