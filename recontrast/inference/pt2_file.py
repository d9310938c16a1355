"""Files of torch.export, checked and written anew before PyTorch reads them.

`torch.export.load` unpickles parts of a file, calls any function of ``torch`` that a graph names, and evaluates its
expressions. The archive is therefore read here. Graph, weights and constants are checked, and only they are written to
an archive in memory, which `torch.export.load` then reads: it never sees any other byte of the file.
"""

import io
import json
import keyword
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recontrast.data.archive import Archive, Member
from recontrast.data.json_text import parse_json
from recontrast.data.regular_file import open_regular
from recontrast.inference.file_checks import KEY, ForeignFileError, parse_description
from recontrast.recipes.describe import describe_value

_GRAPH = "models/model.json"
_CONFIGS = {"data/weights/": "model_weights_config.json", "data/constants/": "model_constants_config.json"}
_INPUTS = "data/sample_inputs/model.pt"  # a pickle, which is not needed to run the graph
_DESCRIPTION = f"extra/{KEY}.json"
_SMALL = ("archive_format", "archive_version", "byteorder", ".data/version", "version")
_IGNORED = (".data/serialization_id", ".format_version", ".storage_alignment")
_TENSOR_NAME = re.compile(r"data/(weights/weight|constants/tensor)_\d+")

# Operators of PyTorch, and arithmetic with the sizes of images.
_ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.\w+")
_ATEN_FORBIDDEN = frozenset(("from_file", "save", "_print", "warn"))  # they open files or print
_ARITHMETIC = re.compile(
    r"_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pos|pow|abs|getitem|ge|gt|le|lt|eq|ne|and_|or_|not_)"
    r"|math\.(ceil|floor|trunc|sqrt)|torch\._?sym_\w+"
)
_EXPRESSION_TOKEN = re.compile(
    r"\s+"
    r"|'(?:(?:s|u|zuf|zf|ps|i|b)\d+|\d{1,19}(?:\.\d+)?)'"  # the name of a symbol, or a decimal number
    r"|\*\*(?= ?\d\b)|\*(?!\*)|[-+/%(),<>=&|~!]"
    r"|\d{1,19}(?:\.\d+)?(?![\w.])"
    r"|[A-Za-z_]\w*"
)
_EXPRESSION_FUNCTIONS = frozenset(
    """FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv FloatTrueDiv IntTrueDiv
    IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt ToFloat Identity
    Add Mul Pow Integer Rational Float Symbol positive nonnegative nonzero integer real finite precision
    Max Min Abs Eq Ne Ge Gt Le Lt And Or Not Equality Unequality GreaterThan StrictGreaterThan LessThan
    StrictLessThan true false floor ceiling oo int_oo True False""".split()
)
_SYMBOL = re.compile(r"(s|u|zuf|zf|ps|i|b)\d+")
_MAX_POWERS = 1  # in one expression, of small numbers; PyTorch would not finish the computation of a tower of powers
_FORBIDDEN_KEYS = ("as_graph", "as_graphs", "as_custom_obj", "as_operator", "custom_obj", "token")
_CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", None)
_WORD, _DOTTED = re.compile(r"\w{0,512}"), re.compile(r"[\w.+]{0,1024}")


def read_pt2(path: Path) -> tuple[io.BytesIO, dict[str, Any]]:
    """Read a file of torch.export that `recontrast export` wrote.

    Args:
        path: Path of the file.

    Returns:
        A new archive with the checked graph and its tensors, for `torch.export.load`, and the description.

    Raises:
        ForeignFileError: If the file has no valid description, or holds objects, functions or expressions that are not
            those of a detector.
        ValueError: If the file is damaged.
        OSError: If the file cannot be read.
    """
    with open_regular(path, "a file of torch.export") as file:
        if file.read(2) != b"PK":
            raise ValueError("the file is not an archive")
        archive = Archive(file)
        has_text = _DESCRIPTION in archive.members
        description = parse_description(path, archive.read_small(_DESCRIPTION).decode() if has_text else None)
        try:
            _check_names(archive.members)
            configs = {folder: _read_config(archive, folder, name) for folder, name in _CONFIGS.items()}
            graph = _parse_json(archive.read_small(_GRAPH))
            _remove_comments(graph)
            _check_graph(graph)
        except _ForeignPartError as error:
            raise ForeignFileError(
                f"{path}: wanted a file that recontrast export wrote, got one with {error}"
            ) from error
        return _rebuild(archive, graph, configs), description


class _ForeignPartError(ValueError):
    """A part of a file that `recontrast export` never writes."""


def _check_names(members: Mapping[str, Member]) -> None:
    known = (_GRAPH, _INPUTS, _DESCRIPTION, *_SMALL, *_IGNORED, *(f + name for f, name in _CONFIGS.items()))
    for name in members:
        if name not in known and not _TENSOR_NAME.fullmatch(name):
            raise _ForeignPartError(f"the member {name[:80]!r}")


def _parse_json(content: bytes) -> Any:
    try:
        return parse_json(content)
    except ValueError as error:
        raise _ForeignPartError("invalid JSON") from error


