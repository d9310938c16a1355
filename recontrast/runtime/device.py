"""Device and memory format."""

import ctypes
import platform
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Device types on which channels_last is the default. On a CPU it reduces the duration of a step to 0.85 with ResNet-18
# and to 0.5 with EfficientNet-Lite0, in float32 and bfloat16 alike; on a GPU it is the native format of tensor cores.
CHANNELS_LAST = ("cpu", "cuda")


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the given device, or by default the CUDA GPU if there is one, else the CPU.

    Apple's "mps" must be given by name, because this package has only run on a simulation of it.

    Args:
        device: Device, or None for the default.

    Returns:
        The device.

    Raises:
        ValueError: If the device is unknown or this machine does not have it.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = 'device: wanted "cpu", "cuda", "cuda:1" or "mps"'
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{wanted}, got {str(device)!r}") from error
    count = _count_devices(resolved.type)
    if count is None:
        raise ValueError(f"{wanted}, got {str(device)!r}, which cannot run this model")
    if (resolved.index or 0) >= count:
        raise ValueError(f"device: wanted one of this machine's devices ({_list_devices()}), got {str(device)!r}")
    return resolved


def _list_devices() -> str:
    names = [f"{kind}:{index}" for kind in ("cuda", "mps", "xpu") for index in range(_count_devices(kind) or 0)]
    return ", ".join(["cpu", *names])


def _count_devices(kind: str) -> int | None:
    """Return the number of devices of a type on this machine; None for types that do not compute, such as "meta"."""
    if kind == "cpu":
        return 1
    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind not in ("mps", "xpu"):
        return None
    if not torch.accelerator.is_available():  # before torch 2.7, looking up the accelerator would be an error
        return 0
    accelerator = torch.accelerator.current_accelerator()
    return torch.accelerator.device_count() if accelerator is not None and accelerator.type == kind else 0


def resolve_memory_format(device: torch.device, channels_last: bool | None) -> torch.memory_format:
    """Return the memory format of images and weights.

    Args:
        device: Device of the model.
        channels_last: Whether to use channels_last; None uses it on the devices where it is faster.

    Returns:
        ``torch.channels_last`` or ``torch.contiguous_format``.
    """
    if channels_last is None:
        channels_last = device.type in CHANNELS_LAST
    return torch.channels_last if channels_last else torch.contiguous_format


def move_model(model: nn.Module, device: torch.device, channels_last: bool | None = None) -> torch.memory_format:
    """Move a model to a device and convert its weights to the memory format of `resolve_memory_format`.

    Args:
        model: Model, changed in place.
        device: Device to move to.
        channels_last: Whether to use channels_last; None uses it on the devices where it is faster.

    Returns:
        The memory format.
    """
    memory_format = resolve_memory_format(device, channels_last)
    model.to(device).to(memory_format=memory_format)  # type: ignore[call-overload]
    return memory_format


def copy_to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device, on CUDA without waiting for the copy.

    On Apple's "mps" it waits: PyTorch's tracker has open reports of copies there that read memory already released.

    Args:
        values: Tensor of any shape and dtype.
        device: Device to copy to.

    Returns:
        The tensor on the device; itself if it is there.
    """
    return values.to(device, non_blocking=device.type != "mps")


def synchronize(device: torch.device) -> None:
    """Wait until a device has computed everything; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def get_random_states(device: torch.device) -> dict[str, Tensor | None]:
    """Return the states of the random generators of a run on a device.

    Args:
        device: Device of the run.

    Returns:
        States by "torch", the generator of the CPU, and by the type of a device that has its own: (n,) uint8. "cuda" is
        None on other devices.
    """
    states = {"torch": torch.get_rng_state(), "cuda": None}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Restore states of `get_random_states`; a device without a stored one keeps its own.

    Args:
        states: States by name. Others are ignored.
        device: Device of the run.
    """
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and states.get("mps") is not None:
        torch.mps.set_rng_state(states["mps"])


def is_bfloat16_fast(device: torch.device) -> bool:
    """Return whether ``device`` has bfloat16 kernels; without them, a CPU is several times slower than in float32."""
    if device.type != "cpu" or platform.machine() not in ("x86_64", "AMD64"):
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def trim_memory() -> None:
    """Return freed memory to the operating system; glibc would keep hundreds of MB. Without glibc, do nothing."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass
