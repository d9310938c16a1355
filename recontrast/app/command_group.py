"""Commands and their group for Typer: user errors become one sentence on stderr, warnings about the data one line."""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

from recontrast.app.comma_separated import describe_spaces
from recontrast.app.console import exit_with_error, print_warning
from recontrast.app.errors import USER_ERRORS, describe_error, describe_usage_error, is_memory_error

# Errors of the command line's syntax. Older versions of typer take them from click, newer ones have their own.
USAGE_ERROR: Any = typer.BadParameter.__mro__[1]
SIZE_OPTIONS = ("--batch", "--size", "--tile", "--images", "--teacher-cache", "--workers")  # these determine the memory


class Command(typer.core.TyperCommand):
    """Command whose help shows switches such as ``--overwrite`` without a value, and that takes ``--window 0 9``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the command."""
        words = list(args)  # the parser takes them away
        try:
            return super().parse_args(ctx, join_numbers("--window", args))
        except USAGE_ERROR as error:
            if (text := describe_spaces(words, [name for option in self.params for name in option.opts])) is None:
                raise
            raise ValueError(text) from error

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


def join_numbers(option: str, args: list[str]) -> list[str]:
    """Join two numbers behind an option, which may have a word as well, to one value: ``0 9`` to ``0,9``."""
    at = args.index(option) + 1 if option in args else len(args)
    return [*args[:at], ",".join(args[at : at + 2]), *args[at + 2 :]] if _are_numbers(args[at : at + 2]) else args


def _are_numbers(words: list[str]) -> bool:
    try:
        return len([float(word) for word in words]) == 2
    except ValueError:
        return False


def hide_values_of_switches(parameters: list[Any]) -> list[Any]:
    """Keep the help from showing ``<bool>`` behind options that take no value, as some versions of Typer do."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False) and parameter.metavar is None:
            parameter.metavar = ""
    return parameters


@contextmanager
def print_warnings() -> Iterator[None]:
    """Print each warning of this package as one line on stderr; other warnings are shown as before."""
    from recontrast.data.listing import DataWarning
    from recontrast.data.notices import ImageWarning

    with warnings.catch_warnings():
        for category in (DataWarning, ImageWarning):
            warnings.filterwarnings("always", category=category)
        show = warnings.showwarning

        def show_warning(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
            if not category.__module__.startswith("recontrast."):
                show(message, category, *where, **options)
            else:
                print_warning(str(message))

        warnings.showwarning = show_warning
        yield
