"""Exported files: what is in them, and running one (ONNX Runtime, OpenVINO or torch.export) as any other detector.

Each kind is one class with two things: ``about``, the text that `recontrast.export.export` put into the file, and a
call from bytes of images to named arrays. All run on the CPU, in float32.
"""

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from recontrast.calibration.conformal import Calibration
from recontrast.data.image_files import ImageFiles
from recontrast.data.pillow_resize import max_exact_length
from recontrast.recipes.recipe import Recipe, to_pair

FORMAT = 1  # raised when inputs, outputs or the text about them change their meaning
KEY = "recontrast"  # under it lies the text
WEIGHTS = "recontrast_weights"  # of OpenVINO: SHA-256 of the .bin
INSTALL = "pip install 'recontrast[export]'"
AHEAD = 4  # images decoded at once, in full size
PIXELS = 2**23  # of one call, unless one image has more: the graph holds them as floats, several times

Named = dict[str, NDArray[Any]]


class Program(Protocol):
    """A file of one kind, opened."""

    about: str | None  # what we wrote into it; None: it is none of ours

    def __call__(self, images: NDArray[np.uint8]) -> Named:
        """(N, H, W, 3) to all outputs by name."""


class Onnx:
    """A .onnx file in ONNX Runtime."""

    def __init__(self, path: Path) -> None:
        ort = _need("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self._session = ort.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        self.about = self._session.get_modelmeta().custom_metadata_map.get(KEY)
        self._names = [output.name for output in self._session.get_outputs()]

    def __call__(self, images: NDArray[np.uint8]) -> Named:
        """See `Program`."""
        return dict(zip(self._names, self._session.run(None, {"image": images}), strict=True))


class OpenVino:
    """An .xml file, with its .bin beside it, in OpenVINO."""

    def __init__(self, path: Path) -> None:
        openvino = _need("openvino")
        core = openvino.Core()
        model = core.read_model(path)
        self.about = str(model.get_rt_info(KEY).value) if model.has_rt_info(KEY) else None
        weights = path.with_suffix(".bin")
        if self.about is not None and str(model.get_rt_info(WEIGHTS).value) != checksum(weights):
            raise ValueError(f"{weights} holds other weights than it was exported with")
        # Some processors would be given bfloat16 otherwise.
        limits = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self._model = core.compile_model(model, "CPU", limits)

    def __call__(self, images: NDArray[np.uint8]) -> Named:
        """See `Program`."""
        found = self._model(images)
        return {output.get_any_name(): np.array(found[output]) for output in self._model.outputs}


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


class Pt2:
    """A .pt2 file of torch.export."""

    def __init__(self, path: Path) -> None:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no archive")  # torch logs a traceback otherwise
        extra = {f"{KEY}.json": ""}
        program = torch.export.load(path, extra_files=extra)
        text: Any = extra[f"{KEY}.json"]
        self.about = (text.decode() if isinstance(text, bytes) else text) or None
        self._module = program.module()

    def __call__(self, images: NDArray[np.uint8]) -> Named:
        """See `Program`."""
        with torch.inference_mode():
            found = self._module(torch.from_numpy(images))
        return {name: value.numpy() for name, value in zip(OUTPUTS, found, strict=False)}


KINDS: dict[str, Any] = {".onnx": Onnx, ".xml": OpenVino, ".pt2": Pt2}  # by suffix


class ExportedDetector:
    """A `recontrast.inference.detector.Detector` in a file that `recontrast export` wrote.

    Args:
        path: .onnx, .pt2 or .xml.
        device: None or "cpu".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is none of ours, is damaged, or was written by another version of this format; another device.
        ImportError: its runtime is not installed.
    """

    def __init__(self, path: Path, device: str | torch.device | None = None) -> None:
        if device is not None and torch.device(device).type != "cpu":
            raise ValueError(f"{path}: wanted the CPU for an exported detector, got device {str(device)!r}")
        if not path.is_file():
            raise FileNotFoundError(f"{path}: wanted an exported detector, got no such file")
        try:
            self.program: Program = KINDS[path.suffix.lower()](path)
        except ImportError:
            raise
        except Exception as error:  # each runtime has its own kinds
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(
                f"{path}: wanted a whole {path.suffix} file, got one that does not load: {reason}"
            ) from error
        about = _about(path, self.program.about)
        self.path, self.about, found = path, about, about["calibration"]
        try:
            self.recipe = Recipe.from_dict(about["recipe"])
            self.calibration = None if found is None else Calibration.from_dict(found)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error
        self.category, self.top = str(about["category"]), float(about["top"])

    def run(self, files: ImageFiles, batch: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Maps and scores of all ``files`` in their order; images of one size that follow each other go together."""
        group: list[NDArray[np.uint8]] = []
        for start in range(0, len(files), AHEAD):
            places = range(start, min(start + AHEAD, len(files)))
            for place, image in zip(places, files.read_many(places), strict=True):
                seen = self._whole(files, place, image)
                room = min(batch, max(PIXELS // (seen.shape[0] * seen.shape[1]), 1))
                if group and (len(group) >= room or group[0].shape != seen.shape):
                    yield self._scored(group)
                    group = []
                group.append(seen)
        if group:
            yield self._scored(group)

    def _scored(self, group: list[NDArray[np.uint8]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        found = self.program(np.stack(group))
        return found["map"], found["score"]

    def _whole(self, files: ImageFiles, place: int, image: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        """An image that the graph can take: black in place of what cannot be read, or is too large."""
        size = to_pair(self.recipe.size)
        if image is None:
            return np.zeros((*size, 3), np.uint8)
        most = max_exact_length(size[0]), max_exact_length(size[1])
        if image.shape[0] <= most[0] and image.shape[1] <= most[1]:
            return image
        files.errors[place] = (
            f"{files.paths[place]}: wanted an image that the resize of an exported detector reproduces, of at most "
            f"{most[0]} x {most[1]} px (height x width), got {image.shape[0]} x {image.shape[1]}"
        )
        return np.zeros((*size, 3), np.uint8)


def _about(path: Path, text: str | None) -> Mapping[str, Any]:
    """What the file says of itself, checked."""
    if text is None:
        raise ValueError(f"{path}: wanted a file that recontrast export wrote, got one of another origin")
    try:
        about = json.loads(text)
        found, version = about["format"], about["recontrast"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: wanted a file that recontrast export wrote, got one with a damaged description"
        ) from error
    if found != FORMAT:
        raise ValueError(
            f"{path}: wanted an exported detector of format {FORMAT}, got format {found}, written by recontrast "
            f"{version}: export it anew"
        )
    if missing := [key for key in ("recipe", "calibration", "category", "top") if key not in about]:
        raise ValueError(f"{path}: the description of the exported detector lacks {', '.join(missing)}")
    return about


def _need(name: str) -> Any:
    """A package that not everybody has."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name}: {INSTALL}") from error


OUTPUTS = ("map", "score", "p_value", "defect")  # the last two where there is a calibration
