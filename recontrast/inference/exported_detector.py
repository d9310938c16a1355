"""Detectors in exported files, run by ONNX Runtime, OpenVINO or torch.export.

There is one class for each file format. It loads the file, returns the description that `recontrast.export.export`
stored in it, and maps a batch of images to named output arrays. Everything runs on the CPU in float32.
"""

import hashlib
import importlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from recontrast.calibration.conformal import Calibration
from recontrast.data.image_files import ImageFiles
from recontrast.data.pillow_resize import max_exact_length
from recontrast.inference.prediction import Predictions, predict
from recontrast.recipes.recipe import Recipe, to_pair
from recontrast.runtime.device import resolve_device

FORMAT = 1  # increased when inputs, outputs or the description change their meaning
KEY = "recontrast"  # metadata key of the description
WEIGHTS_KEY = "recontrast_weights"  # metadata key of the SHA-256 of the .bin file, in OpenVINO files
OUTPUTS = ("map", "score", "p_value", "defect")  # the last two only with a calibration
DECODED_AHEAD = 4  # images in memory at their original size
PIXELS_PER_CALL = 2**23  # the graph holds several float copies of its input; a single image may be larger

NamedArrays = dict[str, NDArray[Any]]


def compute_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file.

    Args:
        path: Path of the file.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Program(Protocol):
    """Interface of a loaded file of any format.

    Attributes:
        description: Text that `recontrast.export.export` stored in the file; None if there is none.
    """

    description: str | None

    def __call__(self, images: NDArray[np.uint8]) -> NamedArrays:
        """Run the network on a batch of images.

        Args:
            images: Images (N, H, W, 3), uint8, RGB.

        Returns:
            Arrays named as in `OUTPUTS`: map (N, height, width) and score (N,), float32, and with a calibration
            p_value (N,), float32, and defect (N,), bool.
        """


