"""Batches of decoded images on the device: all of them kept there where they fit, else sent batch by batch."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recontrast.data.sources import Images

# Of the GPU's free memory before training; a category takes far less (MVTec AD's largest: 77 MB at 256 px).
SHARE = 0.25


class DeviceImages:
    """Takes batches of ``images`` by index; nothing waits for the device.

    Args:
        images: (n, H, W, 3) uint8, such as `ImageCache`.
        device: where the batches are wanted.
        budget: bytes that may be kept there. None: `SHARE` of what is free on a GPU, nothing elsewhere.

    Attributes:
        resident: whether the images are kept on the device.
    """

    def __init__(self, images: Images, device: torch.device, budget: int | None = None) -> None:
        self.images, self.device = images, device
        self.kept: Tensor | None = None
        if budget is None:
            budget = int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0
        one = images[np.arange(1)]
        if 0 < len(images) * one.nbytes <= budget:
            self.kept = torch.empty((len(images), *one.shape[1:]), dtype=torch.uint8, device=device)
            step = max(1, 2**26 // one.nbytes)  # pieces of 64 MB
            for start in range(0, len(images), step):
                part = images[np.arange(start, min(start + step, len(images)))]
                self.kept[start : start + len(part)].copy_(torch.from_numpy(part))

    @property
    def resident(self) -> bool:
        """Whether the images are kept on the device."""
        return self.kept is not None

    def __getitem__(self, index: NDArray[Any]) -> Tensor:
        """The images of ``index``, (n, H, W, 3) uint8, on the device."""
        if self.kept is not None:
            return self.kept.index_select(0, self._send(torch.from_numpy(np.asarray(index, np.int64))))
        return self._send(torch.from_numpy(np.ascontiguousarray(self.images[index])))

    def _send(self, t: Tensor) -> Tensor:
        """Without a wait: CUDA copies from pinned memory by itself."""
        return t.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else t.to(self.device)
