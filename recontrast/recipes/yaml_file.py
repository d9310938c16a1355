"""Recipes as YAML files: read, written, found by name."""

import re
from pathlib import Path
from typing import Any

import yaml

from recontrast.data.atomic import replace_file
from recontrast.recipes.paper import RECIPES
from recontrast.recipes.recipe import Recipe

FILE_NAME = "recipe.yaml"  # beside the checkpoint of a run
SUFFIXES = (".yaml", ".yml")


def load_recipe(name: str) -> Recipe:
    """The recipe of the paper of that name, or that of a YAML file."""
    if name in RECIPES:
        return RECIPES[name]
    if Path(name).suffix in SUFFIXES or Path(name).is_file():
        return read_recipe(name)
    raise ValueError(f"recipe: wanted one of {', '.join(RECIPES)}, or a YAML file, got {name!r}")


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a YAML file.

    Args:
        path: a mapping of fields to values; those that are absent are taken from the recipe that the key ``base`` names
            (default: ``mvtec``).

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: it is no YAML, or no recipe; one sentence with the file and, where known, the line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, _Loader)  # the safe loader with two changes
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: wanted a recipe in YAML, got {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: wanted a recipe in YAML, got a file of another kind") from error
    if not isinstance(values, dict):
        got = type(values).__name__ if values is not None else "an empty file"
        raise ValueError(f"{path}: wanted a mapping of recipe fields to values, got {got}")
    base = values.pop("base", "mvtec")
    if not isinstance(base, str) or base not in RECIPES:
        raise ValueError(f"{path}: base: wanted one of {', '.join(RECIPES)}, got {base!r}")
    try:
        return RECIPES[base].replace(**{str(key): value for key, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_recipe(path: str | Path, recipe: Recipe) -> Path:
    """Write all fields of ``recipe`` to a YAML file, whole or not at all."""
    text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True).encode()
    with replace_file(path, size=len(text)) as file:
        file.write(text)
    return Path(path)


class _Loader(yaml.SafeLoader):
    """Takes 1e-5 for a number, as everyone does but YAML 1.1, and refuses a key that stands twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping of ``node``."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} twice", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
