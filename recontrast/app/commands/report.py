"""``recontrast report``: one HTML file about a run."""

from pathlib import Path
from typing import Annotated

import typer

from recontrast.app.console import ProgressBar
from recontrast.app.options import Batch, CheckpointFile, Device, check_writable, resolve_checkpoint
from recontrast.app.report.write import write_report


def report(
    run: CheckpointFile,
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[DATA]", help="Data sets or categories in MVTec AD layout. Default: that it was last evaluated on."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file. Default: report.html in the folder of the run.")] = None,
    category: Annotated[
        str | None, typer.Option(help="Name of one, or all. Default: what it was trained on, where DATA has it.")
    ] = None,
    images: Annotated[int, typer.Option(help="In the gallery at most, the worst errors first.", min=1)] = 300,
    batch: Batch = 16,
    device: Device = None,
) -> None:
    """Write one HTML file: metrics, threshold, curves, and the images sorted by error."""
    if out is not None or resolve_checkpoint(run).is_file():  # else that it is missing is what to say
        check_writable(resolve_checkpoint(run).parent if out is None else out.parent, "RUN" if out is None else "--out")
    with ProgressBar("report") as shown:
        made = write_report(
            run, data or [], out, category=category, images=images, batch=batch, device=device,
            on_progress=lambda name, done, total: shown(done, total, name),
        )  # fmt: skip
    left = "" if made.shown == made.images else f", {made.shown} of them shown"
    typer.echo(f"report of {made.images} images{left}, {made.bytes / 1e6:.1f} MB: {made.path}")
