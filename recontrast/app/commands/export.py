"""``recontrast export``: write a detector as one file for ONNX Runtime, OpenVINO or torch.export."""

from pathlib import Path
from typing import Annotated

import typer

from recontrast.app.console import print_error, print_line
from recontrast.app.options import (
    CheckpointFile,
    Overwrite,
    Views,
    build_inference_options,
    check_writable,
    path_option,
    resolve_checkpoint,
)


def export(
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
            help="Images or folders on which the scores are compared, besides generated ones; may be repeated."
        ),
    ] = None,
    views: Views = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a detector as one file with resize, network and decision; keep it only if the scores agree."""
    from recontrast.data.listing import list_images
    from recontrast.data.own_files import check_replaceable
    from recontrast.export.export import SUFFIXES, check_target
    from recontrast.export.export import export as write

    file = resolve_checkpoint(run)
    if out is not None or file.is_file():  # a missing file has its own message
        check_writable(file.parent if out is None else out.parent, "RUN" if out is None else "--out")
    if out is None:
        out = file.with_name("detector" + SUFFIXES.get(format, ""))
    check_target(format, out)
    weights = [out.with_suffix(".bin").name] if out.suffix.lower() == ".xml" else []
    check_replaceable(out.parent, [out.name, *weights], overwrite=overwrite, inputs=[file])
    inference = build_inference_options("cpu", views)
    result = write(
        file, format, out, images=list_images(images) if images else [], views=inference.views,
        on_start=lambda: print_line("tracing, writing, reopening and comparing takes a minute or two"),
    )  # fmt: skip
    print_line(
        f"scores of {result.images} images of many sizes differ by at most {result.difference:.1e} (relative) from the "
        f"checkpoint's"
    )
    for note in result.notes:
        print_error(f"warning: {note}")
    size = sum(path.stat().st_size for path in result.files) / 1e6
    print_line(f"outputs {', '.join(result.outputs)}, {size:.1f} MB: {', '.join(map(str, result.files))}")
