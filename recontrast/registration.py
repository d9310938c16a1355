"""Architectures of users: registered by name, or imported from a module that the user names.

A name in a file, such as the recipe of a checkpoint, never imports anything: it is only looked up among the
architectures that were registered before.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from recontrast.architectures import ARCHITECTURES, Architecture
from recontrast.recipes.describe import describe_value
from recontrast.recipes.recipe import Recipe
from recontrast.recipes.validation import ARCHITECTURE_FIELDS, ONE_PASS, OWN_OPTIONS, SHARED_FIELDS, is_own_name

_IMPORTED: dict[str, None] = {}  # names of the modules, in order


def register_architecture(name: str, architecture: Architecture) -> None:
    """Register an architecture of your own, so that recipes, commands and checkpoints can name it.

    `import_architectures` does this for all architectures of a module. The form of the name is that of entry points
    (https://packaging.python.org/en/latest/specifications/entry-points).

    Args:
        name: Name as "MODULE:NAME", such as "my_networks:SMALL". Names without a colon are those of this package.
        architecture: How a recipe builds, trains or fits the network.

    Raises:
        ValueError: If the name is not of this form or taken, or the architecture is not complete.
    """
    if not is_own_name(name):
        raise ValueError(
            f"register_architecture: name: wanted a text such as 'module:NAME', got {describe_value(name)}"
        )
    if not isinstance(architecture, Architecture):
        kind = type(architecture).__name__
        raise ValueError(f"register_architecture: {name}: wanted a recontrast.Architecture, got {kind}")
    if ARCHITECTURES.get(name, architecture) is not architecture:
        raise ValueError(f"register_architecture: name: wanted one that is not taken, got {name!r}")
    if (architecture.compute_loss is None) == (architecture.fit is None):
        got = "neither" if architecture.fit is None else "both"
        raise ValueError(f"register_architecture: {name}: wanted either compute_loss or fit, got {got}")
    if unknown := [field for field in architecture.fields if field not in SHARED_FIELDS]:
        known = ", ".join(sorted(SHARED_FIELDS))
        raise ValueError(f"register_architecture: {name}: fields: wanted some of {known}, got {unknown[0]!r}")
    _add(name, architecture)
    try:
        Recipe(architecture=name, options=architecture.options, **architecture.settings)
    except (TypeError, ValueError) as error:
        _remove(name)
        raise ValueError(f"register_architecture: {name}: {error}") from error


def import_architectures(module: str) -> list[str]:
    """Import a module, which runs its code, and register its architectures as "MODULE:NAME".

    The form of the names is that of entry points (https://packaging.python.org/en/latest/specifications/entry-points).

    Modules in the current folder are found after those that are installed.

    Args:
        module: Dotted name of the module.

    Returns:
        Names of the architectures, in the order of the module.

    Raises:
        ValueError: If the module cannot be imported, or has no architecture.
    """
    if not is_own_name(f"{module}:NAME"):
        raise ValueError(f"--import: wanted the name of a module, got {describe_value(module)}")
    content = vars(_import(module))
    own = {name: value for name, value in content.items() if isinstance(value, Architecture)}
    if not own:
        raise ValueError(f"--import: wanted a module with a recontrast.Architecture, got none in {module}")
    for name, value in own.items():
        register_architecture(f"{module}:{name}", value)
    _IMPORTED[module] = None
    return [f"{module}:{name}" for name in own]


def import_architecture(name: str) -> str:
    """Import an architecture that the user names, unless it is registered already.

    Args:
        name: Name of an architecture of this package, which is returned, or "MODULE:NAME".

    Returns:
        The name.

    Raises:
        ValueError: If the module cannot be imported, or the name is not that of an architecture in it.
    """
    if not is_own_name(name) or name in ARCHITECTURES:
        return name
    module, _, attribute = name.partition(":")
    content = vars(_import(module))
    if not isinstance(content.get(attribute), Architecture):
        got = f"a {type(content[attribute]).__name__}" if attribute in content else "nothing of this name"
        raise ValueError(f"architecture: wanted a recontrast.Architecture at {name}, got {got}")
    register_architecture(name, content[attribute])
    _IMPORTED[module] = None
    return name


def list_imported() -> list[str]:
    """Return the names of the modules whose architectures were imported, for other processes of a command."""
    return list(_IMPORTED)


def _import(module: str) -> ModuleType:
    """Import a module of the user."""
    try:
        with _search_current_folder():
            return importlib.import_module(module)
    except Exception as error:  # whatever the code of the module raises
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"wanted a module that can be imported, got {module} ({type(error).__name__}: {reason})"
        ) from error


@contextmanager
def _search_current_folder() -> Iterator[None]:
    """Search the current folder last, and only while a module is imported that the user names."""
    sys.path.append("")
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for position in reversed(range(len(sys.path))):
            if sys.path[position] == "":
                del sys.path[position]
                break


def _add(name: str, architecture: Architecture) -> None:
    ARCHITECTURES[name] = architecture
    ARCHITECTURE_FIELDS[name] = architecture.fields
    OWN_OPTIONS[name] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in architecture.options.items()
    }
    if architecture.compute_loss is None:
        ONE_PASS.add(name)


def _remove(name: str) -> None:
    for registered in (ARCHITECTURES, ARCHITECTURE_FIELDS, OWN_OPTIONS):
        registered.pop(name, None)
    ONE_PASS.discard(name)
