"""Terminal output of all commands: error messages, progress, tables."""

import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from recontrast.evaluation.evaluate import Result

USER_ERRORS = (
    ValueError,
    OSError,
    ImportError,
)  # caused by arguments, files or the installation: one sentence, no traceback
PLAIN_EVERY = 10.0  # seconds between two progress lines if the output is not a terminal


class CommandGroup(typer.core.TyperGroup):
    """Command group that prints user errors as one sentence on stderr and exits with status 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command named in ``ctx``."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `recontrast ... | head`: click exits quietly
        except KeyboardInterrupt:
            exit_with_error("interrupted", status=130)
        except Exception as error:
            # Compared by name, so that torch is not imported only for this.
            memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            if os.environ.get("RECONTRAST_DEBUG") or not (memory or isinstance(error, USER_ERRORS)):
                raise
            exit_with_error("out of memory: try a smaller --batch or --size" if memory else describe_error(error))


def describe_error(error: BaseException) -> str:
    """Describe an error in one line; ``file: reason`` if the system gave both."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def print_error(text: str) -> None:
    """Print one line on stderr."""
    rank = f"process {os.environ['RANK']}: " if is_silent() else ""
    sys.stderr.write(f"recontrast: {rank}{text}\n")


def exit_with_error(text: str, status: int = 2) -> NoReturn:
    """Print one line on stderr and exit."""
    print_error(text)
    raise typer.Exit(status)


def is_silent() -> bool:
    """Return whether this process prints nothing: under torchrun, all but the first."""
    return os.environ.get("RANK", "0") != "0"


class ProgressBar:
    """Progress on stderr: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, task: str) -> None:
        """Create the bar of a task; it is shown inside a ``with`` block."""
        self._description, self._next = task, 0.0
        self._bar: Progress | None = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` items are finished, with a note such as the loss."""
        if is_silent():
            return
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif done == total or time.monotonic() >= self._next:
            self._next = time.monotonic() + PLAIN_EVERY
            sys.stderr.write(f"{self._description} {done}/{total} {note}".rstrip() + "\n")

    def __enter__(self) -> "ProgressBar":
        """Show the bar if stderr is a terminal."""
        console = Console(stderr=True)
        if console.is_terminal and not is_silent():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console).__enter__()
            self._task = self._bar.add_task(self._description, total=None, note="")
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop updating the bar; it stays on the screen."""
        if self._bar:
            self._bar.__exit__(*error)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout, with the first column left-aligned and a line above the last row."""
    rows = list(rows)
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for index, row in enumerate(rows):
        table.add_row(*row, end_section=index == len(rows) - 2)
    # A pipe has no width, and rich would cut the table to 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(table)


def print_result(result: "Result", title: str = "") -> None:
    """Print the metrics of a result in percent."""
    from recontrast.evaluation.results import METRICS

    rows = [*result.rows, *([result.mean] if len(result.rows) > 1 else [])]
    names = [name for name in METRICS if any(getattr(row, name) is not None for row in rows)]
    cells = [
        [row.category, *("-" if (v := getattr(row, name)) is None else f"{100 * v:.2f}" for name in names)]
        for row in rows
    ]
    print_table(title, ["category", *(METRICS[name] for name in names)], cells)
    for row in rows:
        if row.note:
            typer.echo(f"{row.category}: {row.note}")
