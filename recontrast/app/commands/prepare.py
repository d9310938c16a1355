"""``recontrast prepare``: convert an original download into MVTec AD layout."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recontrast.app.console import print_line, print_warning
from recontrast.app.options import check_writable, path_option
from recontrast.app.progress_bar import ProgressBar
from recontrast.app.tables import print_table

if TYPE_CHECKING:
    from recontrast.data.prepare import Counts


def prepare(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="mvtec, visa, aptos, oct2017, isic2018, mvtec_loco, mvtec_ad_2, mvtec_3d, btad, mpdd, real_iad, "
            "kolektor_sdd, kolektor_sdd2, dagm2007, aitex, bmad or ham10000.",
        ),
    ],
    source: Annotated[Path, path_option(help="Folder of the unpacked original download.")],
    out: Annotated[
        Path | None, path_option(help="New folder in MVTec AD layout. Default: only check and count.")
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy every file. Default: hard or symbolic links where possible.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Threads. Default: one per CPU.", min=1)] = None,
) -> None:
    """Convert a data set into MVTec AD layout, and check its counts."""
    from recontrast.data.prepare import prepare as run
    from recontrast.data.prepare import sum_counts

    if out is not None:
        check_writable(out)
    with ProgressBar(f"prepare {name}") as progress:
        prepared = run(name, source, out, link=not copy, workers=workers, on_progress=progress)
    rows = [_row(category, counts, prepared.published.get(category)) for category, counts in prepared.counts.items()]
    if len(rows) > 1 and not prepared.own_split:
        published = prepared.total or (sum_counts(prepared.published) if prepared.published else None)
        rows.append(_row("all", sum_counts(prepared.counts), published))
    columns = [text for key in ("train", "test", "good of test") for text in (key, "published")]
    print_table(f"{name} in {prepared.source}", ["category", *columns], rows)
    for text in prepared.warnings:
        print_warning(text)
    if prepared.title:
        print_line(prepared.title)
    if prepared.own_split:
        print_line("no split is published: images with a defect and a fifth of the good ones, by name, are test images")
    if not prepared.published and prepared.total is None:
        print_line("the counts are not compared with published ones")
    elif not prepared.warnings:
        print_line("all counts match the published ones")
    if out is not None:
        print_line(f"{', '.join(f'{number} {way}' for way, number in prepared.files.items())}: {out}")


def _row(name: str, counts: "Counts", published: "Counts | None") -> list[str]:
    """Return a table row: the name, and each count beside the published one."""
    pairs = [(getattr(counts, key), getattr(published, key, None)) for key in ("train", "test", "good")]
    return [name, *("-" if number is None else str(number) for pair in pairs for number in pair)]
