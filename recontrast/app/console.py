"""Terminal output of all commands: error messages, progress, tables."""

import errno
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from recontrast.evaluation.results import Result

USER_ERRORS = (
    ValueError,
    OSError,
    ImportError,
)  # caused by arguments, files or the installation: one sentence, no traceback
# Errors of the command line's syntax. Older versions of typer take them from click, newer ones have their own.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
PLAIN_EVERY = 10.0  # seconds between two progress lines if the output is not a terminal
MAX_MESSAGE = 2000  # characters of an error message that are printed
MAX_PRINTED_ERRORS = 20  # messages about single images that are printed
SIZE_OPTIONS = ("--batch", "--size", "--tile", "--images", "--teacher-cache", "--workers")  # these determine the memory
CELL_PADDING = 3  # columns of a terminal that a cell of a table needs besides its text
# Invisible characters that move the cursor, reorder the text or change the terminal's state.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Texts of allocation failures: PyTorch on a CPU and on a GPU, cuDNN, cuBLAS, C++, ONNX Runtime.
_MEMORY_TEXTS = re.compile(
    r"DefaultCPUAllocator|out of memory|can(?:no|')t allocate memory|(?:CUDNN|CUBLAS)_STATUS_ALLOC_FAILED|"
    r"bad[_ ]alloc|failed to allocate memory",
    re.IGNORECASE,
)


class Command(typer.core.TyperCommand):
    """Command whose help shows switches such as ``--overwrite`` without a value."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the arguments and options of the command, ``--help`` included."""
        return hide_values_of_switches(super().get_params(ctx))


class CommandGroup(typer.core.TyperGroup):
    """Command group that prints user errors as one sentence on stderr and exits with status 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments before the name of the command."""
        try:
            return super().parse_args(ctx, args)
        except USAGE_ERROR as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                raise
            exit_with_error(describe_usage_error(error))

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the options of the group, ``--help`` included."""
        return hide_values_of_switches(super().get_params(ctx))

    def invoke(self, ctx: Any) -> Any:
        """Run the command named in ``ctx``."""
        try:
            with print_warnings():
                return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `recontrast ... | head`: click exits quietly
        except KeyboardInterrupt:
            exit_with_error("interrupted", status=130)
        except USAGE_ERROR as error:
            exit_with_error(describe_usage_error(error))
        except Exception as error:
            is_memory = is_memory_error(error)
            if os.environ.get("RECONTRAST_DEBUG") or not (is_memory or isinstance(error, USER_ERRORS)):
                raise
            exit_with_error(self._advise_on_memory(ctx, error) if is_memory else describe_error(error))

    def _advise_on_memory(self, ctx: Any, error: BaseException) -> str:
        """Return the message about an allocation failure, with those options of the command that reduce the memory."""
        command = self.get_command(ctx, ctx.invoked_subcommand or "")
        options = {name for parameter in getattr(command, "params", ()) for name in getattr(parameter, "opts", ())}
        smaller = [option for option in SIZE_OPTIONS if option in options]
        advice = f"a smaller {' or '.join(smaller)}" if smaller else "smaller images, or end other programs"
        where = " on the GPU" if re.search("CUDA|CUDNN|CUBLAS|HIP", str(error)) else ""
        return f"out of memory{where}: try {advice}"


def is_memory_error(error: BaseException) -> bool:
    """Return whether an error means that memory could not be allocated, on the CPU or on a GPU."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # torch and ONNX Runtime have error types of their own; importing them only for this would cost seconds.
    return not isinstance(error, USER_ERRORS) and _MEMORY_TEXTS.search(f"{type(error).__name__} {error}") is not None


def hide_values_of_switches(parameters: list[Any]) -> list[Any]:
    """Keep the help from showing ``<bool>`` behind options that take no value, as some versions of Typer do."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False) and parameter.metavar is None:
            parameter.metavar = ""
    return parameters


@contextmanager
def print_warnings() -> Iterator[None]:
    """Print each warning about the data as one line on stderr; other warnings are shown as before."""
    from recontrast.data.listing import DataWarning
    from recontrast.data.notices import ImageWarning

    with warnings.catch_warnings():
        for category in (DataWarning, ImageWarning):
            warnings.filterwarnings("always", category=category)
        show = warnings.showwarning

        def print_warning(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
            if not issubclass(category, (DataWarning, ImageWarning)):
                show(message, category, *where, **options)
            elif not is_silent():
                print_error(f"warning: {message}")

        warnings.showwarning = print_warning
        yield


def describe_error(error: BaseException) -> str:
    """Describe an error in one line; ``file: reason`` if the system gave both."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def describe_usage_error(error: Any) -> str:
    """Describe an error in the syntax of a command line, such as ``--batch: wanted an integer, got 'x'``."""
    text = " ".join(error.format_message().split()).rstrip(".")
    if (invalid := re.fullmatch(r"Invalid value for '(\S+?)(?: / \S+)*': (.*)", text)) is not None:
        name, reason = invalid.groups()
        # Typer's own texts: "'x' is not a valid integer", newer "Input should be a valid integer, unable to ...".
        if (other := re.fullmatch(r"(.*) is not a valid (\w+)(?: range)?", reason)) is not None:
            reason = f"wanted a valid {other[2]}, got {other[1]}"
        elif (other := re.match(r"Input should be ([^,]*)", reason)) is not None:
            reason = f"wanted {other[1]}, got another value"
        return f"{name}: {reason}"
    names = [] if error.ctx is None else error.ctx.command_path.split()[1:]
    prefix = "".join(f"{name}: " for name in names)
    return f"{prefix}{text[:1].lower()}{text[1:]} (see {' '.join(['recontrast', *names, '--help'])})"


