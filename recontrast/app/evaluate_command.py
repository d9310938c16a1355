"""``recontrast evaluate``: its options, and what it says; the work is in `recontrast.app.evaluation`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recontrast.app.console import Steps, complain, show
from recontrast.app.options import (
    Batch,
    CheckpointFile,
    Compile,
    Data,
    Device,
    Layout,
    NoFold,
    Precision,
    Views,
    Workers,
    checkpoint_file,
    inference,
    writable,
)

if TYPE_CHECKING:
    from recontrast.data.datasets import Sample
    from recontrast.engine.calibrate import Calibration
    from recontrast.engine.recipes import Recipe


def evaluate(
    context: typer.Context,
    checkpoint: CheckpointFile,
    data: Data,
    category: Annotated[str | None, typer.Option(help="Name of one category. Default: all below DATA.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results.json, .csv and .md. Default: none.")] = None,
    save_maps: Annotated[
        bool, typer.Option("--save-maps", help="Also write 16-bit TIFF maps to OUT/maps; results.md has their scale.")
    ] = False,
    streaming: Annotated[
        bool,
        typer.Option("--streaming", help="Metrics of pixels from histograms: constant memory, with a proven bound."),
    ] = False,
    views: Views = None,
    precision: Precision = None,
    layout: Layout = None,
    no_fold: NoFold = False,
    compiled: Compile = False,
    batch: Batch = 16,
    workers: Workers = None,
    device: Device = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for decoded images. Default: decode anew.")] = None,
) -> None:
    """Measure a detector on test images: I-AUROC, P-AUROC, AP, F1 and AUPRO by category."""
    from recontrast.data import datasets
    from recontrast.engine import checkpoint as checkpoints
    from recontrast.engine import distributed

    if save_maps and out is None:
        raise ValueError("--save-maps: wanted a folder for them, --out DIR, got none")
    if out is not None:
        writable(out)
    how = inference(device, views, precision, layout, no_fold, compiled, workers)
    file = checkpoint_file(checkpoint)
    _, where = context.with_resource(distributed.world(device))
    groups = datasets.load(data, None if category in (None, "all") else [category])
    model, recipe, about = checkpoints.load_model(file, where)
    if about.calibration is not None and (lost := how.lost(recipe, about.calibration)) is not None:
        complain(f"warning: {file}: {lost}")
    show_metrics(
        model, groups, recipe, out, how.calibration(recipe, about.calibration),
        inference=how, workers=workers, device=where, batch=batch, cache_dir=cache, streaming=streaming,
        save_maps=save_maps,
    )  # fmt: skip


def show_metrics(
    model: Any, groups: "dict[str, list[Sample]]", recipe: "Recipe", out: Path | None,
    calibration: "Calibration | None", **options: Any
) -> None:  # fmt: skip
    """Evaluate, and say what came of it; ``options`` are those of `recontrast.app.evaluation.measure`."""
    from recontrast.app.evaluation import measure

    with Steps("evaluate") as shown:
        result, made, written = measure(
            model, groups, recipe, out, calibration=calibration,
            on_progress=lambda category, done, total: shown(done, total, category), **options,
        )  # fmt: skip
    show(result)
    if made is not None:
        typer.echo(made.sentence())
        for warning in made.warnings():
            complain(f"warning: {warning}")
    if written:
        typer.echo(f"results: {', '.join(map(str, written))}")
