"""Writing of files of less than float32, with a report of what they do beside float32."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from recontrast.data.window import parse_window
from recontrast.export.decisions import list_files
from recontrast.export.describe import describe
from recontrast.export.low_precision import Change, PrecisionReport, convert, time_calls
from recontrast.export.onnx_graph import convert_to_onnx
from recontrast.export.verify import check_differences, draw_images, graph_size, score_both
from recontrast.export.write_files import write_onnx_model
from recontrast.inference.detector import CheckpointDetector, Detector
from recontrast.inference.exported_detector import ExportedDetector


@dataclass(frozen=True)
class LowPrecisionJob:
    """What a file of less than float32 is written from.

    Attributes:
        detector: Detector in the checkpoint.
        kind: File format.
        precision: Precision of the file.
        images: Images to compare on; for int8, good images.
        tolerance: Largest relative difference allowed between two scores.
        measure: Function that computes metrics of a detector; None for a report without them.
    """

    detector: CheckpointDetector
    kind: str
    precision: str
    images: list[Path]
    tolerance: float
    measure: Callable[[Detector], Mapping[str, float]] | None


def write_low(job: LowPrecisionJob, program: torch.export.ExportedProgram, draft: Path) -> PrecisionReport:
    """Write a file of less than float32 beside one of float32, and compare both with the checkpoint.

    Args:
        job: What is written.
        program: Traced graph without decisions.
        draft: Path of the file, in a temporary folder that also receives the file of float32.

    Returns:
        The comparison.

    Raises:
        ValueError: If a score differs by more than the tolerance, or an image cannot be read.
    """
    detector, kind, precision = job.detector, job.kind, job.precision
    model = convert_to_onnx(program, False)
    low, parts = convert(model, kind, precision, job.images, detector.recipe, job.tolerance)
    whole = draft.with_name("float32" + draft.suffix)
    write_onnx_model(low, kind, draft, describe(detector, kind, precision), half=precision == "float16")
    write_onnx_model(model, kind, whole, describe(detector, kind))
    exported, reference = ExportedDetector(draft), ExportedDetector(whole)
    window = parse_window(detector.recipe.window)
    drawn = [] if precision == "int8" else draw_images(draft.parent / "samples", graph_size(detector.recipe), window)
    wanted, got, names = score_both(detector, exported, job.images, drawn)
    change = Change.measure(wanted, got)
    if not change.largest <= job.tolerance:
        check_differences(wanted, got, names, job.tolerance)
    sizes = [sum(file.stat().st_size for file in list_files(path)) / 1e6 for path in (whole, draft)]
    speeds = time_calls([reference, exported], detector.recipe)
    metrics = {}
    if job.measure is not None:
        before, after = job.measure(reference), job.measure(exported)
        metrics = {name: (before[name], after[name]) for name in before if name in after}
    return PrecisionReport(
        precision, change, job.tolerance, parts, metrics, (speeds[0], speeds[1]), (sizes[0], sizes[1]),
        torch.get_num_threads(),
    )  # fmt: skip


def write_report(report: PrecisionReport, file: Path) -> list[str]:
    """Write a report beside an exported file, as .md and .json.

    Args:
        report: Report.
        file: Path of the exported file.

    Returns:
        Names of the written files.
    """
    page, table = list_reports(file)
    page.write_text(report.to_markdown(file.name))
    table.write_text(json.dumps({"exported": file.name, **report.to_dict()}, indent=1) + "\n")
    return [page.name, table.name]


def list_reports(file: Path) -> tuple[Path, Path]:
    """Return the paths of the reports of an exported file, .md and .json.

    Args:
        file: Path of the exported file.

    Returns:
        Two paths.
    """
    return file.with_suffix(".md"), file.with_suffix(".json")
