"""Comma-separated values of an option that were separated by spaces: a message that says how to write them."""

import os
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile

# What each option takes, and whether a word is such a value: options of commands whose arguments look different.
_KINDS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "--batches": ("numbers", str.isdecimal),
    "--seeds": ("numbers", str.isdecimal),
    "--shots": ("numbers", str.isdecimal),
    "--formats": ("names", lambda word: word in ("onnx", "openvino", "pt2")),
    "--categories": ("names", lambda word: _is_value(word)),
    "--entries": ("names", lambda word: _is_value(word)),
    "--vary": ("values", lambda word: _is_value(word)),
}


def check_data(
    data: Iterable[os.PathLike[str]], option: str, given: str | None, kind: str, is_value: Callable[[str], bool]
) -> None:
    """Check that no argument for a data set is a value of an option, separated from the others by a space.

    Args:
        data: Arguments of a command that stand for data sets.
        option: Name of the option.
        given: Its comma-separated values as they were given; None without it.
        kind: What the option takes, such as "names".
        is_value: Whether a word is a value of the option.

    Raises:
        ValueError: If an argument is a value of the option, and there is no file or folder of that name.
    """
    values = [word for word in map(os.fspath, data) if is_value(word) and not os.path.lexists(word)]
    if values:
        raise ValueError(_describe("a data set", option, kind, given, values))


def check_shots(data: Iterable[os.PathLike[str]], shots: str | None) -> None:
    """Check that no data set is a value of ``--shots`` such as ``tile=16``, see `check_data`."""
    check_data(data, "--shots", shots, "numbers", lambda word: re.fullmatch(r"[^=]+=\d+", word) is not None)


def describe_spaces(args: Sequence[str], options: Iterable[str]) -> str | None:
    """Describe values of an option that were separated by spaces, which are too many arguments for the command.

    Args:
        args: Words behind the name of the command.
        options: Names of its options.

    Returns:
        What was wanted and got; None if no option with comma-separated values is followed by more of them.
    """
    for at, word in enumerate(args[:-1]):
        option, sign, value = word.partition("=")
        if option in _KINDS and option in options:
            kind, is_value = _KINDS[option]
            first, others = (value, args[at + 1 :]) if sign else (args[at + 1], args[at + 2 :])
            if values := list(takewhile(is_value, others)):
                return _describe("an option", option, kind, first, values)
    return None


def _describe(wanted: str, option: str, kind: str, given: str | None, values: Sequence[str]) -> str:
    """Return the message, with the option as it should be written."""
    joined = ",".join(word.strip(",") for word in (given or "", *values) if word.strip(","))
    return (
        f"{values[0]}: wanted {wanted}, got a value of {option}, which takes comma-separated {kind}: {option} {joined}"
    )


def _is_value(word: str) -> bool:
    """Return whether a word may be a value of `reproduce`, whose only argument is the name of a table."""
    from recontrast.experiments.paper_tables import TABLES

    return word not in TABLES and "=" not in word and not word.startswith("-")
