"""``recontrast export``: a detector as one file for ONNX Runtime, OpenVINO or torch.export."""

from pathlib import Path
from typing import Annotated

import typer

from recontrast.app.console import print_error
from recontrast.app.options import CheckpointFile, Views, build_inference_options, check_writable, resolve_checkpoint


def export(
    run: CheckpointFile,
    format: Annotated[str, typer.Option("--format", help="onnx, pt2 (torch.export) or openvino.")],
    out: Annotated[
        Path | None,
        typer.Option(help="File: .onnx, .pt2 or .xml (weights beside it in .bin). Default: detector.* beside RUN's."),
    ] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Images, or folders of them, on which it must agree too, besides drawn ones; repeatable."),
    ] = None,
    views: Views = None,
) -> None:
    """Write a detector as one file, from bytes of any size to score and decision, if it gives the same scores."""
    from recontrast.data.listing import list_images
    from recontrast.export.export import SUFFIXES
    from recontrast.export.export import export as write

    file = resolve_checkpoint(run)
    if out is not None or file.is_file():  # else that it is missing is what to say
        check_writable(file.parent if out is None else out.parent, "RUN" if out is None else "--out")
    if out is None:
        out = file.with_name("detector" + SUFFIXES.get(format, ""))
    how = build_inference_options("cpu", views)
    typer.echo("traced, written, opened again and compared: a minute or two")
    made = write(file, format, out, images=list_images(images) if images else [], views=how.views)
    typer.echo(
        f"scores of {made.images} images of many sizes differ by at most {made.difference:.1e} (relative) from the "
        f"checkpoint's"
    )
    for note in made.notes:
        print_error(f"warning: {note}")
    size = sum(path.stat().st_size for path in made.files) / 1e6
    typer.echo(f"outputs {', '.join(made.outputs)}, {size:.1f} MB: {', '.join(map(str, made.files))}")
