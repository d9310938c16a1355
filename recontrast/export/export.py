"""Export of a detector to one file that needs neither this package nor the checkpoint.

The file is written to a temporary folder, loaded by the runtime that it is for, and compared with the checkpoint on
images of many sizes. It moves to its destination only if all scores agree.
"""

import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from recontrast.data.atomic import replace_files
from recontrast.data.exact_length import max_exact_length
from recontrast.data.locks import lock_file
from recontrast.data.roi import EACH, decode_mask, has_aspect
from recontrast.data.temporary import temporary_folder
from recontrast.data.window import parse_window
from recontrast.export.decisions import list_files
from recontrast.export.describe import describe
from recontrast.export.detector_graph import DetectorGraph
from recontrast.export.low_precision import TOLERANCES, PrecisionReport, check_precision, check_tolerance
from recontrast.export.low_precision_file import LowPrecisionJob, write_low, write_report
from recontrast.export.onnx_graph import convert_to_onnx
from recontrast.export.tracing import pause_collection, silence_exporters, trace_images
from recontrast.export.verify import compare_scores, draw_images, graph_size
from recontrast.export.write_files import write_onnx_model, write_pt2
from recontrast.inference.detector import CheckpointDetector, Detector
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.inference.options import InferenceOptions
from recontrast.inference.programs import OUTPUTS
from recontrast.recipes.recipe import to_pair

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml"}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "pt2": (), "openvino": ("onnx", "onnxscript", "openvino")}
OLDEST_TORCH = (2, 11)  # torch.export of earlier versions fixes the size of the batch


@dataclass(frozen=True)
class ExportResult:
    """Files of an export, and how closely their scores agree with the checkpoint.

    Attributes:
        path: Path of the file to load.
        files: Paths of all files; OpenVINO has a second one for the weights.
        outputs: Names of the outputs of the graph.
        images: Number of images that were compared.
        difference: Largest relative difference between the scores of the file and of the checkpoint.
        notes: Sentences for the user, such as why the file makes no decisions.
        report: What a file of less than float32 does beside float32; else None.
    """

    path: Path
    files: tuple[Path, ...]
    outputs: tuple[str, ...]
    images: int
    difference: float
    notes: tuple[str, ...]
    report: PrecisionReport | None = None