class OnnxProgram:
    """Program in an .onnx file, run by ONNX Runtime.

    Args:
        path: Path of the file.

    Raises:
        ImportError: If ONNX Runtime is not installed.
    """

    def __init__(self, path: Path) -> None:
        onnxruntime = _import_runtime("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        self.description: str | None = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, images: NDArray[np.uint8]) -> NamedArrays:
        """Run the network, see `Program`.

        Args:
            images: Images (N, H, W, 3), uint8, RGB.

        Returns:
            Arrays named as in `OUTPUTS`, with dtypes and shapes as in `Program`: float32 maps are (N, height, width).
        """
        return dict(zip(self._names, self._session.run(None, {"image": images}), strict=True))


class OpenVinoProgram:
    """Program in an .xml file, with its weights in the .bin file beside it, run by OpenVINO.

    Args:
        path: Path of the .xml file.

    Raises:
        ValueError: If the .bin file holds other weights than those that were exported.
        ImportError: If OpenVINO is not installed.
    """

    def __init__(self, path: Path) -> None:
        openvino = _import_runtime("openvino")
        core = openvino.Core()
        model = core.read_model(path)
        self.description: str | None = str(model.get_rt_info(KEY).value) if model.has_rt_info(KEY) else None
        weights = path.with_suffix(".bin")
        if self.description is not None and str(model.get_rt_info(WEIGHTS_KEY).value) != compute_sha256(weights):
            raise ValueError(f"{weights} holds other weights than it was exported with")
        # Without the hint, OpenVINO computes in bfloat16 on processors that support it.
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self._model = core.compile_model(model, "CPU", settings)

    def __call__(self, images: NDArray[np.uint8]) -> NamedArrays:
        """Run the network, see `Program`.

        Args:
            images: Images (N, H, W, 3), uint8, RGB.

        Returns:
            Arrays named as in `OUTPUTS`, with dtypes and shapes as in `Program`: float32 maps are (N, height, width).
        """
        results = self._model(images)
        return {output.get_any_name(): np.array(results[output]) for output in self._model.outputs}


class TorchExportProgram:
    """Program in a .pt2 file, run by torch.export.

    Args:
        path: Path of the file.

    Raises:
        ValueError: If the file is not an archive.
    """

    def __init__(self, path: Path) -> None:
        if not zipfile.is_zipfile(path):
            raise ValueError("the file is not an archive")  # torch would log a traceback
        extra = {f"{KEY}.json": ""}
        program = torch.export.load(path, extra_files=extra)
        text: Any = extra[f"{KEY}.json"]
        self.description: str | None = (text.decode() if isinstance(text, bytes) else text) or None
        self._module = program.module()

    def __call__(self, images: NDArray[np.uint8]) -> NamedArrays:
        """Run the network, see `Program`.

        Args:
            images: Images (N, H, W, 3), uint8, RGB.

        Returns:
            Arrays named as in `OUTPUTS`, with dtypes and shapes as in `Program`: float32 maps are (N, height, width).
        """
        with torch.inference_mode():
            results = self._module(torch.from_numpy(images))
        return {name: value.numpy() for name, value in zip(OUTPUTS, results, strict=False)}


# File suffix -> class that loads such a file.
PROGRAMS: dict[str, Any] = {".onnx": OnnxProgram, ".xml": OpenVinoProgram, ".pt2": TorchExportProgram}


class ExportedDetector:
    """Detector in a file that `recontrast export` wrote; it follows `recontrast.inference.detector.Detector`.

    Args:
        path: Path of the .onnx, .pt2 or .xml file.
        device: None or the CPU; other devices are not supported.

    Attributes:
        program: Loaded program, for direct calls with arrays of images.
        description: Content of the stored description: recipe, preprocessing, calibration, digest of the weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file was not written by `recontrast export`, is damaged, or has another format version, or
            if the device is not the CPU.
        ImportError: If the runtime of the file is not installed.
    """

    def __init__(self, path: Path, device: str | torch.device | None = None) -> None:
        if device is not None and resolve_device(device).type != "cpu":
            raise ValueError(f"{path}: wanted the CPU for an exported detector, got device {str(device)!r}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: wanted an exported detector, got no such file")
        try:
            self.program: Program = PROGRAMS[path.suffix.lower()](path)
        except ImportError:
            raise
        except Exception as error:  # each runtime raises exceptions of its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(
                f"{path}: wanted a whole {path.suffix} file, got one that does not load: {reason}"
            ) from error
        self.description = description = _parse_description(path, self.program.description)
        self.path = path
        self.calibration: Calibration | None = None
        try:
            self.recipe = Recipe.from_dict(description["recipe"])
            if description["calibration"] is not None:
                self.calibration = Calibration.from_dict(description["calibration"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        self.category, self.max_map_value = str(description["category"]), float(description["top"])
        self.calibration_note: str | None = None
        self.overlap: int | None = None

    def run(self, files: ImageFiles, batch: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Compute maps and scores; consecutive images of the same size share a batch.

        Args:
            files: Images to score.
            batch: Largest number of images per batch.

        Yields:
            Maps (N, H, W) and scores (N,), float32, in the order of the files.
        """
        group: list[NDArray[np.uint8]] = []
        for start in range(0, len(files), DECODED_AHEAD):
            indices = range(start, min(start + DECODED_AHEAD, len(files)))
            for index, decoded in zip(indices, files.read_many(indices, self.recipe.bits), strict=True):
                image = self._replace_unusable(files, index, decoded)
                limit = min(batch, max(PIXELS_PER_CALL // (image.shape[0] * image.shape[1]), 1))
                if group and (len(group) >= limit or group[0].shape != image.shape):
                    yield self._score(group)
                    group = []
                group.append(image)
        if group:
            yield self._score(group)

    def predict(
        self, images: Any, *, false_alarm_rate: float | None = None, batch: int = 16,
        errors: Literal["raise", "keep"] = "raise",
    ) -> Predictions:  # fmt: skip
        """Score images, and call each good or a defect if the detector is calibrated, see `Detector.predict`.

        Args:
            images: One image or several: paths, folders, PIL images or arrays.
            false_alarm_rate: Promised share of good images called defects. None: the rate of the calibration.
            batch: Largest number of images per call of the runtime.
            errors: "raise" stops at an image that cannot be read; "keep" gives it a prediction with an ``error``.

        Returns:
            One prediction for each image, in the order of the images.

        Raises:
            ValueError: If an image is of another type or cannot be read, or the calibration is missing or too small for
                the rate.
            FileNotFoundError: If a path does not exist.
        """
        return predict(self, images, false_alarm_rate=false_alarm_rate, batch=batch, errors=errors)

    def _score(self, group: list[NDArray[np.uint8]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        results = self.program(np.stack(group))
        return results["map"], results["score"]

    def _replace_unusable(self, files: ImageFiles, index: int, image: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        """Return ``image``, or a black image if it could not be read or is too large for the graph."""
        size = to_pair(self.recipe.size)
        if image is None:
            return np.zeros((*size, 3), np.uint8)
        limit = max_exact_length(size[0]), max_exact_length(size[1])
        if image.shape[0] <= limit[0] and image.shape[1] <= limit[1]:
            return image
        files.errors[index] = (
            f"{files.paths[index]}: wanted an image that the resize of an exported detector reproduces, of at most "
            f"{limit[0]} x {limit[1]} px (height x width), got {image.shape[0]} x {image.shape[1]}"
        )
        return np.zeros((*size, 3), np.uint8)


def _parse_description(path: Path, text: str | None) -> Mapping[str, Any]:
    """Parse and check the description in a file."""
    if text is None:
        raise ValueError(f"{path}: wanted a file that recontrast export wrote, got one of another origin")
    try:
        description = json.loads(text)
        file_format, version = description["format"], description["recontrast"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: wanted a file that recontrast export wrote, got one with a damaged description"
        ) from error
    if file_format != FORMAT:
        raise ValueError(
            f"{path}: wanted an exported detector of format {FORMAT}, got format {file_format}, written by recontrast "
            f"{version}: export it again"
        )
    if missing := [key for key in ("recipe", "calibration", "category", "top") if key not in description]:
        raise ValueError(f"{path}: the description of the exported detector lacks {', '.join(missing)}")
    return description


def _import_runtime(name: str) -> Any:
    """Import an optional package; the error message gives the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"exported detector: wanted the package {name}, got none installed: pip install {name}"
        ) from error
