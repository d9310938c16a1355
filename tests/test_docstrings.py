"""Every public name says what it takes, gives and refuses, and the names of the package where they come from.

Public are the names of ``__all__``, and what the modules of `MODULES` define without a leading underscore, with the
methods that a class defines itself, `__call__` and `__getitem__` among them. The rule, in Google style:

* *Args* names every parameter. Without it goes only one parameter alone that the first line names in ``double
  backticks``.
* *Returns* or *Yields* is there where a value is returned. Without it go only a property, and a function of at most one
  parameter (named as above): its first line must then begin with one of `NOUNS` or with ``code``, so that it is the
  value that it names.
* *Raises* names every exception that the body raises, itself or through a private function of its module, a private
  method of its class or a check of `recontrast.metrics.inputs`; a base class of it will do.
* A class names its fields, or the parameters of its constructor, under *Attributes* or *Args*.
* Where a parameter or the value is annotated as tensor or array there is a shape, and of the value a dtype.
* A constant of an ``__all__`` has a string below its assignment.
* Functions and classes of ``recontrast.__all__`` and the metrics name their source: `SOURCE`.

Whether all this is true only a reader can say.
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

ROOMS = {
    "": "loss mining anomaly_map ops checkpoint",
    "calibration.": "conformal score_drift appearance_drift",
    "data.": "datasets images cache",
    "evaluation.": "evaluate",
    "export.": "export verify",
    "inference.": "calibrate detector exported_detector infer options",
    "metrics.": "exact streaming curves",
    "models.": "recontrast fold",
    "recipes.": "recipe paper",
    "training.": "train",
}
MODULES = [
    "recontrast",
    "recontrast.metrics",
    *(f"recontrast.{room}{name}" for room, names in ROOMS.items() for name in names.split()),
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
    """Sections of a docstring by name, "" for what comes before the first; ``Args:`` and the like stand flush left."""
    found = {"": ""}
    name = ""
    for line in inspect.cleandoc(text or "").splitlines():
        if re.fullmatch(r"[A-Z][a-z]+:", line):
            name = line[:-1]
            found[name] = ""
        else:
            found[name] += line + "\n"
    return found


def entries(section):
    """Names before the colons of a section's entries, ``a, b: text`` being two."""
    heads = re.findall(r"^ {4}([*\w.]+(?:, [*\w.]+)*):", section or "", re.MULTILINE)
    return {name.strip().lstrip("*") for head in heads for name in head.split(",")}


def tree(function):
    return ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]


def parameters(node):
    given = node.args
    places, more = [*given.posonlyargs, *given.args], [given.vararg, *given.kwonlyargs, given.kwarg]
    return [*places[bool(places) and places[0].arg in ("self", "cls") :], *filter(None, more)]


def inside(node):
    """Nodes of a function's own body, without those of functions inside it."""
    waiting = list(node.body)
    while waiting:
        one = waiting.pop()
        yield one
        if not isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            waiting += ast.iter_child_nodes(one)


