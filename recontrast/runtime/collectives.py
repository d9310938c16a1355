"""Gathering tensors of unequal length from all processes."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def gather_shares(part: Tensor, shares: Sequence[int] | None) -> Tensor:
    """The parts of all processes, one behind the other, on each of them.

    Args:
        part: (n, ...), n being this process's share; on a device that the backend knows.
        shares: n of each process; None: there is one.

    Returns:
        (sum of n, ...), in the dtype of ``part``.
    """
    if shares is None:
        return part
    padded = part.new_zeros(max(shares), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in shares]
    dist.all_gather(parts, padded)
    return torch.cat([whole[:n] for whole, n in zip(parts, shares, strict=True)])


def resolve_shares(images: int, device: torch.device, given: Sequence[int] | None) -> Sequence[int] | None:
    """Images of each process: as given, or asked for (one small collective and, on CUDA, a wait); None if alone."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if given is not None:
        return given
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.full_like(counts[0], images))
    return [int(count) for count in counts]
