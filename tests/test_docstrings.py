"""Tests that public docstrings are complete: parameters, return values, exceptions, shapes, dtypes and sources.

Public names are those of ``__all__``, the definitions without a leading underscore in the modules of `MODULES`, and the
methods that such classes define, including `__call__` and `__getitem__`. The rule, in Google style:

* *Args* names every parameter. It may be left out if a single parameter is named in ``double backticks`` in the first
  line.
* *Returns* or *Yields* describes the returned value. It may be left out for a property, and for a function of at most
  one parameter (named as above) whose first line begins with one of `NOUNS` or with ``code`` and so names the value.
* *Raises* names every exception, or a base class of it, that the body raises directly or through a private function of
  its module, a private method of its class or a check of `recontrast.metrics.inputs`.
* A class names its fields, or the parameters of its constructor, in *Attributes* or *Args*.
* Tensors and arrays have a shape; returned ones also have a dtype.
* A constant in an ``__all__`` has a docstring below its assignment.
* Functions and classes of ``recontrast.__all__`` and the metrics name their source: `SOURCE`.

Whether the text is correct is left to reviewers.
"""

import ast
import builtins
import importlib
import inspect
import itertools
import re
import sys
import textwrap
import types

import pytest

import recontrast

FOLDERS = {
    "": "loss mining anomaly_map ops checkpoint",
    "calibration.": "conformal score_drift appearance_drift",
    "data.": "datasets images cache",
    "evaluation.": "evaluate",
    "export.": "export verify",
    "app.": "api",
    "inference.": "prediction calibrate detector exported_detector infer options programs protocol",
    "metrics.": "exact streaming curves saturated views",
    "models.": "recontrast fold patchcore padim uniad coreset token_network dinomaly inp_former",
    "recipes.": "recipe paper",
    "training.": "train stable_adamw",
}
MODULES = [
    "recontrast",
    "recontrast.metrics",
    *(f"recontrast.{folder}{name}" for folder, names in FOLDERS.items() for name in names.split()),
]
NOUNS = tuple("A All An Compute Each Height How Iterate Number One Return The What Whether Which".split())
SPECIAL = ("__call__", "__getitem__")
ARRAY = re.compile(r"\b(Tensor|NDArray|ndarray|ArrayLike)\b")
SHAPE = re.compile(r"\([^()]*,[^()]*\)|\b(scalar|flat|0-dim|any shape)\b", re.IGNORECASE)
DTYPE = re.compile(r"\b(float32|float64|bfloat16|uint8|int32|int64|bool|dtype)\b")
SOURCE = re.compile(
    r"https?://|arXiv|et al\.|\b(section|equation|[Uu]pstream|scikit-learn|paper|Dinomaly|RD4AD)\b"
    r"|recontrast\.metrics\.bounds"
)


def sections(text):
    """Return the sections of a docstring by name, with the text before the first under ""."""
    parts = {"": ""}
    name = ""
    for line in inspect.cleandoc(text or "").splitlines():
        if re.fullmatch(r"[A-Z][a-z]+:", line):
            name = line[:-1]
            parts[name] = ""
        else:
            parts[name] += line + "\n"
    return parts


def entries(section):
    """Return the names before the colons of a section; ``a, b: text`` gives two names."""
    heads = re.findall(r"^ {4}([*\w.]+(?:, [*\w.]+)*):", section or "", re.MULTILINE)
    return {name.strip().lstrip("*") for head in heads for name in head.split(",")}


def tree(function):
    """Return the syntax tree of a function or class."""
    return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]


def parameters(node):
    """Return the parameters of a function without ``self`` and ``cls``."""
    args = node.args
    positional, others = [*args.posonlyargs, *args.args], [args.vararg, *args.kwonlyargs, args.kwarg]
    return [*positional[bool(positional) and positional[0].arg in ("self", "cls") :], *filter(None, others)]


def walk_body(node):
    """Yield the nodes of a function body without those of nested functions and classes."""
    stack = list(node.body)
    while stack:
        child = stack.pop()
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            stack += ast.iter_child_nodes(child)


