"""Where a model runs, in which memory layout, and how exact its convolutions are."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

# Devices on which a recipe that leaves the layout open gets channels_last: a step on a CPU takes 0.85 of the time with
# ResNet-18 and 0.5 with EfficientNet-Lite0, float32 and bfloat16 alike; on a GPU it is the layout of tensor cores.
CHANNELS_LAST = ("cpu", "cuda")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device that is asked for, or the GPU where there is one; refused where it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'device: wanted "cpu", "cuda" or "cuda:1", got {device!r}') from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: wanted one of {torch.cuda.device_count()} CUDA devices, got {device!r}")
    return chosen


def resolve_memory_format(device: torch.device, channels_last: bool | None) -> torch.memory_format:
    """Layout of images and weights: as asked for, or with None the faster one on ``device``."""
    last = device.type in CHANNELS_LAST if channels_last is None else channels_last
    return torch.channels_last if last else torch.contiguous_format


def move_model(model: nn.Module, device: torch.device, channels_last: bool | None = None) -> torch.memory_format:
    """Move ``model`` to ``device``, in the layout of `resolve_memory_format`, which is returned."""
    layout = resolve_memory_format(device, channels_last)
    model.to(device).to(memory_format=layout)  # type: ignore[call-overload]
    return layout


def is_bfloat16_fast(device: torch.device) -> bool:
    """Whether ``device`` has kernels for bfloat16; a CPU without AVX-512 takes several times as long as in float32."""
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def trim_memory() -> None:
    """Give memory that was freed back to the system, beside which a large image must find room.

    glibc keeps hundreds of MB of it; where there is no glibc nothing happens.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass


@contextmanager
def convolution_precision(tf32: bool) -> Iterator[None]:
    """Run float32 convolutions in TF32 or in full float32, and restore the former setting afterwards.

    TF32 keeps 10 bits of the mantissa and takes the tensor cores of an NVIDIA GPU since Ampere; elsewhere this changes
    nothing. The setting belongs to the process: other threads see it while it holds. Matrix products are left as they
    are (full float32 by default), and neither sums, loss nor map depend on it.
    """
    kind = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, wanted = kind.fp32_precision, "tf32" if tf32 else "ieee"
    kind.fp32_precision = wanted
    try:
        yield
    finally:
        kind.fp32_precision = before
