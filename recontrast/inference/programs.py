"""Programs in exported files: checked, loaded and run by ONNX Runtime, OpenVINO or torch.export.

There is one class for each file format. It checks the file before its runtime reads it, and maps a batch of images to
named output arrays. Everything runs on the CPU, in float32 unless the file is quantised or asks for bfloat16.
"""

import importlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from recontrast.inference.onnx_file import read_onnx
from recontrast.inference.openvino_file import get_core, read_openvino
from recontrast.inference.pt2_file import read_pt2
from recontrast.lazy_import import LazyModule
from recontrast.loggers import silence_loggers
from recontrast.runtime.thread_count import count_threads

if TYPE_CHECKING:
    import torch
else:
    torch = LazyModule("torch")

_CUDA = "CUDAExecutionProvider"  # of ONNX Runtime
INPUTS = ("image", "inside")  # the second one only of tiles with a region of interest
OUTPUTS = ("map", "score", "p_value", "defect")  # the last two only with a calibration

NamedArrays = dict[str, NDArray[Any]]


def name_inputs(images: NDArray[Any], inside: NDArray[np.bool_] | None = None) -> NamedArrays:
    """Name the inputs of a graph.

    Args:
        images: RGB images (N, H, W, 3), uint8, or float32 in [0, 1] with a window.
        inside: Whether each pixel is in the region of interest, (N, H, W) bool; None for a graph without this input.

    Returns:
        Arrays named as in `INPUTS`.
    """
    return dict(zip(INPUTS, (images,) if inside is None else (images, inside), strict=False))


class Program(Protocol):
    """Interface of a loaded file of any format.

    Attributes:
        description: Content of the description that `recontrast.export.export` stored in the file.
    """

    description: Mapping[str, Any]

    def __call__(self, images: NDArray[Any], inside: NDArray[np.bool_] | None = None) -> NamedArrays:
        """Run the network on a batch of images.

        Args:
            images: RGB images (N, H, W, 3), uint8, or float32 in [0, 1] with a window.
            inside: Whether each pixel is in the region of interest, (N, H, W) bool; None for a graph without this
                input.

        Returns:
            Arrays named as in `OUTPUTS`: map (N, height, width) and score (N,), float32, and with a calibration
            p_value (N,), float32, and defect (N,), bool.
        """


class DeviceError(ValueError):
    """A device that the runtime of a file cannot use."""


class OnnxProgram:
    """Program in an .onnx file, run by ONNX Runtime.

    Args:
        path: Path of the file.
        device: "cpu", or "cuda" or "cuda:1" for ONNX Runtime's CUDAExecutionProvider.

    Raises:
        DeviceError: If the installed ONNX Runtime cannot use the device.
        ValueError: If the file is damaged, or `recontrast export` did not write it.
        ImportError: If ONNX Runtime is not installed.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        onnxruntime = _import_runtime("onnxruntime")
        kind, _, index = device.partition(":")
        if kind == "cuda" and _CUDA not in (available := onnxruntime.get_available_providers()):
            raise DeviceError(
                f"{path}: wanted an ONNX Runtime with the {_CUDA} for device {device!r}, got one with "
                f"{', '.join(available)}: pip install onnxruntime-gpu"
            )
        providers: list[Any] = [] if kind == "cpu" else [(_CUDA, {"device_id": int(index or 0)})]
        content, self.description = read_onnx(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = count_threads()
        providers.append("CPUExecutionProvider")
        self._session = onnxruntime.InferenceSession(content, options, providers=providers)
        if kind == "cuda" and _CUDA not in self._session.get_providers():  # it goes on without it by itself
            raise DeviceError(
                f"{path}: wanted device {device!r}, got a {_CUDA} that does not start: its CUDA libraries are missing"
            )
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, images: NDArray[Any], inside: NDArray[np.bool_] | None = None) -> NamedArrays:
        """Run the network, see `Program`.

        Args:
            images: RGB images (N, H, W, 3), uint8, or float32 in [0, 1] with a window.
            inside: Whether each pixel is in the region of interest, (N, H, W) bool; None for a graph without this
                input.

        Returns:
            Arrays named as in `OUTPUTS`, with dtypes and shapes as in `Program`: float32 maps are (N, height, width).
        """
        return dict(zip(self._names, self._session.run(None, name_inputs(images, inside)), strict=True))


class OpenVinoProgram:
    """Program in an .xml file, with its weights in the .bin file beside it, run by OpenVINO.

    Args:
        path: Path of the .xml file.
        precision: "float32" or "bfloat16", in which it computes. None: as the file asks for.

    Raises:
        ValueError: If the file is damaged, `recontrast export` did not write it, or the .bin file holds other weights
            than those that were exported.
        ImportError: If OpenVINO is not installed.
    """

    def __init__(self, path: Path, precision: str | None = None) -> None:
        openvino = _import_runtime("openvino")
        content, self._weights, self.description = read_openvino(path)
        core = get_core()
        model = core.read_model(content, openvino.Tensor(self._weights) if len(self._weights) else b"")
        # Without the hint, OpenVINO computes in bfloat16 on processors that support it; without their instructions, it
        # ignores the hint of a file that asks for bfloat16.
        hint = "bf16" if (precision or self.description.get("precision")) == "bfloat16" else "f32"
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": count_threads()}
        self._model = core.compile_model(model, "CPU", settings)

    def __call__(self, images: NDArray[Any], inside: NDArray[np.bool_] | None = None) -> NamedArrays:
        """Run the network, see `Program`.

        Args:
            images: RGB images (N, H, W, 3), uint8, or float32 in [0, 1] with a window.
            inside: Whether each pixel is in the region of interest, (N, H, W) bool; None for a graph without this
                input.

        Returns:
            Arrays named as in `OUTPUTS`, with dtypes and shapes as in `Program`: float32 maps are (N, height, width).
        """
        results = self._model(name_inputs(images, inside))
        return {output.get_any_name(): np.array(results[output]) for output in self._model.outputs}


class TorchExportProgram:
    """Program in a .pt2 file, run by torch.export.

    Args:
        path: Path of the file.

    Raises:
        ValueError: If the file is damaged, or `recontrast export` did not write it.
        ImportError: If PyTorch is not installed.
    """

    def __init__(self, path: Path) -> None:
        _import_runtime("torch")
        archive, self.description = read_pt2(path)
        # Its lines hold tracebacks; what it raises is reported.
        with silence_loggers("torch.export", "torch._export", below=logging.CRITICAL + 1):
            program = torch.export.load(archive)
        self._module = program.module()

    def __call__(self, images: NDArray[Any], inside: NDArray[np.bool_] | None = None) -> NamedArrays:
        """Run the network, see `Program`.

        Args:
            images: RGB images (N, H, W, 3), uint8, or float32 in [0, 1] with a window.
            inside: Whether each pixel is in the region of interest, (N, H, W) bool; None for a graph without this
                input.

        Returns:
            Arrays named as in `OUTPUTS`, with dtypes and shapes as in `Program`: float32 maps are (N, height, width).
        """
        with torch.inference_mode():
            results = self._module(*map(torch.from_numpy, name_inputs(images, inside).values()))
        return {name: value.numpy() for name, value in zip(OUTPUTS, results, strict=False)}


# File suffix -> class that loads such a file.
PROGRAMS: dict[str, Any] = {".onnx": OnnxProgram, ".xml": OpenVinoProgram, ".pt2": TorchExportProgram}


def _import_runtime(name: str) -> Any:
    """Import an optional package; the error message gives the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"exported detector: wanted the package {name}, got none installed: pip install {name}"
        ) from error
