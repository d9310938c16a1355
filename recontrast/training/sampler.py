"""Order of the training images: a new permutation each epoch, drawn as by the DataLoader of the reference.

For data sets with long tails, classes can be drawn equally often instead.
"""

from collections.abc import Sequence
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
        classes: Class of each image, (count,). If given, an epoch has as many draws, each class is drawn equally often
            (up to one draw per epoch), and no image of a class again before all others of it in that epoch. None draws
            each image once per epoch.
    """

    def __init__(
        self, count: int, batch: int, *, drop_last: bool, seed: int, classes: NDArray[np.int64] | None = None
    ) -> None:
        self.count, self.batch = count, min(batch, count)
        self.members = None if classes is None else [np.flatnonzero(classes == name) for name in np.unique(classes)]
        self.epoch_length = count - count % self.batch if drop_last else count  # in images
        self.generator = torch.Generator().manual_seed(seed)
        self._draw_epoch()

    def _draw_epoch(self) -> None:
        self.generator_state = self.generator.get_state()
        self.order = self._permute(self.count) if self.members is None else self._draw_classes(self.members)
        self.position = 0

    def _draw_classes(self, members: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Return the images of an epoch: in each group of as many draws as there are classes, one of each class."""
        rounds = -(-self.count // len(members))
        draws = np.empty((rounds, len(members)), np.int64)
        for column, images in enumerate(members):
            passes = [images[self._permute(len(images))] for _ in range(-(-rounds // len(images)))]
            draws[:, column] = np.concatenate(passes)[:rounds]
        for row in range(rounds):
            draws[row] = draws[row][self._permute(len(members))]
        return draws.reshape(-1)[: self.count]

    def _permute(self, count: int) -> NDArray[np.int64]:
        return torch.randperm(count, generator=self.generator).numpy()

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
