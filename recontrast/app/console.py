"""What the commands share on the terminal: errors as one sentence, progress, tables."""

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

USER_ERRORS = (ValueError, OSError, ImportError)  # a wrong argument, file or installation: one sentence, no traceback
PLAIN_EVERY = 10.0  # seconds between two lines of progress where the output is not a terminal


class Commands(typer.core.TyperGroup):
    """The group of commands; errors that a user can mend become one sentence on stderr and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that ``ctx`` names."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `recontrast ... | head`: click ends quietly
        except KeyboardInterrupt:
            exit_with_error("interrupted", status=130)
        except Exception as error:
            # By name: torch is not imported for a command that failed without it.
            memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            if os.environ.get("RECONTRAST_DEBUG") or not (memory or isinstance(error, USER_ERRORS)):
                raise
            exit_with_error("out of memory: try a smaller --batch or --size" if memory else describe_error(error))


def describe_error(error: BaseException) -> str:
    """An error in one line, ``file: reason`` where the system gave both."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def print_error(text: str) -> None:
    """One line on stderr."""
    who = f"process {os.environ['RANK']}: " if is_silent() else ""
    sys.stderr.write(f"recontrast: {who}{text}\n")


def exit_with_error(text: str, status: int = 2) -> NoReturn:
    """One line on stderr, then exit."""
    print_error(text)
    raise typer.Exit(status)


def is_silent() -> bool:
    """Whether this is a process of torchrun that leaves speaking to the first."""
    return os.environ.get("RANK", "0") != "0"


class ProgressBar:
    """Progress of counted work on stderr: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, what: str) -> None:
        """``what`` is being done."""
        self._what, self._next = what, 0.0
        self._bar: Progress | None = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` are finished; ``note`` says how it goes."""
        if is_silent():
            return
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif done == total or time.monotonic() >= self._next:
            self._next = time.monotonic() + PLAIN_EVERY
            sys.stderr.write(f"{self._what} {done}/{total} {note}".rstrip() + "\n")

    def __enter__(self) -> "ProgressBar":
        """Show the bar, where there is a terminal."""
        console = Console(stderr=True)
        if console.is_terminal and not is_silent():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console).__enter__()
            self._task = self._bar.add_task(self._what, total=None, note="")
        return self

    def __exit__(self, *error: Any) -> None:
        """Leave the bar as it is."""
        if self._bar:
            self._bar.__exit__(*error)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout: the first column to the left, the others to the right, the last row set off."""
    rows = list(rows)
    shown = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="right" if index else "left", no_wrap=True)
    for index, row in enumerate(rows):
        shown.add_row(*row, end_section=index == len(rows) - 2)
    # A pipe has no width: without one, rich would cut the table to 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    console.print(shown)


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