def make_printable(text: str) -> str:
    r"""Replace characters that a terminal cannot show, or would obey.

    Args:
        text: Text that may contain file names.

    Returns:
        The text, with control characters and bytes that are not UTF-8 written as ``\x1b``.
    """
    return _CONTROLS.sub(lambda match: _escape(ord(match[0])), text)


def _escape(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def print_line(text: str) -> None:
    """Print one line on stdout."""
    typer.echo(make_printable(text))


def print_error(text: str) -> None:
    """Print one line on stderr."""
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 4 :]}"
    rank = f"process {os.environ['RANK']}: " if is_silent() else ""
    _write_stderr(f"recontrast: {rank}{make_printable(' '.join(text.splitlines()))}\n")


def print_image_errors(errors: Sequence[str], source: str) -> None:
    """Print one line for each image that failed, at most `MAX_PRINTED_ERRORS`.

    Args:
        errors: One sentence for each image.
        source: Where all sentences can be found.
    """
    for text in errors[:MAX_PRINTED_ERRORS]:
        print_error(text)
    if len(errors) > MAX_PRINTED_ERRORS:
        print_error(f"and {len(errors) - MAX_PRINTED_ERRORS} more: {source}")


def exit_with_error(text: str, status: int = 2) -> NoReturn:
    """Print one line on stderr and exit."""
    print_error(text)
    raise typer.Exit(status)


def is_silent() -> bool:
    """Return whether this process prints nothing: under torchrun, all but the first."""
    return os.environ.get("RANK", "0") != "0"


def _write_stderr(text: str) -> None:
    """Write to stderr, also after its terminal was closed: the checkpoint of a run must still be written."""
    with suppress(OSError):
        sys.stderr.write(text)


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
            _write_stderr(f"{self._description} {done}/{total} {note}".rstrip() + "\n")

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


def print_data(lines: Iterable[str]) -> None:
    """Print which images are used, as `recontrast.data.datasets.describe` describes them."""
    if not is_silent():
        for line in lines:
            print_line(line)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout, with the first column left-aligned and a line above the last row.

    Cells are never cut. On a terminal, a table that is too wide is printed in several parts, each with the first
    column, whose text is folded if necessary. A pipe has no width, so that a table is printed in one part.
    """
    cells = [[make_printable(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    limit = Console().width if sys.stdout.isatty() else sum(widths) + CELL_PADDING * len(widths) + 1
    rest = limit - 1 - 2 * CELL_PADDING - max(widths[1:], default=0)
    first = widths[0] if sum(widths) + CELL_PADDING * len(widths) < limit else min(widths[0], max(limit // 3, 8), rest)
    first = max(first, 1)
    for part, selected in enumerate(_split_columns(widths, first, limit)):
        table = Table(title=None if part else Text(make_printable(title)), title_justify="left", box=box.HEAVY_HEAD)
        table.title_style = "bold"
        for index in selected:
            table.add_column(
                Text(cells[0][index]),
                justify="right" if index else "left",
                min_width=widths[index] if index else first,
                no_wrap=index > 0,
                overflow="fold",
            )
        for number, row in enumerate(cells[1:]):
            table.add_row(*(Text(row[index]) for index in selected), end_section=number == len(cells) - 3)
        total = first + sum(widths[index] for index in selected if index) + CELL_PADDING * len(selected) + 1
        Console(width=max(total, limit)).print(table)


def _split_columns(widths: Sequence[int], first: int, limit: int) -> Iterator[list[int]]:
    """Divide columns into groups that fit into ``limit`` columns of a terminal; each begins with the first column."""
    group, used = [0], 1 + first + CELL_PADDING
    for index, width in enumerate(widths[1:], 1):
        if used + width + CELL_PADDING > limit and len(group) > 1:
            yield group
            group, used = [0], 1 + first + CELL_PADDING
        group.append(index)
        used += width + CELL_PADDING
    yield group


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
            print_line(f"{row.category}: {row.note}")
