"""``recontrast report``: one HTML file about a run."""

from pathlib import Path
from typing import Annotated

import typer

from recontrast.app.console import print_image_errors, print_line, print_warning
from recontrast.app.options import (
    Batch,
    CheckpointFile,
    Device,
    Overwrite,
    check_writable,
    path_argument,
    path_option,
    resolve_checkpoint,
)
from recontrast.app.progress_bar import ProgressBar
from recontrast.app.report.write import write_report
from recontrast.data.own_files import check_replaceable


def report(
    run: CheckpointFile,
    data: Annotated[
        list[Path] | None,
        path_argument(
            "[DATA]", "Data sets or categories in MVTec AD layout, or lists. Default: what it was last evaluated on."
        ),
    ] = None,
    out: Annotated[
        Path | None, path_option(help="Path of the file. Default: report.html in the folder of the run.")
    ] = None,
    category: Annotated[
        str | None, typer.Option(help="Name of a category, or all. Default: what it was trained on, if DATA has it.")
    ] = None,
    images: Annotated[
        int, typer.Option(help="Largest number of images in the gallery, worst errors first.", min=1)
    ] = 300,
    roi: Annotated[
        Path | None,
        path_option(
            help="Another region of interest, as in train; the calibration does not hold for it. Default: as trained."
        ),
    ] = None,
    batch: Batch = 16,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Write one HTML file: metrics, threshold, curves, and the images sorted by error."""
    if out is not None or resolve_checkpoint(run).is_file():  # a missing file has its own message
        check_writable(resolve_checkpoint(run).parent if out is None else out.parent, "RUN" if out is None else "--out")
    target = resolve_checkpoint(run).with_name("report.html") if out is None else out
    check_replaceable(target.parent, [target.name], overwrite=overwrite, inputs=[resolve_checkpoint(run)])
    with ProgressBar("report") as progress:
        written = write_report(
            run, data or [], out, category=category, images=images, batch=batch, device=device, roi=roi,
            on_progress=lambda name, done, total: progress(done, total, name),
        )  # fmt: skip
    if written.note is not None:
        print_warning(written.note)
    limited = "" if written.shown == written.images else f", {written.shown} of them shown"
    print_line(f"report of {written.images} images{limited}, {written.bytes / 1e6:.1f} MB: {written.path}")
    print_image_errors(written.errors, f"see {written.path}")
    if written.errors:
        raise typer.Exit(2)
