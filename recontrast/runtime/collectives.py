"""Gathering of tensors whose first dimension differs between processes."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def gather_shares(part: Tensor, shares: Sequence[int] | None) -> Tensor:
    """Concatenate the parts of all processes, on every process.

    Args:
        part: Part of this process, (n, ...), on a device that the backend supports.
        shares: n of each process, in the order of ranks; None for a single process.

    Returns:
        (sum of n, ...), in the dtype of ``part``.
    """
    if shares is None:
        return part
    padded = part.new_zeros(max(shares), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded)
    return torch.cat([padded_part[:n] for padded_part, n in zip(parts, shares, strict=True)])


def resolve_shares(count: int, device: torch.device, shares: Sequence[int] | None) -> Sequence[int] | None:
    """Return the number of images in each process.

    Args:
        count: Number of images in this process.
        device: Device that the backend supports.
        shares: Known numbers, which are returned. None gathers them, by a small collective that on CUDA waits for the
            device.

    Returns:
        The number of images in each process, in the order of ranks; None for a single process.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if shares is not None:
        return shares
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.full_like(counts[0], count))
    return [int(process_count) for process_count in counts]
