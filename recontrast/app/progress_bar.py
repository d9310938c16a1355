"""Progress of a command on stderr."""

import time
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from recontrast.app.console import is_silent, make_printable, write_stderr

PLAIN_EVERY = 10.0  # seconds between two progress lines if the output is not a terminal


class ProgressBar:
    """Progress on stderr: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, task: str) -> None:
        """Create the bar of a task; it is shown inside a ``with`` block."""
        self._description, self._next = make_printable(task), 0.0
        self._bar: Progress | None = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` items are finished, with a note such as the loss."""
        if is_silent():
            return
        note = make_printable(note)
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif done == total or time.monotonic() >= self._next:
            self._next = time.monotonic() + PLAIN_EVERY
            write_stderr(f"{self._description} {done}/{total} {note}".rstrip() + "\n")

    def __enter__(self) -> "ProgressBar":
        """Show the bar if stderr is a terminal."""
        console = Console(stderr=True)
        if console.is_terminal and not is_silent():
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console).__enter__()
            self._task = self._bar.add_task(self._description, total=None, note="")
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop updating the bar; it stays on the screen."""
        if self._bar:
            with suppress(OSError):  # the terminal was closed
                self._bar.__exit__(*error)
