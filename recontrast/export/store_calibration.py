"""A calibration is stored in an exported file: in its description, and in the graph that makes its decisions."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recontrast.calibration.conformal import Calibration
from recontrast.checkpoint.fields import parse_recipe
from recontrast.data.atomic import replace_files
from recontrast.data.locks import lock_file
from recontrast.data.sidecar import SUFFIX, compute_sha256
from recontrast.export.decisions import (
    DecidedProgram,
    list_files,
    replace_onnx_decisions,
    replace_openvino_decisions,
)
from recontrast.export.tracing import pause_collection, silence_exporters, trace_images
from recontrast.export.verify import check_decisions
from recontrast.export.write_files import write_onnx, write_openvino, write_pt2
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.inference.onnx_file import read_onnx
from recontrast.inference.openvino_file import get_core, read_openvino
from recontrast.inference.pt2_file import read_pt2
from recontrast.recipes.recipe import to_pair


def store_calibration(path: Path, calibration: Calibration) -> Path:
    """Store a calibration in an exported file, which then decides by it. On failure nothing is changed.

    A detector of tiles or of views keeps its graph, whose scores are those of tiles or views: only its description
    changes.
    The new file is opened by its runtime and compared with the calibration before it replaces the old one; for
    OpenVINO, .xml and .bin are replaced together, and a ``.sha256`` file beside a file is written anew.

    Args:
        path: Path of the .onnx, .xml or .pt2 file.
        calibration: Calibration of the file's own scores.

    Returns:
        The path.

    Raises:
        ValueError: If the file was not written by `recontrast export`, is damaged, holds other weights than those of
            the calibration, or cannot hold the decisions.
        ImportError: If a package that writes the format is not installed.
        OSError: If a file cannot be read or written.
    """
    with lock_file(path):
        writer = {".onnx": _rewrite_onnx, ".xml": _rewrite_openvino, ".pt2": _rewrite_pt2}[path.suffix.lower()]
        with replace_files(path.absolute().parent) as staging:
            try:
                writer(path, staging / path.name, calibration)
            except ModuleNotFoundError as error:
                raise ImportError(
                    f"{path}: wanted the package {error.name} to store a calibration in it, got none installed: "
                    f"pip install {error.name}"
                ) from error
            except RuntimeError as error:  # of torch.export, ONNX and OpenVINO
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise ValueError(f"{path}: wanted a file that can hold a calibration, got one that cannot: {reason}"
                                 ) from error  # fmt: skip
            detector = ExportedDetector(staging / path.name)
            if not detector.recipe.joins_maps:  # else the graph makes no decisions
                check_decisions(detector, calibration)
            for file in list_files(path):
                sidecar = file.name + SUFFIX
                if file.with_name(sidecar).exists():
                    (staging / sidecar).write_text(f"{compute_sha256(staging / file.name)}  {file.name}\n")
    return path


def _describe(description: Mapping[str, Any], calibration: Calibration, path: Path) -> str:
    """Return the description with a calibration, as JSON."""
    weights = description.get("weights", "")
    if calibration.weights != weights:
        raise ValueError(
            f"{path}: wanted a calibration of its weights ({str(weights)[:12]}), got one of others "
            f"({calibration.weights[:12]}): run recontrast calibrate {path} --good DIR"
        )
    return json.dumps({**description, "calibration": calibration.to_dict()})


def _joins_maps(description: Mapping[str, Any]) -> bool:
    """Return whether a file holds the graph of a tile or of a view, which makes no decisions."""
    return parse_recipe(description["recipe"]).joins_maps


def _rewrite_onnx(path: Path, target: Path, calibration: Calibration) -> None:
    import onnx

    content, description = read_onnx(path)
    model = onnx.load_from_string(content)
    if not _joins_maps(description):
        replace_onnx_decisions(model, calibration)
    write_onnx(model, target, _describe(description, calibration, path))


def _rewrite_openvino(path: Path, target: Path, calibration: Calibration) -> None:
    import openvino

    content, weights, description = read_openvino(path)
    text = _describe(description, calibration, path)
    model = get_core().read_model(content, openvino.Tensor(weights) if len(weights) else b"")
    if not _joins_maps(description):
        replace_openvino_decisions(model, calibration)
    write_openvino(model, target, text)


def _rewrite_pt2(path: Path, target: Path, calibration: Calibration) -> None:
    archive, description = read_pt2(path)
    text = _describe(description, calibration, path)
    recipe = parse_recipe(description["recipe"])
    dtype = torch.uint8 if recipe.window is None else torch.float32
    with silence_exporters(), pause_collection():
        program = torch.export.load(archive)
        if not _joins_maps(description):
            fixed, batch = description.get("input_size"), description.get("input_batch")
            size = to_pair(recipe.size) if fixed is None else (fixed[0], fixed[1])
            decided = DecidedProgram(program.module(), calibration)
            program = trace_images(decided, size, dtype, is_fixed=fixed is not None, batch=batch)
        write_pt2(program, target, text)
