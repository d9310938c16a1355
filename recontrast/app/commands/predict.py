"""``recontrast predict``: its options, and what it says; the work is in `recontrast.app.prediction.predict`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from recontrast.app.console import ProgressBar, print_error
from recontrast.app.options import (
    Batch,
    Compile,
    DetectorFile,
    Device,
    Layout,
    NoFold,
    Precision,
    Views,
    build_inference_options,
    check_writable,
    resolve_checkpoint,
)

if TYPE_CHECKING:
    from recontrast.app.prediction.predict import Maps, PredictionSummary


def predict(
    checkpoint: DetectorFile,
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT", help="Images, or folders that are searched for images.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for scores.csv, scores.json, regions.csv, maps/, overlays/.")],
    maps: Annotated[
        str, typer.Option(help="tiff16 (uint16, scale in scores.json), tiff32 or npy (float32), or none.")
    ] = "none",
    no_overlays: Annotated[
        bool, typer.Option("--no-overlays", help="Without heat maps over the images (PNG, in their own size).")
    ] = False,
    threshold: Annotated[float | None, typer.Option(help="Flag images whose score is at least this.")] = None,
    decide: Annotated[
        bool, typer.Option("--decide", help="Insist on good or defect: stop where there is no calibration.")
    ] = False,
    false_alarm_rate: Annotated[
        float | None, typer.Option(help="Decide by this rate in place of the one that was calibrated for.")
    ] = None,
    tile: Annotated[
        int | None, typer.Option(help="Side of tiles, pixels, where it was trained on tiles. Default: as trained.")
    ] = None,
    overlap: Annotated[int | None, typer.Option(help="Of tiles, pixels. Default: a quarter of the tile.")] = None,
    views: Views = None,
    precision: Precision = None,
    layout: Layout = None,
    no_fold: NoFold = False,
    compiled: Compile = False,
    batch: Batch = 16,
    device: Device = None,
    engine: Annotated[
        str, typer.Option(help="local, or ray: by many workers, also of lists (.txt, .parquet); writes a table alone.")
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(help="Threads that decode; of ray, processes: default one a GPU, else one for 4 CPUs."),
    ] = None,
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster. Default: RAY_ADDRESS, or one here.")] = None,
    part: Annotated[int, typer.Option(help="Images in a file of ray's: so many are lost with a worker.")] = 64,
) -> None:
    """Score images, decide where there is a calibration; write scores, regions, anomaly maps and heat-map overlays."""
    if engine not in ("local", "ray"):
        raise ValueError(f"--engine: wanted local or ray, got {engine!r}")
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"--threshold: wanted a finite number, got {threshold:g}")
    check_writable(out)
    how = build_inference_options(device, views, precision, layout, no_fold, compiled, workers)
    if engine == "ray":
        if tile is not None or overlap is not None:
            raise ValueError("--tile, --overlap: wanted neither with --engine ray, which scores as trained")
        if how != build_inference_options(device):
            raise ValueError("--views, --precision, --layout, --no-fold, --compile: wanted none of them with "
                             "--engine ray, which scores as trained")  # fmt: skip
        return _predict_with_ray(
            resolve_checkpoint(checkpoint), inputs, out, maps=maps, workers=workers, address=address, part=part,
            batch=batch, threshold=threshold, rate=false_alarm_rate, must_decide=decide, device=device,
        )  # fmt: skip
    if address:
        raise ValueError("--address: wanted --engine ray with it, got --engine local")
    kinds = ("tiff16", "tiff32", "npy", "none")
    if maps not in kinds:
        raise ValueError(f"--maps: wanted one of {', '.join(kinds)}, got {maps!r}")
    from recontrast.app.prediction.parquet_parts import LISTS
    from recontrast.app.prediction.predict import predict as run

    for path in inputs:
        if path.suffix.lower() in LISTS and path.is_file():
            raise ValueError(f"{path}: wanted images or folders, got a list of images: lists need --engine ray")
    with ProgressBar("predict") as shown:
        report = run(
            resolve_checkpoint(checkpoint), inputs, out, maps=cast("Maps", maps), overlays=not no_overlays,
            threshold=threshold, rate=false_alarm_rate, decide=decide, tile=tile, overlap=overlap, inference=how,
            workers=workers, device=device, batch=batch, on_progress=shown,
        )  # fmt: skip
    typer.echo(f"{len(report.predictions)} images scored{_said(report, threshold)}: {out / 'scores.csv'}")
    if report.calibration_note is not None:
        print_error(f"warning: {report.calibration_note}")
    for text in report.unread:
        print_error(text)
    if report.unread:
        raise typer.Exit(2)


def _said(report: "PredictionSummary", threshold: float | None) -> str:
    """How many were flagged, and how many were called defects."""
    parts = []
    if threshold is not None:
        parts.append(f"{sum(bool(found.flagged) for found in report.predictions)} flagged at {threshold:g}")
    if report.rate is not None:
        defects = sum(found.decision is not None and found.decision.defect for found in report.predictions)
        parts.append(f"{defects} called defects at a false-alarm rate of {report.rate:g}")
    return "".join(f", {part}" for part in parts)


SHOWN = 20  # of the images that could not be read


def _predict_with_ray(
    checkpoint: Path, inputs: Sequence[Path], out: Path, *, maps: str = "none", **options: Any
) -> None:
    """``recontrast predict --engine ray``."""
    if maps != "none":
        raise ValueError(f"--maps: wanted none with --engine ray, which writes scores alone, got {maps}")
    from recontrast.app.prediction import parquet_parts, ray_predict

    with ProgressBar("predict") as shown:
        summary = ray_predict.predict(checkpoint, inputs, out, on_progress=shown, **options)
    said = f", {summary.defects} defects" if summary.decided else ""
    said += "" if options["threshold"] is None else f", {summary.flagged} flagged at {options['threshold']:g}"
    typer.echo(f"{summary.scored} images scored{said}: {out / parquet_parts.FOLDER}")
    for text in summary.unread[:SHOWN]:
        print_error(text)
    if len(summary.unread) > SHOWN:
        print_error(f"and {len(summary.unread) - SHOWN} more: column error")
    if summary.unread:
        raise typer.Exit(2)
