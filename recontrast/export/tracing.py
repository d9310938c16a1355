"""Tracing of a graph by `torch.export`, for any number of images of any size."""

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from recontrast.loggers import silence_loggers


def trace_images(
    module: nn.Module, size: tuple[int, int], dtype: torch.dtype = torch.uint8, *, is_fixed: bool = False,
    batch: int | None = None, has_masks: bool = False,
) -> torch.export.ExportedProgram:  # fmt: skip
    """Trace a module that takes images.

    Args:
        module: Module with the input (N, H, W, 3), and masks (N, H, W) if it has them.
        size: Height and width to which the module resizes the images, in pixels.
        dtype: Dtype of the input.
        is_fixed: Whether images have this size already, as tiles do.
        batch: Number of images, N; None for any number.
        has_masks: Whether the module takes a mask, bool, with each image.

    Returns:
        Program with dynamic N unless it is given, and with dynamic H and W unless the size is fixed.
    """
    any_length, same = torch.export.Dim.DYNAMIC, torch.export.Dim.STATIC
    height, width = size if is_fixed else (size[0] + 3, size[1] + 5)
    examples: tuple[torch.Tensor, ...] = (torch.zeros(batch or 2, height, width, 3, dtype=dtype),)
    side = same if is_fixed else any_length
    lengths: tuple[tuple[Any, ...], ...] = ((same if batch else any_length, side, side, same),)
    if has_masks:
        examples += (torch.ones(examples[0].shape[:3], dtype=torch.bool),)
        lengths += (lengths[0][:3],)
    with torch.no_grad():
        return torch.export.export(module, examples, dynamic_shapes=lengths)


@contextmanager
def pause_collection() -> Iterator[None]:
    """Pause the search for unused cycles among the many objects of a graph, which takes a quarter of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def silence_exporters() -> Iterator[None]:
    """Suppress log lines and deprecation warnings of the exporters; the exported file itself is checked."""
    with warnings.catch_warnings(), silence_loggers("torch.onnx", "onnxscript", "torch.export"):
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
        yield
