"""Groups of options: a command takes a group as one argument, and typer sees each of its options."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

from recontrast.app.console import print_error
from recontrast.app.options import Imports, Threads


def expand_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options.

    Args:
        command: Function of the command. A parameter whose type is a dataclass stands for the fields of this class,
            each of which is an option. An option that the command declares itself, with help of its own, is not added,
            but the group has its value as well.

    Returns:
        The command, with the options in place of their groups.
    """
    signature, hints = inspect.signature(command), get_type_hints(command, include_extras=True)
    groups = {name: hints[name] for name in signature.parameters if is_dataclass(hints.get(name))}
    own = signature.parameters.keys() - groups.keys()

    @functools.wraps(command)
    def run(**values: Any) -> None:
        arguments = {name: values[name] for name in own}
        for name, group in groups.items():
            arguments[name] = group(**{field.name: values[field.name] for field in fields(group)})
        command(**arguments)

    parameters: dict[str, inspect.Parameter] = {}
    for name, parameter in signature.parameters.items():
        if name in groups:
            added = _list_parameters(groups[name])
            parameters |= {option.name: option for option in added if option.name not in own | parameters.keys()}
        else:
            parameters[name] = parameter.replace(annotation=hints[name], kind=parameter.KEYWORD_ONLY)
    run.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return run


def _list_parameters(group: Any) -> list[inspect.Parameter]:
    """Return the fields of a dataclass as parameters."""
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[field.name],
            default=inspect.Parameter.empty if field.default is MISSING else field.default,
        )
        for field in fields(group)
    ]  # fmt: skip


def add_imports(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option ``--import`` to a command, which imports the modules before the command runs.

    Args:
        command: Function of the command.

    Returns:
        The command with the option.
    """

    @functools.wraps(command)
    def run(*arguments: Any, imports: list[str] | None = None, **values: Any) -> None:
        if imports:
            from recontrast.registration import import_architectures

            for module in imports:
                import_architectures(module)
        command(*arguments, **values)

    return _declare_option(run, command, "imports", Imports)


def add_threads(command: Callable[..., None]) -> Callable[..., None]:
    """Add the option ``--threads`` to a command, see `recontrast.runtime.threads.choose_threads`.

    Args:
        command: Function of the command.

    Returns:
        The command with the option.
    """

    @functools.wraps(command)
    def run(*arguments: Any, threads: int | None = None, **values: Any) -> None:
        from recontrast.runtime.threads import choose_threads

        if threads is not None and threads < 1:
            raise ValueError(f"--threads: wanted at least 1, got {threads}")
        with choose_threads(threads, print_error):
            command(*arguments, **values)

    return _declare_option(run, command, "threads", Threads)


def _declare_option(run: Any, command: Callable[..., None], name: str, annotation: Any) -> Callable[..., None]:
    """Give a wrapper the signature of the command that it wraps, with one more option, for typer."""
    signature, hints = inspect.signature(command), get_type_hints(command, include_extras=True)
    option = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    parameters = [p.replace(annotation=hints.get(key, p.annotation)) for key, p in signature.parameters.items()]
    run.__signature__ = inspect.Signature([*parameters, option])
    run.__annotations__ = {**hints, name: annotation}
    return run
