"""Computations that Apple's device "mps" lacks, on the CPU there; on every other device they stay where they are.

It has no float64. Its adaptive pooling takes windows of one size, as where the points divide the pixels evenly; for
other sizes it raises an error, or up to torch 2.13 returns other values without one.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def has_float64(device: "torch.device") -> bool:
    """Return whether tensors on a device can be float64."""
    return device.type != "mps"


def to_float64(values: "Tensor") -> "Tensor":
    """Convert to float64, on the CPU where the device has no float64.

    Args:
        values: Tensor of any shape and dtype, on any device.

    Returns:
        The values in float64, on their device or on the CPU.
    """
    return (values if has_float64(values.device) else values.cpu()).double()


def pool_adaptively(pool: Callable[[Any, Any], Any], values: "Tensor", size: Sequence[int]) -> "Tensor":
    """Pool with windows that cover the values evenly, on the CPU where the device has windows of one size alone.

    Args:
        pool: Function of PyTorch, such as `torch.nn.functional.adaptive_max_pool2d`.
        values: Values (N, C, ...), floating point, on any device.
        size: Size of the result for each of the last axes.

    Returns:
        Values of the given size, on the device of ``values``.
    """
    if values.device.type == "mps":
        lengths = values.shape[values.ndim - len(size) :]
        if any(length % count for length, count in zip(lengths, size, strict=True)):
            return pool(values.cpu(), size).to(values.device)
    return pool(values, size)
