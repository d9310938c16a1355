"""Choice of cuDNN's algorithms by measurement."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def tuned_convolutions(tuned: bool) -> Iterator[None]:
    """Let cuDNN time its algorithms within a block, and restore the previous setting afterwards.

    cuDNN then times them in the first convolution of each shape and keeps the fastest (``torch.backends.cudnn.
    benchmark``), which pays where shapes repeat. On devices other than CUDA it has no effect.

    Args:
        tuned: Whether to time them. False leaves the setting as the caller has it.
    """
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or tuned
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
