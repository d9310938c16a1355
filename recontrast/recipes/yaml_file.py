"""Read and write recipes as YAML files, and load recipes by name."""

import re
from pathlib import Path
from typing import Any

import yaml

from recontrast.data.atomic import replace_file
from recontrast.recipes.paper import RECIPES
from recontrast.recipes.recipe import Recipe

FILE_NAME = "recipe.yaml"  # name of the file beside the checkpoint of a run
SUFFIXES = (".yaml", ".yml")


def load_recipe(name: str) -> Recipe:
    """Load a recipe of the paper, or a YAML file.

    Args:
        name: Name of a recipe in `RECIPES`, or path of a YAML file.

    Returns:
        The recipe.

    Raises:
        OSError: If the file does not exist or cannot be read.
        ValueError: If ``name`` is neither a recipe nor a file, or the file is not a valid recipe.
    """
    if name in RECIPES:
        return RECIPES[name]
    if Path(name).suffix in SUFFIXES or Path(name).is_file():
        return read_recipe(name)
    raise ValueError(f"recipe: wanted one of {', '.join(RECIPES)}, or a YAML file, got {name!r}")


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file.

    The file is a mapping of field names to values. Missing fields are taken from the recipe named by the key ``base``;
    its default is ``mvtec``.

    Args:
        path: Path of the file.

    Returns:
        The recipe.

    Raises:
        OSError: If the file does not exist or cannot be read.
        ValueError: If the file is not YAML or not a valid recipe. The message names the file and, if known, the line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, _Loader)
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
    """Write all fields of a recipe to a YAML file, atomically.

    Args:
        path: Path of the file.
        recipe: Recipe to write.

    Returns:
        Path of the file.

    Raises:
        OSError: If the file cannot be written.
    """
    text = yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True).encode()
    with replace_file(path, size=len(text)) as file:
        file.write(text)
    return Path(path)


class _Loader(yaml.SafeLoader):
    """Safe loader that accepts 1e-5 as a number, unlike YAML 1.1, and rejects duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct the dictionary of a mapping node."""
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} twice", key.start_mark)
            keys.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)
