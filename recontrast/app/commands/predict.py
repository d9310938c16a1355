"""``recontrast predict``: options and output; `recontrast.app.prediction.predict` does the work."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recontrast.app.console import exit_with_error, print_image_errors, print_line, print_warning
from recontrast.app.option_groups import expand_options
from recontrast.app.options import (
    DetectorFile,
    InferenceArguments,
    MapFormat,
    MustDecide,
    OtherRate,
    OtherRoi,
    Overwrite,
    check_map_format,
    check_writable,
    path_argument,
    path_option,
    resolve_checkpoint,
)
from recontrast.app.progress_bar import ProgressBar

if TYPE_CHECKING:
    from recontrast.app.prediction.predict import PredictionSummary
    from recontrast.inference.options import InferenceOptions


@expand_options
def predict(  # 22 options
    checkpoint: DetectorFile,
    inputs: Annotated[
        list[Path],
        path_argument("INPUT", "Images, folders that are searched for images at any depth, or lists of images."),
    ],
    *,
    out: Annotated[Path, path_option(help="Folder for scores.csv, scores.json, regions.csv, maps/, overlays/.")],
    maps: MapFormat = "none",
    no_overlays: Annotated[
        bool,
        typer.Option("--no-overlays", help="Do not write heat maps laid over the images (PNG, in their own size)."),
    ] = False,
    threshold: Annotated[float | None, typer.Option(help="Flag images whose score is at least this.")] = None,
    decide: MustDecide = False,
    false_alarm_rate: OtherRate = None,
    tile: Annotated[
        int | None, typer.Option(help="Side of the tiles in pixels, if trained on tiles. Default: as trained.")
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Overlap of the tiles in pixels. Default: a quarter of the tile.")
    ] = None,
    roi: OtherRoi = None,
    inference: InferenceArguments,
    engine: Annotated[
        str, typer.Option(help="local, or ray for many workers and lists (.txt, .parquet); ray writes only a table.")
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that decode images; with ray, processes (default: one per GPU, or per 4 CPUs)."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster. Default: RAY_ADDRESS, or this machine.")
    ] = None,
    part: Annotated[int, typer.Option(help="Images per output file of ray, all scored again if a worker dies.")] = 64,
    overwrite: Overwrite = False,
) -> None:
    """Score images and decide on them; write scores, regions, anomaly maps and heat maps."""
    from recontrast.calibration.conformal import check_rates

    if engine not in ("local", "ray"):
        raise ValueError(f"--engine: wanted local or ray, got {engine!r}")
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"--threshold: wanted a finite number, got {threshold:g}")
    check_writable(out)
    options = inference.build()
    if false_alarm_rate is not None:
        check_rates(false_alarm_rate)
    shared: dict[str, Any] = {
        "threshold": threshold, "rate": false_alarm_rate, "workers": workers, "device": inference.device,
        "batch": inference.batch, "overwrite": overwrite,
    }  # fmt: skip
    if engine == "ray":
        _check_ray_options(maps, tile, overlap, roi, options, inference.device)
        return _predict_with_ray(
            resolve_checkpoint(checkpoint), inputs, out, must_decide=decide, address=address, part=part, **shared
        )
    if address:
        raise ValueError("--address: wanted --engine ray with it, got --engine local")
    check_map_format(maps)
    _check_inputs(inputs)
    _predict_here(
        resolve_checkpoint(checkpoint), inputs, out, maps=maps, overlays=not no_overlays, decide=decide, tile=tile,
        overlap=overlap, roi=roi, inference=options, **shared,
    )  # fmt: skip


def _check_inputs(inputs: Sequence[Path]) -> None:
    """Raise ValueError if an input is a list that only Ray takes."""
    for path in inputs:
        if path.suffix.lower() == ".txt" and path.is_file():
            raise ValueError(
                f"{path}: wanted images, folders or lists (.csv, .jsonl, .parquet), got a .txt: it needs --engine ray"
            )


def _predict_here(checkpoint: Path, inputs: Sequence[Path], out: Path, **options: Any) -> None:
    """Run ``recontrast predict`` in this process, and print what was scored."""
    from recontrast.app.prediction.predict import predict as run

    try:
        with ProgressBar("predict") as progress:
            summary = run(checkpoint, inputs, out, on_progress=progress, **options)
    except KeyboardInterrupt:
        exit_with_error(f"interrupted; the same command continues with what is in {out}", status=130)
    if summary.continued:
        print_line(f"{summary.continued} {summary.noun} were scored by an earlier call, which was stopped")
    counts = _describe_counts(summary, options["threshold"])
    print_line(f"{len(summary.predictions)} {summary.noun} scored{counts}: {out / 'scores.csv'}")
    if summary.calibration_note is not None:
        print_warning(summary.calibration_note)
    failed = [*summary.unread, *summary.incomplete, *summary.undecided]
    print_image_errors(failed, f"see {out / 'scores.csv'}")
    if failed:
        raise typer.Exit(2)


def _describe_counts(summary: "PredictionSummary", threshold: float | None) -> str:
    """Describe how many images were flagged, and how many were called defects."""
    parts = []
    if threshold is not None:
        parts.append(f"{sum(bool(prediction.flagged) for prediction in summary.predictions)} flagged at {threshold:g}")
    if summary.rate is not None:
        defects = sum(
            prediction.decision is not None and bool(prediction.decision.defect) for prediction in summary.predictions
        )
        parts.append(f"{defects} called defects at a false-alarm rate of {summary.rate:g}")
    if summary.undecided:
        parts.append(f"{len(summary.undecided)} undecided")
    return "".join(f", {part}" for part in parts)


def _check_ray_options(
    maps: str, tile: int | None, overlap: int | None, roi: Path | None, inference: "InferenceOptions",
    device: str | None,
) -> None:  # fmt: skip
    """Raise ValueError if an option was given that ``--engine ray`` does not have."""
    if tile is not None or overlap is not None:
        raise ValueError("--tile, --overlap: wanted neither with --engine ray, which scores as trained")
    if roi is not None:
        raise ValueError(f"--roi: wanted none with --engine ray, which scores as trained, got {roi}")
    if inference != InferenceArguments(device=device).build():
        raise ValueError("--views, --precision, --layout, --no-fold, --compile: wanted none of them with "
                         "--engine ray, which scores as trained")  # fmt: skip
    if maps != "none":
        raise ValueError(f"--maps: wanted none with --engine ray, which writes scores alone, got {maps}")


def _predict_with_ray(checkpoint: Path, inputs: Sequence[Path], out: Path, **options: Any) -> None:
    """Run ``recontrast predict --engine ray``, and print what was scored."""
    from recontrast.app.prediction import parquet_parts, ray_predict

    with ProgressBar("predict") as progress:
        summary = ray_predict.predict(checkpoint, inputs, out, on_progress=progress, **options)
    counts = f", {summary.defects} defects" if summary.decided else ""
    counts += "" if options["threshold"] is None else f", {summary.flagged} flagged at {options['threshold']:g}"
    counts += f", {len(summary.undecided)} undecided" if summary.undecided else ""
    print_line(f"{summary.scored} images scored{counts}: {out / parquet_parts.FOLDER}")
    for sentences, column in ((summary.unread, "error"), (summary.undecided, "score")):
        print_image_errors(sentences, f"column {column}")
    if summary.unread or summary.undecided:
        raise typer.Exit(2)
