"""Order of the training images: a new permutation each epoch, drawn as by the DataLoader of the reference."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


class BatchSampler:
    """Endless iterator over batches of image indices; the last batch of an epoch may be smaller.

    Its state is the state of the generator before the current epoch was drawn, and the position in the epoch.

    Args:
        count: Number of images.
        batch: Images in a batch; at most ``count`` are used.
        drop_last: Whether to drop the smaller last batch of an epoch.
        seed: Seed of the permutations.
    """

    def __init__(self, count: int, batch: int, *, drop_last: bool, seed: int) -> None:
        self.count, self.batch = count, min(batch, count)
        self.epoch_length = count - count % self.batch if drop_last else count  # in images
        self.generator = torch.Generator().manual_seed(seed)
        self._draw_epoch()

    def _draw_epoch(self) -> None:
        self.generator_state = self.generator.get_state()
        self.order = torch.randperm(self.count, generator=self.generator).numpy()
        self.position = 0

    def __next__(self) -> NDArray[np.int64]:
        """Indices of the next batch, (n,)."""
        if self.position >= self.epoch_length:
            self._draw_epoch()
        indices = self.order[self.position : min(self.position + self.batch, self.epoch_length)]
        self.position += len(indices)
        return indices

    def state(self) -> dict[str, Any]:
        """Return the state for `restore`, which continues with the next batch."""
        return {"generator": self.generator_state, "place": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue after the batch at which ``state`` was taken."""
        self.generator.set_state(state["generator"].cpu())
        self._draw_epoch()
        self.position = state["place"]
