"""Read and write recipes as YAML files, and load recipes by name."""

import re
from pathlib import Path
from typing import Any

import yaml

from recontrast.data.atomic import replace_file
from recontrast.data.regular_file import read_bytes
from recontrast.recipes.describe import describe_value
from recontrast.recipes.paper import RECIPES
from recontrast.recipes.recipe import Recipe

FILE_NAME = "recipe.yaml"  # name of the file beside the checkpoint of a run
SUFFIXES = (".yaml", ".yml")
LARGEST = 2**20  # bytes of a file
LARGEST_EXPANDED = 10_000  # values of a file, with each alias replaced by what it repeats


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
    path = Path(name)
    if path.suffix in SUFFIXES or ("\0" not in name and path.exists()):
        return read_recipe(name)
    raise ValueError(f"recipe: wanted one of {', '.join(RECIPES)}, or a YAML file, got {describe_value(name)}")


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
    wanted = "a recipe in YAML"
    try:
        values = _parse(read_bytes(path, wanted, LARGEST))
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: wanted {wanted}, got {str(error.problem)[:200]}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: wanted {wanted}, got a file of another kind") from error
    except RecursionError as error:
        raise ValueError(f"{path}: wanted {wanted}, got lists or mappings that are nested too deeply") from error
    except (TypeError, LookupError, AttributeError, OverflowError) as error:  # from constructors of YAML's own types
        raise ValueError(f"{path}: wanted {wanted}, got an invalid value ({error})") from error
    if not isinstance(values, dict):
        got = type(values).__name__ if values is not None else "an empty file"
        raise ValueError(f"{path}: wanted a mapping of recipe fields to values, got {got}")
    base = values.pop("base", "mvtec")
    if not isinstance(base, str) or base not in RECIPES:
        raise ValueError(f"{path}: base: wanted one of {', '.join(RECIPES)}, got {describe_value(base)}")
    try:
        return RECIPES[base].replace(**{
            key if isinstance(key, str) else describe_value(key): value for key, value in values.items()
        })  # fmt: skip
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
    text = yaml.dump(recipe.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True).encode()
    with replace_file(path, size=len(text)) as file:
        file.write(text)
    return Path(path)


def _parse(content: bytes) -> Any:
    """Parse YAML without tags of its own types, whose aliases do not multiply its content."""
    loader = _Loader(content)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_nodes(node, {}) > LARGEST_EXPANDED:
            raise yaml.constructor.ConstructorError(None, None, "aliases that multiply its content", node.start_mark)
        return loader.construct_document(node)
    except ValueError as error:  # an integer or a date that Python cannot represent
        raise yaml.constructor.ConstructorError(None, None, str(error), None) from error
    finally:
        loader.dispose()


def _count_nodes(node: Any, counts: dict[int, int]) -> int:
    """Count the nodes below ``node``, as often as aliases repeat each; ``counts`` holds earlier results."""
    if id(node) not in counts:
        counts[id(node)] = LARGEST_EXPANDED + 1  # until it is counted: a node that contains itself never ends
        parts = [] if isinstance(node, yaml.ScalarNode) else node.value
        children = [child for part in parts for child in (part if isinstance(part, tuple) else (part,))]
        counts[id(node)] = 1 + sum(_count_nodes(child, counts) for child in children)
    return counts[id(node)]


class _Loader(yaml.SafeLoader):
    """Safe loader that accepts 1e-5 as a number, unlike YAML 1.1, and rejects duplicate keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Construct the dictionary of a mapping node."""
        keys = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    problem = f"{describe_value(key.value)} twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                keys.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes a text such as "1e3", which `_Loader` would read as a number."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
