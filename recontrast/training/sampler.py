"""Which images a step sees: a new random order each epoch, as the DataLoader of the reference's scripts draws it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


class BatchSampler:
    """Endless batches of indices; an epoch's last one may be ragged.

    The state is that of the generator before the running epoch was drawn, and the place in it.
    """

    def __init__(self, count: int, batch: int, *, drop_last: bool, seed: int) -> None:
        """Orders of ``count`` images in batches of ``batch`` (all of them, where that is more)."""
        self.count, self.batch = count, min(batch, count)
        self.end = count - count % self.batch if drop_last else count  # images used of an epoch
        self.generator = torch.Generator().manual_seed(seed)
        self._draw()

    def _draw(self) -> None:
        self.before = self.generator.get_state()
        self.order = torch.randperm(self.count, generator=self.generator).numpy()
        self.place = 0

    def __next__(self) -> NDArray[np.int64]:
        """Indices of the next batch, (n,)."""
        if self.place >= self.end:
            self._draw()
        index = self.order[self.place : min(self.place + self.batch, self.end)]
        self.place += len(index)
        return index

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on with the next batch."""
        return {"generator": self.before, "place": self.place}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.generator.set_state(state["generator"].cpu())
        self._draw()
        self.place = state["place"]
