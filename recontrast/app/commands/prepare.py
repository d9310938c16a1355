"""``recontrast prepare``: an original download becomes a data set that the other commands read."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recontrast.app.console import ProgressBar, print_error, print_table
from recontrast.app.options import check_writable

if TYPE_CHECKING:
    from recontrast.data.prepare import Counts


def prepare(
    name: Annotated[str, typer.Argument(metavar="NAME", help="mvtec, visa, aptos, oct2017 or isic2018.")],
    source: Annotated[Path, typer.Option(help="Folder to which the original download was unpacked.")],
    out: Annotated[
        Path | None, typer.Option(help="New folder for it in MVTec AD layout. Default: none, only check and count.")
    ] = None,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy every file. Default: link (hard, else symbolic) where possible.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Threads. Default: one per CPU.", min=1)] = None,
) -> None:
    """Bring a data set of the paper into the layout that is read here, and check its counts."""
    from recontrast.data.prepare import prepare as run
    from recontrast.data.prepare import sum_counts

    if out is not None:
        check_writable(out)
    with ProgressBar(f"prepare {name}") as shown:
        made = run(name, source, out, link=not copy, workers=workers, on_progress=shown)
    rows = [_row(category, found, made.published.get(category)) for category, found in made.counts.items()]
    if len(rows) > 1:
        rows.append(_row("all", sum_counts(made.counts), sum_counts(made.published)))
    columns = [text for key in ("train", "test", "good of test") for text in (key, "published")]
    print_table(f"{name} in {made.source}", ["category", *columns], rows)
    for text in made.warnings:
        print_error(f"warning: {text}")
    if not made.warnings:
        typer.echo("all counts are the published ones")
    if out is not None:
        typer.echo(f"{', '.join(f'{number} {way}' for way, number in made.files.items())}: {out}")


def _row(name: str, found: "Counts", published: "Counts | None") -> list[str]:
    """Name, and every number beside the published one."""
    pairs = [(getattr(found, key), getattr(published, key, None)) for key in ("train", "test", "good")]
    return [name, *("-" if number is None else str(number) for pair in pairs for number in pair)]