def export(
    checkpoint: Path,
    kind: str,
    out: Path,
    *,
    precision: str = "float32",
    images: Sequence[Path] = (),
    tolerance: float | None = None,
    views: Literal["both", "trained", "frozen"] | None = None,
    input_size: tuple[int, int] | None = None,
    input_batch: int | None = None,
    measure: Callable[[Detector], Mapping[str, float]] | None = None,
    on_start: Callable[[], None] | None = None,
) -> ExportResult:
    """Export a detector as one graph, and keep the file only if its scores agree with those of the checkpoint.

    Args:
        checkpoint: Path of the checkpoint.
        kind: File format, "onnx", "pt2" or "openvino".
        out: Path of the file, with the suffix of its format: .onnx, .pt2 or .xml (with the weights in a .bin file
            beside it).
        precision: "float32"; "float16" stores the weights in half the space and computes in float32; "bfloat16"
            computes in it where the processor can (OpenVINO alone); "int8" quantises the network after training, see
            `recontrast.export.low_precision.convert`. Files of less than float32 have a report beside them (.md and
            .json), and make no decisions before they are calibrated.
        images: Image files to compare on, in addition to synthetic images of many sizes; of parts with several views,
            those of all views. For int8 they must be good
            images: they give the ranges of values, and scores are compared on them alone.
        tolerance: Largest relative difference allowed between two scores; None for
            `recontrast.export.low_precision.TOLERANCES`.
        views: Views of the exported map; None for those of the training. Decisions need a calibration of these views.
        input_size: Height and width of all images, for runtimes that want the input to be fixed. None: images of any
            size.
        input_batch: Number of images in each call. None: any number. With both, the graph has no dynamic length.
        measure: Function that computes metrics of a detector on labelled images, for the report.
        on_start: Called when everything is checked and the detector is loaded, before the part that takes long.

    Returns:
        Paths of the files and the result of the comparison.

    Raises:
        ValueError: If the format, precision or suffix is unknown, the format cannot hold the model or the precision,
            the images are too few for int8, or scores or decisions differ; no file is then written.
        ImportError: If a package that the format needs is not installed, or torch is too old.
        OSError: If the checkpoint cannot be read or the file cannot be written.
    """
    check_target(kind, out)
    check_precision(precision, kind, images)
    _check_input(precision, input_size, input_batch)
    tolerance = TOLERANCES[precision] if tolerance is None else check_tolerance(tolerance)
    # Not folded: the graph folds BatchNorm itself, and the digest is that of the original weights.
    detector = CheckpointDetector(checkpoint, "cpu", inference=InferenceOptions(views, folded=False))
    _check_detector(detector, input_size)
    notes = [] if detector.calibration_note is None else [detector.calibration_note]
    notes += _convert_to_float32(detector) + _drop_calibration(detector, precision, out)
    if on_start is not None:
        on_start()
    # The graph of a tile or of a view cannot decide: the calibration is of the scores of whole images or parts.
    decides = detector.calibration is not None and not detector.recipe.joins_maps
    graph = DetectorGraph(detector.model, detector.recipe, detector.calibration if decides else None, input_size)
    job = LowPrecisionJob(detector, kind, precision, list(images), tolerance, measure)
    report = None
    with lock_file(out), _temporary_folder(out) as folder:
        draft = folder / out.name
        try:
            with silence_exporters(), pause_collection():
                if precision == "float32":
                    about = describe(detector, kind, input_size=input_size, input_batch=input_batch)
                    _write(trace(graph, input_batch), graph, kind, draft, about)
                else:
                    report = write_low(job, trace(graph), draft)
        except RuntimeError as error:  # raised by torch.export, the ONNX exporter and OpenVINO
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"export: wanted a model that {kind} can hold, got one that it cannot: {reason}"
            ) from error
        names = [file.name for file in list_files(draft)]
        if report is None:
            window = parse_window(detector.recipe.window)
            drawn = draw_images(folder / "samples", graph_size(detector.recipe), window, input_size)
            count, difference = compare_scores(detector, ExportedDetector(draft), images, tolerance, drawn)
        else:
            count, difference = report.change.images, report.change.largest
            names += write_report(report, draft)
        _move_files(folder, names, out.absolute().parent)
    files = tuple(out.with_name(name) for name in names)
    outputs = OUTPUTS if decides else OUTPUTS[:2]
    return ExportResult(out, files, outputs, count, difference, tuple(notes), report)


def check_target(kind: str, out: Path) -> None:
    """Check the format and the name of a file before anything is loaded.

    Args:
        kind: File format.
        out: Path of the file.

    Raises:
        ValueError: If the format is unknown, or the file has the suffix of another one.
        ImportError: If a package that the format needs is not installed, or torch is too old.
    """
    if kind not in SUFFIXES:
        raise ValueError(f"export: format: wanted {', '.join(SUFFIXES)}, got {kind!r}")
    if out.suffix != SUFFIXES[kind]:
        raise ValueError(f"export: wanted a file name that ends in {SUFFIXES[kind]}, got {out}")
    _require(kind)


def _check_input(precision: str, size: tuple[int, int] | None, batch: int | None) -> None:
    """Raise an error if a graph of this precision cannot have an input with these lengths."""
    if batch is not None and batch < 1:
        raise ValueError(f"--input-batch: wanted at least 1 image, got {batch}")
    if precision != "float32" and not size == batch is None:
        raise ValueError(f"--precision: wanted float32 with --input-size or --input-batch, got {precision}")


