"""Lines that commands print on stdout and stderr."""

import os
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    from recontrast.calibration.conformal import Calibration

MAX_MESSAGE = 2000  # characters of an error message that are printed
MAX_PRINTED_ERRORS = 20  # messages about single images that are printed
# Invisible characters that move the cursor, reorder the text or change the terminal's state.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


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
    write_stderr(f"recontrast: {rank}{make_printable(' '.join(text.splitlines()))}\n")


def print_warning(text: str) -> None:
    """Print a warning as one line on stderr; nothing if this process is silent."""
    if not is_silent():
        print_error(f"warning: {text}")


def print_image_errors(errors: Sequence[str], source: str) -> None:
    """Print one line for each image that failed, at most `MAX_PRINTED_ERRORS`; nothing if this process is silent.

    Args:
        errors: One sentence for each image, the same in every process.
        source: Where all sentences can be found.
    """
    if is_silent():
        return
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


def write_stderr(text: str) -> None:
    """Write to stderr, also after its terminal was closed: the checkpoint of a run must still be written."""
    with suppress(OSError):
        sys.stderr.write(text)


def print_data(lines: Iterable[str]) -> None:
    """Print which images are used, as `recontrast.data.datasets.describe` describes them."""
    if not is_silent():
        for line in lines:
            print_line(line)


def print_promise(calibration: "Calibration | None", noun: str = "image") -> None:
    """Print what a calibration promises, if there is one.

    Args:
        calibration: The calibration; None prints nothing.
        noun: What the detector scores, see `recontrast.recipes.recipe.Recipe.noun`.
    """
    from recontrast.calibration.conformal import describe_promise

    for line in () if calibration is None else describe_promise(calibration, noun):
        print_line(line)
