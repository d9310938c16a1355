"""The ``recontrast`` command: registers the commands, which import heavy packages only when they run."""

import io
import os
import sys
from typing import Annotated

import typer

from recontrast.app.command_group import Command, CommandGroup
from recontrast.app.commands.audit import audit
from recontrast.app.commands.benchmark import benchmark
from recontrast.app.commands.calibrate import calibrate
from recontrast.app.commands.compare import compare
from recontrast.app.commands.demo import demo
from recontrast.app.commands.doctor import doctor
from recontrast.app.commands.evaluate import evaluate
from recontrast.app.commands.export import export
from recontrast.app.commands.info import info
from recontrast.app.commands.list import list_images
from recontrast.app.commands.predict import predict
from recontrast.app.commands.prepare import prepare
from recontrast.app.commands.report import report
from recontrast.app.commands.reproduce import reproduce
from recontrast.app.commands.serve import serve
from recontrast.app.commands.train import train
from recontrast.app.commands.watch import watch
from recontrast.app.console import is_silent
from recontrast.app.option_groups import add_imports, add_threads
from recontrast.runtime.termination import interrupt_on_termination

app = typer.Typer(
    cls=CommandGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Visual anomaly detection (ReContrast): train on good images, find defects in new ones.",
)


def main() -> None:
    """Run the command line."""
    interrupt_on_termination()
    if is_silent():
        sys.stdout = open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # file names may have characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="recontrast")


def _print_version(is_requested: bool) -> None:
    if is_requested:
        import recontrast

        typer.echo(f"recontrast {recontrast.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


for command in (train, compare, reproduce, evaluate, calibrate, predict, export, benchmark, serve, watch, report):
    runs_network = command in (train, evaluate, calibrate, predict, serve, watch)
    app.command(cls=Command)(add_threads(add_imports(command)) if runs_network else add_imports(command))
for command in (audit, demo, prepare, info, doctor):
    app.command(cls=Command)(command)
app.command("list", cls=Command)(list_images)