def find_exceptions(function, owner=None, visited=None):
    """Return the exception classes that ``function`` raises, directly or through private functions."""
    visited = set() if visited is None else visited
    if function in visited:
        return set()
    visited.add(function)
    space = {**vars(builtins), **function.__globals__}
    exceptions = set()
    for node in ast.walk(tree(function)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            name = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            kind = space.get(name.id) if isinstance(name, ast.Name) else None
            exceptions |= {kind} if isinstance(kind, type) else set()
        elif isinstance(node, ast.Call):
            called = find_callee(node.func, space, owner)
            if isinstance(called, types.FunctionType):
                exceptions |= find_exceptions(called, owner, visited)
    return exceptions


def find_callee(node, space, owner):
    """Return the called private function or method, or function of `recontrast.metrics.inputs`; otherwise None."""
    if isinstance(node, ast.Name):
        target, private = space.get(node.id), node.id.startswith("_")
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        parent = owner if node.value.id in ("self", "cls") else space.get(node.value.id)
        target = getattr(parent, node.attr, None)
        target, private = getattr(target, "__func__", target), parent is owner and node.attr.startswith("_")
    else:
        return None
    module = str(getattr(target, "__module__", None))
    return (
        target
        if module == "recontrast.metrics.inputs" or (private and module.startswith(("recontrast", __name__)))
        else None
    )


def undocumented(kinds, named):
    """Return the names of the exceptions ``kinds`` that have neither themselves nor a base class in ``named``."""
    return sorted(kind.__name__ for kind in kinds if not {base.__name__ for base in kind.__mro__} & named)


def faults_of_function(function, owner=None, value_only=False):
    """Return the faults in the docstring of a function, a method or (``value_only``) the getter of a property."""
    node, text = tree(function), function.__doc__
    if not text:
        return ["has no docstring"]
    parts, takes = sections(text), parameters(node)
    names = {p.arg for p in takes}
    first = parts[""].split("\n\n")[0]
    alone = len(names) <= 1 and all(f"``{name}``" in first for name in names)
    faults = []
    if not alone and (missing := names - entries(parts.get("Args"))):
        faults.append(f"Args lacks {', '.join(sorted(missing))}")
    if invented := entries(parts.get("Args")) - names:
        faults.append(f"Args names {', '.join(sorted(invented))}, which it does not take")
    own = list(walk_body(node))
    yields = any(isinstance(n, ast.YieldFrom) or (isinstance(n, ast.Yield) and n.value is not None) for n in own)
    returns = any(isinstance(n, ast.Return) and n.value is not None and ast.unparse(n.value) != "None" for n in own)
    annotation = "" if node.returns is None else ast.unparse(node.returns)
    returns = returns or annotation not in ("", "None", "Iterator[None]")
    exempt = value_only or (alone and (first.split()[0] in NOUNS or first.startswith("``")))
    if (returns or yields) and not exempt and not ({"Returns", "Yields"} & set(parts)):
        faults.append("has no Returns")
    if lacking := undocumented(find_exceptions(function, owner), entries(parts.get("Raises"))):
        faults.append(f"Raises lacks {', '.join(lacking)}")
    value = parts.get("Returns", parts.get("Yields", first))
    if ARRAY.search(annotation):
        faults += [f"names no {what} of the value" for what, mark in (("shape", SHAPE), ("dtype", DTYPE))
                   if not mark.search(value)]  # fmt: skip
    arrays = [p.arg for p in takes if p.annotation is not None and ARRAY.search(ast.unparse(p.annotation))]
    if arrays and not SHAPE.search(parts.get("Args", first)):
        faults.append(f"names no shape of {', '.join(arrays)}")
    return faults


def faults_of_class(cls):
    """Return the faults in the docstrings of a class and its methods; those of a method begin with its name."""
    text, init = cls.__dict__.get("__doc__") or "", cls.__dict__.get("__init__")
    written = init if isinstance(init, types.FunctionType) and init.__module__ == cls.__module__ else None
    if hasattr(cls, "__dataclass_fields__"):
        wanted = {name for name in cls.__dataclass_fields__ if not name.startswith("_")}
        written = None
    elif hasattr(cls, "_fields"):
        wanted = set(cls._fields)
    else:
        wanted = {p.arg for p in parameters(tree(written))} if written else set()
    texts = [sections(text), sections(written.__doc__ if written else "")]
    named = set().union(*(entries(part.get(key)) for part in texts for key in ("Args", "Attributes")))
    faults = [] if text and not text.startswith(f"{cls.__name__}(") else ["has no docstring"]  # generated by dataclass
    if missing := wanted - named:
        faults.append(f"neither Attributes nor Args name {', '.join(sorted(missing))}")
    refusals = set().union(*(entries(part.get("Raises")) for part in texts))
    for name in ("__init__", "__post_init__"):
        method = cls.__dict__.get(name)
        if isinstance(method, types.FunctionType) and method.__module__ == cls.__module__ and name in (
            "__post_init__", written and "__init__"
        ):  # fmt: skip
            if lacking := undocumented(find_exceptions(method, cls), refusals):
                faults.append(f"Raises lacks {', '.join(lacking)}")
    for name, method in vars(cls).items():
        if name.startswith("_") and name not in SPECIAL:
            continue
        getter = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
        if isinstance(getter, types.FunctionType) and getter.__module__ == cls.__module__:
            method_faults = faults_of_function(inspect.unwrap(getter), cls, isinstance(method, property))
            faults += [f"{name}: {fault}" for fault in method_faults]
    return faults


def public():
    """Yield (module, name, object) for each public object once."""
    visited = set()
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        listed = getattr(module, "__all__", ())
        defined = [] if module is recontrast else [
            name for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module_name
            and isinstance(value, type | types.FunctionType)
        ]  # fmt: skip
        for name in dict.fromkeys([*listed, *defined]):
            value = getattr(module, name)
            if not isinstance(value, types.ModuleType) and id(value) not in visited:
                visited.add(id(value))
                yield module_name, name, value


PUBLIC = list(public())
CONSTANTS = [(m, n) for m, n, value in PUBLIC if not isinstance(value, type | types.FunctionType)]
CALLABLES = [(m, n, value) for m, n, value in PUBLIC if isinstance(value, type | types.FunctionType)]


@pytest.mark.parametrize("target", [value for *_, value in CALLABLES], ids=[f"{m}.{n}" for m, n, _ in CALLABLES])
def test_docstring_is_complete(target):
    faults = faults_of_class(target) if isinstance(target, type) else faults_of_function(inspect.unwrap(target))
    assert not faults, f"{target.__module__}.{target.__qualname__}: " + "; ".join(faults)


def documented_constants(source):
    """Yield the names assigned at the top level of a source that have a string directly below."""
    body = ast.parse(source).body
    for node, below in itertools.pairwise(body):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(below, ast.Expr):
            if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (target.id for target in targets if isinstance(target, ast.Name))


@pytest.mark.parametrize(("module", "name"), CONSTANTS, ids=[n for _, n in CONSTANTS])
def test_constant_is_documented(module, name):
    ours = [m for key, m in sys.modules.items() if key.startswith("recontrast") and getattr(m, "__file__", None)]
    sources = [inspect.getsource(m) for m in ours if m.__file__.endswith(".py") and name in vars(m)]
    assert any(name in documented_constants(source) for source in sources), f"{module}.{name} has no string below it"


@pytest.mark.parametrize("target", [f for m, _, f in CALLABLES if m in ("recontrast", "recontrast.metrics")],
                         ids=[n for m, n, _ in CALLABLES if m in ("recontrast", "recontrast.metrics")])  # fmt: skip
def test_source_is_named(target):
    assert SOURCE.search(target.__doc__), f"{target.__qualname__} does not name its source"


def test_public_names_are_collected():
    names = {f"{m}.{n}" for m, n, _ in PUBLIC}
    assert {f"recontrast.{name}" for name in recontrast.__all__} - names == {"recontrast.metrics", "recontrast.ops"}
    assert {"recontrast.metrics.aupro", "recontrast.ops.cosine", "recontrast.training.train.train"} <= names
    assert "RECIPES" in {name for _, name in CONSTANTS}


# ---- tests of the rule on small examples ----------------------------------------------------------------------------


def _refuse(x):
    raise OSError(x)


def good(x: float, y: float) -> float:
    """Sum of two.

    Args:
        x: one.
        y: two.

    Returns:
        The sum.

    Raises:
        ValueError: never mind.
    """
    if x < y:
        raise ValueError
    return x + y


def whether(x: float) -> bool:
    """Whether ``x`` is large."""
    return x > 1


def bare(x):
    return x


def unnamed(x: float, y: float) -> None:
    """Do it with x and y.

    Args:
        x: one.
    """


def invented(x: float) -> None:
    """Do it.

    Args:
        x: one.
        z: there is none.
    """


def silent(x: float) -> float:
    """Take ``x`` and give its double."""
    return 2 * x


def refusing(x: float) -> None:
    """Refuse ``x``."""
    _refuse(x)


def generating(count: int):
    """Count to ``count``."""
    yield from range(count)


def shapeless(x: "torch.Tensor") -> "torch.Tensor":  # noqa: F821
    """A copy of ``x``."""
    return x.clone()


class Silent:
    """A class with a secret."""

    def __init__(self, secret):
        if not secret:
            raise TypeError("secret")

    def tell(self, whom):
        """Tell it."""


CASES = {
    good: [],
    whether: [],
    bare: ["has no docstring"],
    unnamed: ["Args lacks y"],
    invented: ["Args names z, which it does not take"],
    silent: ["has no Returns"],
    refusing: ["Raises lacks OSError"],
    generating: ["has no Returns"],
    shapeless: ["names no shape of the value", "names no dtype of the value", "names no shape of x"],
}


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_faults_of_functions_are_reported(function):
    assert faults_of_function(function) == CASES[function]


def test_faults_of_classes_are_reported():
    expected = ["neither Attributes nor Args name secret", "Raises lacks TypeError", "tell: Args lacks whom"]
    assert faults_of_class(Silent) == expected


def test_own_names_are_no_source():
    assert SOURCE.search("Losses of Guo et al., NeurIPS 2023.")
    assert not SOURCE.search("What `recontrast.metrics` and ReContrast do.")


def test_base_class_documents_an_exception():
    assert undocumented({FileNotFoundError}, {"OSError"}) == []
    assert undocumented({FileNotFoundError, ValueError}, {"ValueError"}) == ["FileNotFoundError"]


def test_docstrings_of_constants_are_collected():
    assert list(documented_constants('A = 1\n"""One."""\nB: int = 2\nC = 3  # three\n')) == ["A"]
