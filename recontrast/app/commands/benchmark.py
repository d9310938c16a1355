"""``recontrast benchmark``: what runs fastest on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recontrast.app.console import print_line
from recontrast.app.options import DetectorFile, Device, check_writable, parse_numbers, path_option, resolve_checkpoint
from recontrast.app.progress_bar import ProgressBar
from recontrast.app.tables import print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from recontrast.app.benchmark_job import Timing


def benchmark(  # 10 options and their checks; `recontrast.app.benchmark_job` does the work
    detector: DetectorFile,
    file: Annotated[
        list[Path] | None,
        path_option(help="Exported file of the same detector to time as well; may be repeated."),
    ] = None,
    formats: Annotated[
        str,
        typer.Option(help="Formats to export a checkpoint to for this, in a temporary folder: onnx,openvino. Minutes."),
    ] = "",
    export: Annotated[
        bool,
        typer.Option(
            "--export",
            help="Export a checkpoint to all formats whose runtime is installed, in a temporary folder: float32, "
            "OpenVINO in bfloat16 and, with --images, int8. Minutes.",
        ),
    ] = False,
    images: Annotated[
        list[Path] | None,
        path_option(
            help="Good images or folders of them, whose scores are compared and from which int8 takes the ranges of "
            "values. Default: generated images, and no int8."
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest relative difference of a score of what is recommended.")
    ] = 0.02,
    batches: Annotated[str, typer.Option(help="Numbers of images per call.")] = "1,16",
    seconds: Annotated[float, typer.Option(help="Time for each way at each number of images.")] = 5.0,
    out: Annotated[Path | None, path_option(help="JSON file for the figures. Default: print them only.")] = None,
    device: Device = None,
) -> None:
    """Time the ways to run a detector on this machine, and recommend one."""
    import json
    import tempfile

    from recontrast.app.benchmark_job import export_files, list_formats, open_ways, recommend, time_ways
    from recontrast.data.atomic import replace_file
    from recontrast.data.listing import list_images
    from recontrast.export.low_precision import check_tolerance
    from recontrast.inference.detector import is_exported

    counts = parse_numbers("--batches", batches)
    if not counts or min(counts) < 1:
        raise ValueError(f"--batches: wanted numbers of at least 1 image, got {batches!r}")
    if not 0 < seconds < 3600:
        raise ValueError(f"--seconds: wanted a time above 0 and below 3600, got {seconds:g}")
    path, files = resolve_checkpoint(detector), list(file or [])
    for item in files:
        if not is_exported(item):
            raise ValueError(f"--file: wanted a file that ends in .onnx, .xml or .pt2, got {item}")
    kinds = [kind.strip() for kind in formats.split(",") if kind.strip()]
    if (kinds or export) and is_exported(path):
        raise ValueError(f"{'--formats' if kinds else '--export'}: wanted a checkpoint to export, got {path}")
    if export:
        kinds = list(dict.fromkeys([*kinds, *list_formats()]))
    check_tolerance(tolerance)
    good = list_images(images) if images else []
    if out is not None:
        check_writable(out.parent)
    with tempfile.TemporaryDirectory(prefix="recontrast-benchmark-") as folder:
        files += export_files(path, kinds, good, Path(folder), print_line)
        with ProgressBar("benchmark") as progress:
            timings = time_ways(open_ways(path, files, device), counts, seconds, progress, good)
    _print_timings(timings, counts)
    print_line(recommend(timings, counts[0], tolerance))
    if out is not None:
        with replace_file(out) as target_file:
            target_file.write((json.dumps([timing.to_dict() for timing in timings], indent=1) + "\n").encode())


def _print_timings(timings: "Sequence[Timing]", batches: "Sequence[int]") -> None:
    """Print speed, latency, memory and difference of scores of each way."""
    columns = ["", *(f"{name}, batch {b}" for b in batches for name in ("images/s", "p50 ms", "p99 ms"))]
    rows = []
    for timing in timings:
        cells = [timing.name]
        for batch in batches:
            cells.append(f"{timing.images_per_second(batch):.1f}")
            cells += [f"{1000 * timing.latency(batch, share):.1f}" for share in (0.5, 0.99)]
        memory = "" if timing.memory is None else f"{timing.memory / 1e6:.0f}"
        rows.append([*cells, memory, f"{100 * timing.change:.3f}"])
    print_table("", [*columns, "memory MB", "scores differ, %"], rows)
