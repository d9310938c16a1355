"""Convert batches of images to network input."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

__all__ = ["normalise"]


def normalise(
    batch: torch.Tensor | np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> torch.Tensor:
    """Normalise a batch of images: (x / 255 - mean) / std, bit-identical to torchvision's ToTensor and Normalize.

    Images that were scaled by a window are in [0, 1] already and are not divided by 255.

    Args:
        batch: Images, (N, H, W, 3), uint8, or float32 in [0, 1].
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel, in [0, 1].
        device: Device of the result; the batch is moved there first. None keeps the device of the batch.
        dtype: Dtype of the result; the computation is in float32.
        channels_last: Whether the result is in channels-last memory format, which needs no reordering.

    Returns:
        (N, 3, H, W), in ``dtype``.

    Raises:
        ValueError: If ``batch`` has another shape or dtype.
    """
    if isinstance(batch, np.ndarray):
        batch = torch.from_numpy(np.require(batch, requirements=["C", "W"]))
    if batch.dtype not in (torch.uint8, torch.float32) or batch.ndim != 4 or batch.shape[3] != 3:
        wanted = "uint8 or float32 (N, H, W, 3)"
        raise ValueError(f"normalise: batch: wanted {wanted}, got {batch.dtype} {tuple(batch.shape)}")
    n, height, width, _ = batch.shape
    batch = batch.to(device or batch.device)
    rows = batch.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    full, centre, scale = _build_normalisation(tuple(mean), tuple(std), width, rows.device)
    rows = rows.view(n * height, width * 3)
    if batch.dtype == torch.uint8:
        rows.div_(full)
    rows.sub_(centre).div_(scale)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return rows.view(n, height, width, 3).permute(0, 3, 1, 2).to(dtype, memory_format=layout)


@lru_cache(maxsize=16)  # copying them to the device for each batch would block
def _build_normalisation(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[torch.Tensor, ...]:
    """Return 255, mean and std repeated for each value of a row of pixels, each (width * 3,) float32.

    Broadcasting over whole rows is faster than broadcasting (3, 1, 1) over channels-last pixels. 255 is a tensor too,
    because CUDA replaces division by a Python number by multiplication, which rounds differently.
    """
    with torch.inference_mode(False):  # the cached tensors must also work in training
        return tuple(torch.tensor(v, device=device).repeat(width) for v in ((255.0,) * 3, mean, std))
