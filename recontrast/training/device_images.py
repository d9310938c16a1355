"""Batches of decoded images on the device: from device memory if all images fit, else copied for each batch."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recontrast.data.sources import Images

# Share of the GPU's free memory before training; a category needs far less (the largest of MVTec AD: 77 MB at 256 px).
SHARE = 0.25
CHUNK_BYTES = 2**26  # of one copy to the device


class DeviceImages:
    """Decoded images whose batches are indexed on the device, without waiting for it.

    Args:
        images: Decoded images, (n, H, W, 3), uint8 or float32, for example an `ImageCache`.
        device: Device of the batches.
        budget: Memory for images on the device, bytes. None: `SHARE` of the free memory on a GPU, 0 elsewhere.
    """

    def __init__(self, images: Images, device: torch.device, budget: int | None = None) -> None:
        self.images, self.device = images, device
        self._resident_images: Tensor | None = None
        if budget is None:
            budget = int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0
        first = images[np.arange(1)]
        if 0 < len(images) * first.nbytes <= budget:
            self._resident_images = torch.empty(
                (len(images), *first.shape[1:]), dtype=torch.from_numpy(first).dtype, device=device
            )
            step = max(1, CHUNK_BYTES // first.nbytes)
            for start in range(0, len(images), step):
                chunk = images[np.arange(start, min(start + step, len(images)))]
                self._resident_images[start : start + len(chunk)].copy_(torch.from_numpy(chunk))

    @property
    def resident(self) -> bool:
        """Whether all images are stored on the device."""
        return self._resident_images is not None

    def __getitem__(self, index: NDArray[Any]) -> Tensor:
        """Images at ``index`` (n,), (n, H, W, 3), of the dtype of the images, on the device."""
        if self._resident_images is not None:
            return self._resident_images.index_select(0, self._to_device(torch.from_numpy(np.asarray(index, np.int64))))
        return self._to_device(torch.from_numpy(np.ascontiguousarray(self.images[index])))

    def _to_device(self, t: Tensor) -> Tensor:
        """Copy to the device; on CUDA from pinned memory, which does not wait."""
        return t.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else t.to(self.device)
