"""What the frozen encoder makes of the training images, kept: there is no augmentation, so that it never changes."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recontrast.models.backbone import Backbone


class TeacherCache:
    """Features of the frozen encoder by image, made when an image is first seen, within a budget.

    Args:
        encoder: frozen.
        count: training images.
        budget: bytes on the encoder's device. Where it does not take all images, the first ones are kept.
        autocast: features are made under autocast to bfloat16, as those of the trained encoder then are.

    Attributes:
        capacity: images that the budget takes; known after the first call.
        bytes: that are in use for them.
    """

    def __init__(self, encoder: Backbone, count: int, budget: int, *, autocast: bool = False) -> None:
        self.encoder, self.budget, self.autocast = encoder, budget, autocast
        self.have = np.zeros(count, bool)  # on the host: nothing waits for the device
        self.capacity = self.bytes = 0
        self.levels: list[Tensor] = []  # each (room, C, h, w), or (room, h, w, C) where images are channels_last

    def __call__(self, index: NDArray[np.int64], images: Tensor) -> list[Tensor]:
        """Features of a batch.

        Args:
            index: which training images these are, (N,).
            images: (N, 3, H, W), normalised, in the layout that is used throughout.

        Returns:
            For each level (N, C, h, w), as the encoder gives them.
        """
        if len(index) == 0:  # of a process that has no share of the batch
            return self.encoder(images)
        last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
        missing = np.flatnonzero(~self.have[index])
        fresh: Sequence[Tensor] = []
        if len(missing):
            some = images if len(missing) == len(index) else _rows(images, missing, last)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
                fresh = self.encoder(some)
            self._keep(index[missing], fresh, last)
        if len(missing) == len(index):
            return list(fresh)
        known = np.flatnonzero(np.isin(np.arange(len(index)), missing, invert=True))
        where = _on(index[known], images.device)
        found = []
        for number, level in enumerate(self.levels):
            part = level.index_select(0, where)
            if len(missing):
                both = torch.empty((len(index), *part.shape[1:]), dtype=part.dtype, device=part.device)
                both.index_copy_(0, _on(known, images.device), part)
                part = both.index_copy_(0, _on(missing, images.device), _stored(fresh[number], last))
            found.append(part.permute(0, 3, 1, 2) if last else part)
        return found

    def _keep(self, index: NDArray[np.int64], fresh: Sequence[Tensor], last: bool) -> None:
        """Store the features of the images at ``index``, as far as there is room."""
        if not self.levels:
            each = sum(level[0].nbytes for level in fresh)
            self.capacity = min(len(self.have), self.budget // each)
            self.bytes = self.capacity * each
            like = [_stored(level, last) for level in fresh]
            self.levels = [torch.empty((self.capacity, *f.shape[1:]), dtype=f.dtype, device=f.device) for f in like]
        kept = np.flatnonzero(index < self.capacity)
        if len(kept):
            rows, chosen = (_on(part, fresh[0].device) for part in (index[kept], kept))
            for level, features in zip(self.levels, fresh, strict=True):
                level.index_copy_(0, rows, _stored(features, last).index_select(0, chosen))
            self.have[index[kept]] = True


def _stored(features: Tensor, last: bool) -> Tensor:
    return features.permute(0, 2, 3, 1) if last else features


def _rows(images: Tensor, rows: NDArray[np.int64], last: bool) -> Tensor:
    some = images.index_select(0, _on(rows, images.device))
    return some.contiguous(memory_format=torch.channels_last) if last else some


def _on(rows: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(rows).to(device, non_blocking=True)
