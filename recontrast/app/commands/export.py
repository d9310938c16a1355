"""``recontrast export``: write a detector as one file for ONNX Runtime, OpenVINO or torch.export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recontrast.app.console import print_line, print_warning
from recontrast.app.options import (
    AllGood,
    CheckpointFile,
    Overwrite,
    Views,
    build_inference_options,
    check_writable,
    path_option,
    resolve_checkpoint,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from recontrast.export.low_precision import PrecisionReport
    from recontrast.inference.detector import Detector


def export(  # 13 options and their checks; `recontrast.export` does the work
    run: CheckpointFile,
    format: Annotated[str, typer.Option("--format", help="onnx, pt2 (torch.export) or openvino.")],
    out: Annotated[
        Path | None,
        path_option(
            help="Path of the .onnx, .pt2 or .xml file (.xml with weights in .bin). Default: detector.* in RUN."
        ),
    ] = None,
    images: Annotated[
        list[Path] | None,
        path_option(
            help="Images or folders on which the scores are compared, besides generated ones; may be repeated. "
            "For int8: good images, which give the ranges of values."
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(help="float32, float16 (half the size), bfloat16 (OpenVINO) or int8 (fast on CPUs with VNNI)."),
    ] = "float32",
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative difference of a score. Default: 1e-4, 5e-3, 0.05 or 0.15 by precision."),
    ] = None,
    data: Annotated[
        list[Path] | None,
        path_option(help="Labelled data sets or categories: the report of a low precision gives their metrics."),
    ] = None,
    all_good: AllGood = False,
    input_size: Annotated[
        tuple[int, int] | None,
        typer.Option(metavar="HEIGHT WIDTH", help="Fix the size of the images in pixels. Default: any size."),
    ] = None,
    input_batch: Annotated[
        int | None, typer.Option(help="Fix the number of images in each call. Default: any number.")
    ] = None,
    views: Views = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a detector as one file with resize, network and decision; keep it only if the scores agree."""
    from recontrast.data.class_folders import list_good_images
    from recontrast.data.listing import list_images
    from recontrast.data.own_files import check_replaceable
    from recontrast.export.export import SUFFIXES, check_target
    from recontrast.export.export import export as write
    from recontrast.export.low_precision import check_precision, check_tolerance
    from recontrast.export.low_precision_file import list_reports

    file = resolve_checkpoint(run)
    if out is not None or file.is_file():  # a missing file has its own message
        check_writable(file.parent if out is None else out.parent, "RUN" if out is None else "--out")
    if out is None:
        out = file.with_name("detector" + SUFFIXES.get(format, ""))
    check_target(format, out)
    beside = [out.with_suffix(".bin").name] if out.suffix.lower() == ".xml" else []
    beside += [path.name for path in list_reports(out)] if precision != "float32" else []
    check_replaceable(out.parent, [out.name, *beside], overwrite=overwrite, inputs=[file])
    if tolerance is not None:
        check_tolerance(tolerance)
    if data and precision == "float32":
        raise ValueError(
            "--data: wanted --precision float16, bfloat16 or int8 with it, got float32, which has no report"
        )
    paths = (list_good_images(images, all_good) if precision == "int8" else list_images(images)) if images else []
    check_precision(precision, format, paths)
    inference = build_inference_options("cpu", views)
    result = write(
        file, format, out, precision=precision, images=paths, tolerance=tolerance, views=inference.views,
        input_size=input_size, input_batch=input_batch,
        measure=_measure(data, file) if data else None,
        on_start=lambda: print_line("tracing, writing, reopening and comparing takes up to a minute"),
    )  # fmt: skip
    print_line(
        f"scores of {result.images} images differ by at most {result.difference:.1e} (relative) from the checkpoint's"
    )
    for note in result.notes:
        print_warning(note)
    size = sum(path.stat().st_size for path in result.files) / 1e6
    print_line(f"outputs {', '.join(result.outputs)}, {size:.1f} MB: {', '.join(map(str, result.files))}")
    if result.report is not None:
        _print_report(result.report, list_reports(out)[0])


def _print_report(report: "PrecisionReport", page: Path) -> None:
    """Print the main figures of a report, and where it is."""
    speed, size = report.images_per_second, report.megabytes
    kept = [part.name for part in report.parts if part.precision == "float32"]
    print_line(
        f"{report.precision} beside float32: {speed[1] / speed[0]:.2f} x the images/s at batch 1, "
        f"{size[1] / size[0]:.2f} x the size" + (f", left in float32: {', '.join(kept)}" if kept else "")
    )
    for name, (before, after) in report.metrics.items():
        print_line(f"{name}: {100 * before:.2f} in float32, {100 * after:.2f} in {report.precision}")
    print_line(f"report: {page}")


def _measure(data: list[Path], file: Path) -> "Callable[[Detector], dict[str, float]]":
    """Return a function that computes the mean metrics of a detector on labelled images."""
    from recontrast import checkpoint as checkpoints
    from recontrast.app.api import evaluate
    from recontrast.app.data_options import load_tests

    stored = checkpoints.load(file, mapped=True)
    has_views = stored.recipe.image_views is not None  # of which some need no mask
    groups = load_tests(lambda: stored, data, None, None, incomplete=has_views, options=("--data", "", ""))
    samples = [sample for group in groups.values() for sample in group]

    def measure(detector: "Detector") -> dict[str, float]:
        mean = evaluate(detector, samples).mean
        names = ("i_auroc", "i_ap", "i_f1", "p_auroc", "p_ap", "p_f1", "aupro")
        return {name: value for name in names if (value := getattr(mean, name)) is not None}

    return measure
