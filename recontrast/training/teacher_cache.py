"""Cache of the frozen encoder's features, which never change, as there is no augmentation."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recontrast.runtime.device import copy_to_device

Encoder = Callable[[Tensor], Sequence[Tensor]]  # images (N, 3, H, W) -> features (N, ...) of each level


class TeacherCache:
    """Cache of the frozen encoder's features, filled when an image is first used.

    Args:
        encoder: Frozen encoder, or `recontrast.models.network.Network.constant_features`.
        count: Number of training images.
        budget: Memory on the encoder's device, bytes. If it is too small for all images, the first ones are cached.
        autocast: Whether to compute the features under autocast to bfloat16, like those of the trained encoder.

    Attributes:
        capacity: Number of images that fit into the budget; known after the first call.
        bytes: Memory of the cache, bytes.
    """

    def __init__(self, encoder: Encoder, count: int, budget: int, *, autocast: bool = False) -> None:
        self.encoder, self.budget, self.autocast = encoder, budget, autocast
        self.is_cached = np.zeros(count, bool)  # on the host, so that a lookup does not wait for the device
        self.capacity = self.bytes = 0
        # Features of each level: (capacity, C, h, w); (capacity, h, w, C) for channels_last; tokens (capacity, T, C)
        self.levels: list[Tensor] = []

    def __call__(self, index: NDArray[np.int64], images: Tensor) -> list[Tensor]:
        """Return the features of a batch, from the cache where possible.

        Args:
            index: Indices of the training images, (N,).
            images: These images, normalised, (N, 3, H, W), in the same memory format in every call.

        Returns:
            For each level (N, C, h, w) or tokens (N, T, C), in the encoder's output dtype.
        """
        if len(index) == 0:  # a process without a share of the batch
            return list(self.encoder(images))
        channels_last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
        missing = np.flatnonzero(~self.is_cached[index])
        new_features: Sequence[Tensor] = []
        if len(missing):
            new_images = images if len(missing) == len(index) else _select_images(images, missing, channels_last)
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
                new_features = self.encoder(new_images)
            self._store(index[missing], new_features, channels_last)
        if len(missing) == len(index):
            return list(new_features)
        cached = np.flatnonzero(np.isin(np.arange(len(index)), missing, invert=True))
        cache_rows = _to_device(index[cached], images.device)
        batch_features = []
        for number, level in enumerate(self.levels):
            features = level.index_select(0, cache_rows)
            if len(missing):
                merged = torch.empty((len(index), *features.shape[1:]), dtype=features.dtype, device=features.device)
                merged.index_copy_(0, _to_device(cached, images.device), features)
                new_level = _to_storage_layout(new_features[number], channels_last)
                features = merged.index_copy_(0, _to_device(missing, images.device), new_level)
            batch_features.append(features.permute(0, 3, 1, 2) if channels_last and features.ndim == 4 else features)
        return batch_features

    def _store(self, index: NDArray[np.int64], features: Sequence[Tensor], channels_last: bool) -> None:
        """Store the features of the images at ``index`` that fit into the budget."""
        stored = [_to_storage_layout(level, channels_last) for level in features]
        if not self.levels:
            bytes_per_image = sum(level[0].nbytes for level in features)
            self.capacity = min(len(self.is_cached), self.budget // bytes_per_image)
            self.bytes = self.capacity * bytes_per_image
            self.levels = [torch.empty((self.capacity, *f.shape[1:]), dtype=f.dtype, device=f.device) for f in stored]
        fitting = np.flatnonzero(index < self.capacity)
        if len(fitting):
            cache_rows, batch_rows = (_to_device(rows, stored[0].device) for rows in (index[fitting], fitting))
            for level, new_level in zip(self.levels, stored, strict=True):
                level.index_copy_(0, cache_rows, new_level.index_select(0, batch_rows))
            self.is_cached[index[fitting]] = True


def _to_storage_layout(features: Tensor, channels_last: bool) -> Tensor:
    """Return features (N, C, h, w) as (N, h, w, C) if they are channels_last, so that each image is contiguous."""
    return features.permute(0, 2, 3, 1) if channels_last and features.ndim == 4 else features


def _select_images(images: Tensor, rows: NDArray[np.int64], channels_last: bool) -> Tensor:
    selected = images.index_select(0, _to_device(rows, images.device))
    return selected.contiguous(memory_format=torch.channels_last) if channels_last else selected


def _to_device(rows: NDArray[np.int64], device: torch.device) -> Tensor:
    return copy_to_device(torch.from_numpy(rows), device)
