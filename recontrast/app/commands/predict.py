"""``recontrast predict``: options and output; `recontrast.app.prediction.predict` does the work."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from recontrast.app.console import exit_with_error, print_error, print_image_errors, print_line
from recontrast.app.options import (
    DetectorFile,
    InferenceArguments,
    Overwrite,
    add_inference_arguments,
    check_writable,
    path_argument,
    path_option,
    resolve_checkpoint,
)
from recontrast.app.progress_bar import ProgressBar

if TYPE_CHECKING:
    from recontrast.app.prediction.predict import Maps, PredictionSummary


@add_inference_arguments
def predict(  # 22 options and their checks; `recontrast.app.prediction` does the work
    checkpoint: DetectorFile,
    inputs: Annotated[
        list[Path],
        path_argument("INPUT", "Images, folders that are searched for images at any depth, or lists of images."),
    ],
    *,
    out: Annotated[Path, path_option(help="Folder for scores.csv, scores.json, regions.csv, maps/, overlays/.")],
    maps: Annotated[
        str, typer.Option(help="tiff16 (uint16, scale in scores.json), tiff32 or npy (float32), or none.")
    ] = "none",
    no_overlays: Annotated[
        bool,
        typer.Option("--no-overlays", help="Do not write heat maps laid over the images (PNG, in their own size)."),
    ] = False,
    threshold: Annotated[float | None, typer.Option(help="Flag images whose score is at least this.")] = None,
    decide: Annotated[
        bool,
        typer.Option(
            "--decide",
            help="Fail if no decisions can be made. Without it, a detector that is not calibrated only gives scores.",
        ),
    ] = False,
    false_alarm_rate: Annotated[
        float | None, typer.Option(help="Decide at this rate instead of the calibrated one.")
    ] = None,
    tile: Annotated[
        int | None, typer.Option(help="Side of the tiles in pixels, if trained on tiles. Default: as trained.")
    ] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Overlap of the tiles in pixels. Default: a quarter of the tile.")
    ] = None,
    roi: Annotated[
        Path | None,
        path_option(
            help="Another region of interest, as in train; the calibration does not hold for it. Default: as trained."
        ),
    ] = None,
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
    if engine == "ray":
        if tile is not None or overlap is not None:
            raise ValueError("--tile, --overlap: wanted neither with --engine ray, which scores as trained")
        if roi is not None:
            raise ValueError(f"--roi: wanted none with --engine ray, which scores as trained, got {roi}")
        if options != InferenceArguments(device=inference.device).build():
            raise ValueError("--views, --precision, --layout, --no-fold, --compile: wanted none of them with "
                             "--engine ray, which scores as trained")  # fmt: skip
        return _predict_with_ray(
            resolve_checkpoint(checkpoint), inputs, out, maps=maps, workers=workers, address=address, part=part,
            batch=inference.batch, threshold=threshold, rate=false_alarm_rate, must_decide=decide,
            device=inference.device, overwrite=overwrite,
        )  # fmt: skip
    if address:
        raise ValueError("--address: wanted --engine ray with it, got --engine local")
    kinds = ("tiff16", "tiff32", "npy", "none")
    if maps not in kinds:
        raise ValueError(f"--maps: wanted one of {', '.join(kinds)}, got {maps!r}")
    from recontrast.app.prediction.predict import predict as run

    for path in inputs:
        if path.suffix.lower() == ".txt" and path.is_file():
            raise ValueError(
                f"{path}: wanted images, folders or lists (.csv, .jsonl, .parquet), got a .txt: it needs --engine ray"
            )
    try:
        with ProgressBar("predict") as progress:
            summary = run(
                resolve_checkpoint(checkpoint), inputs, out, maps=cast("Maps", maps), overlays=not no_overlays,
                threshold=threshold, rate=false_alarm_rate, decide=decide, tile=tile, overlap=overlap, roi=roi,
                inference=options, workers=workers, device=inference.device, batch=inference.batch,
                overwrite=overwrite, on_progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        exit_with_error(f"interrupted; the same command continues with what is in {out}", status=130)
    if summary.continued:
        print_line(f"{summary.continued} images were scored by an earlier call, which was stopped")
    print_line(f"{len(summary.predictions)} images scored{_describe_counts(summary, threshold)}: {out / 'scores.csv'}")
    if summary.calibration_note is not None:
        print_error(f"warning: {summary.calibration_note}")
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


def _predict_with_ray(
    checkpoint: Path, inputs: Sequence[Path], out: Path, *, maps: str = "none", **options: Any
) -> None:
    """Run ``recontrast predict --engine ray``."""
    if maps != "none":
        raise ValueError(f"--maps: wanted none with --engine ray, which writes scores alone, got {maps}")
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
