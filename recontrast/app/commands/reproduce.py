"""``recontrast reproduce``: reproduce a table of the paper."""

from pathlib import Path
from typing import Annotated

import typer

from recontrast.app.console import exit_with_error, print_line
from recontrast.app.options import (
    Device,
    Overwrite,
    check_writable,
    parse_change,
    parse_list,
    parse_numbers,
    parse_values,
    path_option,
)
from recontrast.app.progress_bar import ProgressBar
from recontrast.app.tables import print_table


def reproduce(  # 14 options and the output; `recontrast.experiments.reproduce` does the work
    name: Annotated[
        str,
        typer.Argument(metavar="TABLE", help="mvtec, visa, aptos, mvtec_unified, ablation, maps ... See the guide."),
    ],
    data: Annotated[Path, path_option(help="Data set in MVTec AD layout, or the folder of one category.")],
    out: Annotated[Path | None, path_option(help="Folder of the runs. Default: runs/TABLE.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, such as 1,11,111. Default: the recipe's.")] = None,
    categories: Annotated[
        str | None, typer.Option(help="Categories, such as screw,grid. Default: all in DATA.")
    ] = None,
    entries: Annotated[str | None, typer.Option(help="Lines of the table, such as A,E,ours. Default: all.")] = None,
    architecture: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE:NAME", help="Your own architecture as a further line; may be repeated."),
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe field; may be repeated.")
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(help="Numbers of good images of each class, such as 1,2,4; each makes lines of its own."),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="Values of any other recipe field, which make lines of their own."),
    ] = None,
    long_tail: Annotated[
        float | None,
        typer.Option(help="Images of the largest class over those of the smallest, for one detector of long tails."),
    ] = None,
    device: Device = None,
    cache: Annotated[
        Path | None, path_option(help="Folder for decoded images. Default: decode them for each run.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the checkpoints of finished runs.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Reproduce a table of the paper and print both results; a second call continues the first."""
    from recontrast.experiments.reproduce import reproduce as run
    from recontrast.runtime.device import resolve_device

    out = out or Path("runs") / name
    check_writable(out)
    if cache is not None:
        check_writable(cache, "--cache")
    if device is not None:
        resolve_device(device)
    varied = dict(map(parse_values, vary or []))
    if shots is not None:
        varied = {"shots": parse_numbers("--shots", shots), **varied}
    try:
        with ProgressBar("") as progress:
            comparison = run(
                name, data, out, seeds=parse_numbers("--seeds", seeds),
                categories=parse_list(categories), entries=parse_list(entries),
                changes=dict(map(parse_change, changes or [])), vary=varied, long_tail=long_tail,
                architectures=architecture or [],
                device=device, cache_dir=cache, keep=keep, overwrite=overwrite,
                on_step=lambda task, done, total, note: progress(done, total, f"{task}: {note}"),
            )  # fmt: skip
    except KeyboardInterrupt:
        exit_with_error(f"interrupted; the same command continues with what is in {out}", status=130)
    head, cells = comparison.cells()
    print_table(comparison.title, head, cells)
    for note in comparison.notes:
        print_line(note)
    print_line(f"comparison: {out / 'comparison.md'}, .csv, .json")