def _read_config(archive: Archive, folder: str, name: str) -> bytes:
    """Read and check the list of weights or constants: plain tensors that lie in members of the archive."""
    content = _parse_json(archive.read_small(folder + name))
    entries = content.get("config") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or len(content) != 1:
        raise _ForeignPartError(f"an invalid {name}")
    for key, entry in entries.items():
        values = entry if isinstance(entry, dict) else {}
        member = archive.members.get(folder + str(values.get("path_name")))
        meta, uses_pickle = values.get("tensor_meta"), values.get("use_pickle")
        if uses_pickle is not False or member is None or not isinstance(meta, dict) or not _DOTTED.fullmatch(key):
            raise _ForeignPartError(f"the object {key[:80]!r}, which is no tensor")
        sizes = meta.get("sizes")
        lengths: list[Any] = [item.get("as_int") if isinstance(item, dict) else None for item in sizes or []]
        if any(type(length) is not int or length < 0 for length in lengths) or math.prod(lengths) > member.size:
            raise _ForeignPartError(f"the tensor {key[:80]!r} of the shape {describe_value(lengths)}")
    _check_strings(content)
    return json.dumps(content).encode()


def _remove_comments(graph: Any) -> None:
    """Remove what only describes where the graph came from, and checks of its example inputs."""
    try:
        graph["guards_code"] = []
        graph["graph_module"]["metadata"] = {}
        for node in graph["graph_module"]["graph"]["nodes"]:
            node["metadata"] = {}
    except (TypeError, LookupError) as error:
        raise _ForeignPartError("no graph") from error


def _check_graph(graph: Any) -> None:
    """Check the functions that a graph calls, and all of its names and expressions."""
    for node in graph["graph_module"]["graph"]["nodes"]:
        target = str(node.get("target"))
        aten = _ATEN.fullmatch(target)
        if not (_ARITHMETIC.fullmatch(target) or (aten and aten[1] not in _ATEN_FORBIDDEN)):
            raise _ForeignPartError(f"the function {target[:80]!r}")
    _check_strings(graph)


def _check_strings(content: Any) -> None:
    """Check every string in nested JSON by the key under which it stands."""
    pending: list[tuple[str, Any]] = [("", content)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, dict):
            for name, item in value.items():
                if name in _FORBIDDEN_KEYS or not _DOTTED.fullmatch(name):
                    raise _ForeignPartError(f"the entry {name[:80]!r}")
                if key in ("tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values"):
                    _check_name(name)
                pending.append((name, item))
        elif isinstance(value, list):
            pending += [(key, item) for item in value]
        elif isinstance(value, str):
            _check_string(key, value)


def _check_string(key: str, text: str) -> None:
    if key == "expr_str":
        _check_expression(text)
    elif key in ("in_spec", "out_spec"):
        _check_containers(_parse_json(text.encode()))
    elif key in ("name", "as_name"):
        _check_name(text)
    elif not _DOTTED.fullmatch(text):
        raise _ForeignPartError(f"the text {text[:80]!r} as {key}")


def _check_name(text: str) -> None:
    """Raise unless ``text`` can name a variable in the code that PyTorch generates from a graph."""
    if not _WORD.fullmatch(text) or keyword.iskeyword(text) or text.startswith("__"):
        raise _ForeignPartError(f"the name {text[:80]!r}")


def _check_expression(text: str) -> None:
    """Raise unless an expression is arithmetic with the sizes of images."""
    position = 0
    while position < len(text):
        token = _EXPRESSION_TOKEN.match(text, position)
        word = token[0] if token else ""
        is_name = word[:1].isalpha() or word[:1] == "_"
        if not word or (is_name and word not in _EXPRESSION_FUNCTIONS and not _SYMBOL.fullmatch(word)):
            raise _ForeignPartError(f"the expression {text[:80]!r}")
        position += len(word)
    powers = text.count("**") + text.count("Pow(")
    if len(text) > 10_000 or powers > _MAX_POWERS or (powers and re.search(r"\d{4}", text)):
        raise _ForeignPartError(f"the expression {text[:80]!r}")


def _check_containers(spec: Any) -> None:
    """Raise unless the inputs or outputs of a graph are tuples, lists and dictionaries."""
    pending = [spec[1]] if isinstance(spec, list) and len(spec) == 2 else [None]
    while pending:
        item = pending.pop()
        if not isinstance(item, dict) or item.get("type", "") not in _CONTAINERS:
            raise _ForeignPartError("inputs or outputs that are no tensors")
        if not re.fullmatch(r"null|\[[\w\", ]*\]", str(item.get("context"))) and item.get("context") is not None:
            raise _ForeignPartError("inputs or outputs that are no tensors")
        pending += item.get("children_spec") or []


def _rebuild(archive: Archive, graph: Any, configs: Mapping[str, bytes]) -> io.BytesIO:
    """Write the checked parts to an archive in memory."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as target:

        def write(name: str, content: Any) -> None:
            target.writestr(zipfile.ZipInfo(f"model/{name}"), content)

        for name in _SMALL:
            if name in archive.members:
                write(name, archive.read_small(name))
        write(_GRAPH, json.dumps(graph))
        write(_INPUTS, b"")
        for folder, content in configs.items():
            write(folder + _CONFIGS[folder], content)
        for name in archive.members:
            if _TENSOR_NAME.fullmatch(name):
                write(name, archive.read(name).data)
        archive.verify(name for name in (_INPUTS, *_IGNORED) if name in archive.members)
    buffer.seek(0)
    return buffer
