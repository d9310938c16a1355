"""The ``recontrast`` command. What is heavy is imported by the command that needs it, so that ``--help`` is quick."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from recontrast.app.calibrate import calibrate
from recontrast.app.console import Commands, Steps, show, silent, stop, table
from recontrast.app.evaluate_command import evaluate
from recontrast.app.export import export
from recontrast.app.options import Device, change, numbers, split, writable
from recontrast.app.predict_command import predict
from recontrast.app.prepare import prepare
from recontrast.app.report.command import report
from recontrast.app.train_command import train

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Visual anomaly detection by contrastive reconstruction: train on good images, find what is not like them.",
)


def main() -> None:
    """Run the command line."""
    if silent():
        sys.stdout = open(os.devnull, "w")
    app(prog_name="recontrast")


def _version(wanted: bool) -> None:
    if wanted:
        import recontrast

        typer.echo(f"recontrast {recontrast.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


app.command()(train)


@app.command()
def reproduce(
    name: Annotated[
        str, typer.Argument(metavar="TABLE", help="mvtec, visa, aptos, mvtec_unified, ablation, maps ... (see README).")
    ],
    data: Annotated[Path, typer.Option(help="Data set in MVTec AD layout, or the folder of one category.")],
    out: Annotated[Path | None, typer.Option(help="Folder of its runs. Default: runs/TABLE.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 1,11,111. Default: the recipe's.")] = None,
    categories: Annotated[str | None, typer.Option(help="Such as screw,grid. Default: all below DATA.")] = None,
    entries: Annotated[str | None, typer.Option(help="Lines of the table, such as A,E,ours. Default: all.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any field of the recipe; repeatable.")
    ] = None,
    device: Device = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for decoded images. Default: decode for each run.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the checkpoints of finished runs.")] = False,
) -> None:
    """Run a table of the paper again, and print ours beside its numbers; a second call goes on."""
    from recontrast.engine.reproduce import reproduce as run

    out = out or Path("runs") / name
    writable(out)
    try:
        with Steps("") as shown:
            found = run(
                name, data, out, seeds=numbers("--seeds", seeds),
                categories=split(categories), entries=split(entries), changes=dict(map(change, changes or [])),
                device=device, cache_dir=cache, keep=keep,
                on_step=lambda what, done, total, note: shown(done, total, f"{what}: {note}"),
            )  # fmt: skip
    except KeyboardInterrupt:
        stop(f"interrupted; the same command goes on with what is in {out}", status=130)
    head, cells = found.cells()
    table(found.title, head, cells)
    for note in found.notes:
        typer.echo(note)
    typer.echo(f"comparison: {out / 'comparison.md'}, .csv, .json")


app.command()(evaluate)
app.command()(calibrate)
app.command()(predict)
app.command()(export)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures, checkpoint, results and heat maps.")] = Path("demo"),
    steps: Annotated[int | None, typer.Option(help="Of training. Default: 150, 20 with --short.")] = None,
    short: Annotated[bool, typer.Option("--short", help="Under a minute: shows that it works, not how well.")] = False,
    seed: Annotated[int, typer.Option(help="Of pictures, weights and order.")] = 0,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also without the trained encoder, in the map and in training, and with an untrained decoder.",
        ),
    ] = False,
    device: Device = None,
) -> None:
    """Train one detector for three photographed surfaces with drawn defects: minutes on a CPU, nothing to download."""
    from recontrast.app import demo as demonstration

    writable(out)
    with Steps("train") as shown:
        found = demonstration.run(
            out, steps=steps, seed=seed, short=short, compare=compare, device=device,
            on_step=lambda variant, step, steps, loss, rate: shown(
                step, steps, f"{variant}: loss {loss:.4f}, {rate:.1f} images/s"),
        )  # fmt: skip
    for variant, result in found.results.items():
        show(result, variant)
    typer.echo(f"trained in {found.seconds:.0f} s; heat maps: {', '.join(map(str, found.sheets))}")
    typer.echo(
        f"try: recontrast predict {found.checkpoint} {out / 'data' / 'brick' / 'test'} --out {out / 'predicted'}"
    )


app.command()(prepare)
app.command()(report)


@app.command()
def info() -> None:
    """Print versions, devices, and which kernels run and why."""
    from recontrast.app.about import about

    for name, value in about().items():
        typer.echo(f"{name:<18} {value}")