def _check_detector(detector: CheckpointDetector, size: tuple[int, int] | None) -> None:
    """Raise an error if a graph cannot hold a detector, or not for images of this size."""
    recipe = detector.recipe
    if recipe.roi == EACH:
        raise ValueError(
            f"{detector.path}: wanted a detector with one region of interest to export, got one with a mask for each "
            "image"
        )
    if size is None:
        return
    got = f"{size[0]} x {size[1]}"
    if recipe.tile is not None:
        raise ValueError(f"--input-size: wanted none for a detector of tiles, whose input is a tile, got {got}")
    most = [max_exact_length(length) for length in to_pair(recipe.size)]
    if not all(1 <= length <= limit for length, limit in zip(size, most, strict=True)):
        raise ValueError(f"--input-size: wanted from 1 x 1 to {most[0]} x {most[1]} px (height x width), got {got}")
    if recipe.roi is not None and not has_aspect(mask := decode_mask(recipe.roi).shape, size):
        raise ValueError(
            f"--input-size: wanted the aspect ratio of the region of interest, {mask[0]} x {mask[1]} px (height x "
            f"width), got {got}"
        )


def _convert_to_float32(detector: CheckpointDetector) -> list[str]:
    """Convert a bfloat16 detector to float32 in place, and drop its calibration, which is invalid for float32 scores.

    Returns:
        Notes for the user; none if the detector was float32 already.
    """
    if detector.recipe.precision == "float32":
        return []
    detector.recipe = detector.recipe.replace(precision="float32")
    detector.model.float()
    if detector.calibration is None:
        return ["scores are computed in float32, those of the checkpoint in bfloat16"]
    detector.calibration = None
    return ["scores are computed in float32: the calibration is for bfloat16 scores, so no decisions are made"]


def trace(graph: DetectorGraph, batch: int | None = None) -> torch.export.ExportedProgram:
    """Trace a graph by torch.export, for any number of images of any size.

    Args:
        graph: Graph with the input (N, H, W, 3), and masks (N, H, W) if it has them.
        batch: Number of images, N; None for any number.

    Returns:
        Program with dynamic N unless it is given, and with dynamic H and W unless the graph takes images of one size.
    """
    is_fixed = graph.input_size is not None
    size = graph.input_size or graph.resize.out
    return trace_images(graph, size, graph.input_dtype, is_fixed=is_fixed, batch=batch, has_masks=graph.has_masks)


def _write(
    program: torch.export.ExportedProgram, graph: DetectorGraph, kind: str, path: Path, description: str
) -> None:
    """Write a traced graph in the format ``kind``, with its description as metadata."""
    if kind == "pt2":
        write_pt2(program, path, description)
        return
    write_onnx_model(convert_to_onnx(program, graph.calibrated), kind, path, description)


def _drop_calibration(detector: CheckpointDetector, precision: str, out: Path) -> list[str]:
    """Drop the calibration of a detector that is exported in less than float32; return a note for the user."""
    if precision == "float32" or detector.calibration is None:
        return []
    detector.calibration = None
    return [
        f"the calibration is for the scores in float32, so no decisions are made: recontrast calibrate {out} --good DIR"
    ]


def _require(kind: str) -> None:
    """Raise an error if a package that the format ``kind`` needs is not installed, or torch is too old."""
    missing = [name for name in NEEDS[kind] if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        raise ImportError(
            f"export to {kind}: wanted {', '.join(NEEDS[kind])}, got no {', '.join(missing)}: pip install {names}"
        )
    if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(f"export to {kind}: wanted torch >= {wanted}, got torch {torch.__version__}: upgrade torch")


@contextmanager
def _temporary_folder(out: Path) -> Iterator[Path]:
    """Create a temporary folder on the same disk as ``out``, so that files can be moved there by renaming."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder(out.absolute().parent))
        except OSError as error:
            raise OSError(f"cannot write {out}: {error.strerror or error}") from error
        yield folder


def _move_files(folder: Path, names: Sequence[str], target: Path) -> None:
    """Move the files to their destination, all or none: weights must not be loaded with another graph."""
    try:
        with replace_files(target) as staging:
            for name in names:
                os.replace(folder / name, staging / name)
    except OSError as error:
        raise OSError(f"cannot write {target / names[0]}: {error.strerror or error}") from error
