"""Writing a detector as one file that needs neither this package nor a checkpoint, and only when it is right.

The file is written to a folder of its own beside its place, opened again by the runtime that it is for, and run on
images of many sizes beside the checkpoint (PIL, then PyTorch). It moves to its place when all scores agree.
"""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import recontrast
from recontrast.checkpoint import digest
from recontrast.data.pillow_resize import max_exact_length
from recontrast.export.detector_graph import DetectorGraph
from recontrast.export.verify import TOLERANCE, compare_scores, draw_images
from recontrast.inference.detector import CheckpointDetector
from recontrast.inference.exported_detector import (
    FORMAT,
    INSTALL_HINT,
    KEY,
    OUTPUTS,
    WEIGHTS_KEY,
    ExportedDetector,
    compute_sha256,
)
from recontrast.inference.options import InferenceOptions
from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import to_pair

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml"}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": (), "openvino": ("onnx", "onnxscript", "openvino")}
OPSET = 18


@dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        path: the file to open.
        files: all of them: OpenVINO's weights lie beside the path.
        outputs: names of what the graph gives.
        images: compared.
        difference: the largest relative one of their scores.
        notes: what the user should know, sentences.
    """

    path: Path
    files: tuple[Path, ...]
    outputs: tuple[str, ...]
    images: int
    difference: float
    notes: tuple[str, ...]


def export(
    checkpoint: Path,
    kind: str,
    out: Path,
    *,
    images: Sequence[Path] = (),
    tolerance: float = TOLERANCE,
    views: Literal["both", "trained", "frozen"] | None = None,
) -> ExportResult:
    """Write the detector of ``checkpoint`` as one graph, if it gives the checkpoint's scores.

    Args:
        checkpoint: what training wrote.
        kind: "onnx", "pt2" or "openvino".
        out: the file, with the suffix of its kind: .onnx, .pt2, .xml (its weights go beside it as .bin).
        images: files on which it must agree too, besides drawn ones of many sizes.
        tolerance: largest relative difference of a score.
        views: maps of this target alone, decided by a calibration of them; None: as trained.

    Returns:
        What was written.

    Raises:
        ValueError: a kind or suffix that is none; scores or decisions that differ: nothing is written then.
        ImportError: a package that this kind needs is not installed.
        OSError: the checkpoint cannot be read, or the file not be written.
    """
    if kind not in SUFFIXES:
        raise ValueError(f"export: format: wanted {', '.join(SUFFIXES)}, got {kind!r}")
    if out.suffix != SUFFIXES[kind]:
        raise ValueError(f"export: wanted a file name that ends in {SUFFIXES[kind]}, got {out}")
    _require(kind)
    detector = CheckpointDetector(
        checkpoint, "cpu", inference=InferenceOptions(views, folded=False)
    )  # weights as they are
    if detector.overlap is not None:
        raise ValueError(f"{checkpoint}: wanted a detector of whole images to export, got one of tiles")
    assert isinstance(detector.model, ReContrast)  # it was not folded
    notes = [*([] if detector.calibration_note is None else [detector.calibration_note]), *_in_float32(detector)]
    about = describe_detector(detector)
    graph = DetectorGraph(detector.model, detector.recipe, detector.calibration)
    home = next(folder for folder in out.absolute().parents if folder.is_dir())
    with _folder(home, out) as work:
        draft = work / out.name
        try:
            with _quiet():
                _write(trace(graph), graph, kind, draft, json.dumps(about))
        except RuntimeError as error:  # of torch.export, of the ONNX exporter, of OpenVINO
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"export: wanted a model that {kind} can hold, got one that it cannot: {reason}"
            ) from error
        samples = [*images, *draw_images(work / "samples", to_pair(detector.recipe.size))]
        count, difference = compare_scores(detector, ExportedDetector(draft), samples, tolerance)
        names = [draft.name, *([draft.with_suffix(".bin").name] if kind == "openvino" else [])]
        _place(work, names, out.absolute().parent)
    files = tuple(out.with_name(name) for name in names)
    outputs = OUTPUTS if detector.calibration is not None else OUTPUTS[:2]
    return ExportResult(out, files, outputs, count, difference, tuple(notes))


def describe_detector(detector: CheckpointDetector) -> dict[str, Any]:
    """What goes into the file of ``detector`` as text: all that is needed to run it and to know its origin."""
    recipe, model = detector.recipe, detector.model
    size, crop = to_pair(recipe.size), None if recipe.crop is None else to_pair(recipe.crop)
    return {
        "format": FORMAT,
        "recontrast": recontrast.__version__,
        "category": detector.category,
        "top": detector.max_map_value,
        "recipe": recipe.to_dict(),
        "preprocessing": {
            "input": "uint8 RGB (N, H, W, 3), any size up to the largest, upright, without alpha",
            "largest": [max_exact_length(length) for length in size],
            "size": size, "crop": crop, "resize": "Pillow's BILINEAR to the bit: across, rounded, then down",
            "mean": list(model.mean), "std": list(model.std),
        },
        "calibration": None if detector.calibration is None else detector.calibration.to_dict(),
        "weights": digest(model.state_dict(), recipe),
    }  # fmt: skip


def _in_float32(detector: CheckpointDetector) -> list[str]:
    """Let a detector of bfloat16 score in float32; its calibration does not hold for that."""
    if detector.recipe.precision == "float32":
        return []
    detector.recipe = detector.recipe.replace(precision="float32")
    detector.model.float()
    if detector.calibration is None:
        return ["scores are of float32, the checkpoint's of bfloat16"]
    detector.calibration = None
    return ["scores are of float32: the calibration, of bfloat16 scores, was left out, and so are decisions"]


def trace(graph: DetectorGraph) -> torch.export.ExportedProgram:
    """The graph ``graph`` written down by torch.export, for any number of images of any size, (N, H, W, 3) uint8."""
    size, any_length = graph.resize.out, torch.export.Dim.DYNAMIC
    example = torch.zeros(2, size[0] + 3, size[1] + 5, 3, dtype=torch.uint8)
    lengths = ((any_length, any_length, any_length, torch.export.Dim.STATIC),)
    with torch.no_grad():
        return torch.export.export(graph, (example,), dynamic_shapes=lengths)


def _write(program: torch.export.ExportedProgram, graph: DetectorGraph, kind: str, path: Path, about: str) -> None:
    if kind == "pt2":
        torch.export.save(program, path, extra_files={f"{KEY}.json": about})
        return
    names = list(OUTPUTS if graph.calibrated else OUTPUTS[:2])
    onnx = torch.onnx.export(
        program, (), dynamo=True, verbose=False, opset_version=OPSET, input_names=["image"], output_names=names
    )
    assert onnx is not None  # only without dynamo
    if kind == "onnx":
        onnx.model.metadata_props[KEY] = about
        onnx.save(path)
        return
    import openvino

    middle = path.with_suffix(".onnx")
    onnx.save(middle)
    model = openvino.convert_model(middle)
    model.set_rt_info(about, KEY)
    openvino.save_model(model, path, compress_to_fp16=False)
    model.set_rt_info(
        compute_sha256(path.with_suffix(".bin")), WEIGHTS_KEY
    )  # the two files are told to belong together
    openvino.save_model(model, path, compress_to_fp16=False)


def _require(kind: str) -> None:
    import importlib.util

    missing = [name for name in NEEDS[kind] if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export to {kind} needs {', '.join(missing)}: {INSTALL_HINT}")


@contextmanager
def _folder(home: Path, out: Path) -> Iterator[Path]:
    """A folder that is gone afterwards, on the disk where the file will be."""
    try:
        made = tempfile.TemporaryDirectory(dir=home, prefix=".export-")
    except OSError as error:
        raise OSError(f"cannot write {out}: {error.strerror or error}") from error
    with made as folder:
        yield Path(folder)


def _place(work: Path, names: Sequence[str], target: Path) -> None:
    """Move the files to their place: the one that is opened comes last, so that its weights are there."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        if len(names) > 1:
            (target / names[0]).unlink(missing_ok=True)  # the old one must never stand beside the new weights
        for name in reversed(names):
            os.replace(work / name, target / name)
    except OSError as error:
        raise OSError(f"cannot write {target / names[0]}: {error.strerror or error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of themselves: it is about their own future, and the result is tested."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