def raised(function, owner=None, seen=None):
    """Exception classes that ``function`` raises: see the rule."""
    seen = set() if seen is None else seen
    if function in seen:
        return set()
    seen.add(function)
    space = {**vars(builtins), **function.__globals__}
    found = set()
    for node in ast.walk(tree(function)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            named = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            kind = space.get(named.id) if isinstance(named, ast.Name) else None
            found |= {kind} if isinstance(kind, type) else set()
        elif isinstance(node, ast.Call):
            called = callee(node.func, space, owner)
            if isinstance(called, types.FunctionType):
                found |= raised(called, owner, seen)
    return found


def callee(node, space, owner):
    """What a call may raise for its caller: a private function or method, or any of `recontrast.metrics.inputs`."""
    if isinstance(node, ast.Name):
        found, private = space.get(node.id), node.id.startswith("_")
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        place = owner if node.value.id in ("self", "cls") else space.get(node.value.id)
        found = getattr(place, node.attr, None)
        found, private = getattr(found, "__func__", found), place is owner and node.attr.startswith("_")
    else:
        return None
    ours = str(getattr(found, "__module__", None))
    return (
        found
        if ours == "recontrast.metrics.inputs" or (private and ours.startswith(("recontrast", __name__)))
        else None
    )


def undocumented(kinds, named):
    """Those of the exceptions ``kinds`` of which neither they nor a base class is among the names."""
    return sorted(kind.__name__ for kind in kinds if not {base.__name__ for base in kind.__mro__} & named)


def faults_of_function(function, owner=None, value_only=False):
    """What the docstring of a function, a method or (``value_only``) a property's getter lacks."""
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
    own = list(inside(node))
    yields = any(isinstance(n, ast.Yield | ast.YieldFrom) for n in own)
    returns = any(isinstance(n, ast.Return) and n.value is not None and ast.unparse(n.value) != "None" for n in own)
    promised = "" if node.returns is None else ast.unparse(node.returns)
    returns = returns or promised not in ("", "None")
    exempt = value_only or (alone and (first.split()[0] in NOUNS or first.startswith("``")))
    if (returns or yields) and not exempt and not ({"Returns", "Yields"} & set(parts)):
        faults.append("has no Returns")
    if lacking := undocumented(raised(function, owner), entries(parts.get("Raises"))):
        faults.append(f"Raises lacks {', '.join(lacking)}")
    value = parts.get("Returns", parts.get("Yields", first))
    if ARRAY.search(promised):
        faults += [f"names no {what} of the value" for what, mark in (("shape", SHAPE), ("dtype", DTYPE))
                   if not mark.search(value)]  # fmt: skip
    arrays = [p.arg for p in takes if p.annotation is not None and ARRAY.search(ast.unparse(p.annotation))]
    if arrays and not SHAPE.search(parts.get("Args", first)):
        faults.append(f"names no shape of {', '.join(arrays)}")
    return faults


def faults_of_class(cls):
    """What the docstring of a class lacks, or those of its methods; with the name of the method."""
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
    faults = [] if text and not text.startswith(f"{cls.__name__}(") else ["has no docstring"]  # a dataclass makes one
    if missing := wanted - named:
        faults.append(f"neither Attributes nor Args name {', '.join(sorted(missing))}")
    refusals = set().union(*(entries(part.get("Raises")) for part in texts))
    for name in ("__init__", "__post_init__"):
        method = cls.__dict__.get(name)
        if isinstance(method, types.FunctionType) and method.__module__ == cls.__module__ and name in (
            "__post_init__", written and "__init__"
        ):  # fmt: skip
            if lacking := undocumented(raised(method, cls), refusals):
                faults.append(f"Raises lacks {', '.join(lacking)}")
    for name, method in vars(cls).items():
        if name.startswith("_") and name not in SPECIAL:
            continue
        getter = method.fget if isinstance(method, property) else getattr(method, "__func__", method)
        if isinstance(getter, types.FunctionType) and getter.__module__ == cls.__module__:
            found = faults_of_function(inspect.unwrap(getter), cls, isinstance(method, property))
            faults += [f"{name}: {fault}" for fault in found]
    return faults


def public():
    """(module, name, object) of all that the rule is for, each object once."""
    seen = set()
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        listed = getattr(module, "__all__", ())
        defined = [] if module is recontrast else [
            name for name, found in vars(module).items()
            if not name.startswith("_") and getattr(found, "__module__", None) == module_name
            and isinstance(found, type | types.FunctionType)
        ]  # fmt: skip
        for name in dict.fromkeys([*listed, *defined]):
            found = getattr(module, name)
            if not isinstance(found, types.ModuleType) and id(found) not in seen:
                seen.add(id(found))
                yield module_name, name, found


PUBLIC = list(public())
CONSTANTS = [(m, n) for m, n, found in PUBLIC if not isinstance(found, type | types.FunctionType)]
CALLED = [(m, n, found) for m, n, found in PUBLIC if isinstance(found, type | types.FunctionType)]


@pytest.mark.parametrize("found", [found for *_, found in CALLED], ids=[f"{m}.{n}" for m, n, _ in CALLED])
def test_docstring_is_complete(found):
    faults = faults_of_class(found) if isinstance(found, type) else faults_of_function(inspect.unwrap(found))
    assert not faults, f"{found.__module__}.{found.__qualname__}: " + "; ".join(faults)


def documented_constants(source):
    """Names assigned at the top of a module's source that have a string right below."""
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


@pytest.mark.parametrize("found", [f for m, _, f in CALLED if m in ("recontrast", "recontrast.metrics")],
                         ids=[n for m, n, _ in CALLED if m in ("recontrast", "recontrast.metrics")])  # fmt: skip
def test_source_is_named(found):
    assert SOURCE.search(found.__doc__), f"{found.__qualname__} does not say where it comes from"


def test_public_names_are_found():
    names = {f"{m}.{n}" for m, n, _ in PUBLIC}
    assert {f"recontrast.{name}" for name in recontrast.__all__} - names == {"recontrast.metrics", "recontrast.ops"}
    assert {"recontrast.metrics.aupro", "recontrast.ops.cosine", "recontrast.training.train.train"} <= names
    assert "RECIPES" in {name for _, name in CONSTANTS}


# ---- the rule itself, on small bad examples ------------------------------------------------------------------------


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
def test_the_rule_sees(function):
    assert faults_of_function(function) == CASES[function]


def test_the_rule_sees_classes():
    wanted = ["neither Attributes nor Args name secret", "Raises lacks TypeError", "tell: Args lacks whom"]
    assert faults_of_class(Silent) == wanted


def test_a_source_is_more_than_our_own_name():
    assert SOURCE.search("Losses of Guo et al., NeurIPS 2023.")
    assert not SOURCE.search("What `recontrast.metrics` and ReContrast do.")


def test_a_base_class_names_an_error():
    assert undocumented({FileNotFoundError}, {"OSError"}) == []
    assert undocumented({FileNotFoundError, ValueError}, {"ValueError"}) == ["FileNotFoundError"]


def test_the_rule_sees_constants():
    assert list(documented_constants('A = 1\n"""One."""\nB: int = 2\nC = 3  # three\n')) == ["A"]
