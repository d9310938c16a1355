"""Who may import whom: arrows point down only, app -> engine -> data and root; kernels import nothing of ours."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [*sorted(ROOT.glob("recontrast/**/*.py")), *sorted(ROOT.glob("kernels/*.py"))]
# Room -> the rooms of ours that it may import. The root's own files are rooms of their own.
ALLOWED = {
    "reference": set(),
    "kernels": {"kernels"},
    "backend": set(),  # and kernels, by name, where there is a device that needs them
    "ops": {"reference", "backend"},
    "loss": {"ops"},
    "anomaly_map": {"ops", "loss"},
    "metrics_reference": set(),
    "arrays": {"metrics_reference"},  # and _metrics, where it was built
    "bounds": set(),
    "streaming": {"arrays", "bounds", "metrics_reference"},
    "curves": {"arrays", "metrics_reference"},
    "metrics": {"arrays", "metrics_reference", "streaming"},
    "weights": set(),
    "backbone": {"weights"},
    "decoder": {"backbone"},
    "model": {"backbone", "decoder", "weights"},
    "fold": {"backbone", "model"},
    "data": {"data"},
    "engine": {"reference", "ops", "loss", "anomaly_map", "metrics", "backbone", "decoder", "model"},
}
ALLOWED["engine"] |= {"fold", "data", "engine"}
ALLOWED["app"] = set.union(*ALLOWED.values()) | {"app", "kernels", "curves"}
ALLOWED["__main__"] = {"app"}
ALLOWED["__init__"] = set(ALLOWED)  # on first use
# What only some rooms may need, so that `import recontrast` stays light and the losses need no timm.
OUTSIDE = {
    "timm": {"backbone", "weights", "fold", "app"},
    "triton": {"kernels", "app"},
    "typer": {"app"},
    "rich": {"app"},
    "yaml": {"engine"},
    "PIL": {"data", "app"},
    "pyarrow": {"app"},
    "ray": {"app"},
    "sklearn": {"app"},
    "torchvision": set(),
}


def room(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    for name in imports(path):
        package, *rest = name.split(".")
        if package == "recontrast":
            target = rest[0] if rest else "__version__"
            if target == "__version__":
                continue
            assert target in ALLOWED[room(path)], f"{path.name} must not import {name}"
        elif package in OUTSIDE:
            assert room(path) in OUTSIDE[package], f"{path.name} must not import {package}"
        else:
            assert package not in {"tests", "benchmarks"}


def test_every_room_is_known():
    assert {room(path) for path in FILES} <= set(ALLOWED)


def lines_of(text, python):
    """Lines of a file; of Python without docstrings, which shall be complete."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [node.body[0] for node in ast.walk(ast.parse(text)) if isinstance(node, documented)] if python else []
    strings = [node for node in found if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return len(text.splitlines()) - sum(node.end_lineno - node.lineno + 1 for node in strings)


@pytest.mark.parametrize("path", [*FILES, *sorted(ROOT.glob("csrc/*"))], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    lines = lines_of(path.read_text(), path.suffix == ".py")
    assert lines <= 310, f"{path.name} has {lines} lines: two ideas?"


def test_docstrings_are_no_lines_of_code():
    text = '"""One\nand two."""\n\n\ndef f():\n    """Three."""\n    return 4\n'
    assert (lines_of(text, True), lines_of(text, False)) == (4, 7)


def test_import_is_light():
    """`import recontrast` alone brings no timm, typer, rich or scikit-learn."""
    import subprocess

    code = "import sys, recontrast; print([m for m in ('timm', 'typer', 'rich', 'sklearn', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def test_walking_a_checkout_finds_the_package_once():
    """Tools that walk packages see ours, and none of the checkout's other folders below it."""
    import subprocess

    code = """
import importlib, pkgutil, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import recontrast
print(*(found.name for found in pkgutil.walk_packages(recontrast.__path__, "recontrast.")))
for name in ("tests", "benchmarks", "recontrast", "kernel"):
    try:
        print("found", importlib.import_module(f"recontrast.{name}"))
    except ModuleNotFoundError:
        pass
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    files = [path.relative_to(ROOT) for path in FILES if path.is_relative_to(ROOT / "recontrast")]
    wanted = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files}
    wanted |= {f"recontrast.{library.name.partition('.')[0]}" for library in ROOT.glob("recontrast/*.so")}
    assert set(done.stdout.split()) == wanted - {"recontrast"}, done.stdout + done.stderr


def test_package_is_whole_in_a_checkout():
    """Python started beside setup.py takes the package from there, whatever is installed."""
    import subprocess

    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
import recontrast.kernels
from recontrast import ReContrast, ops
print(recontrast.__file__, recontrast.kernels.__file__, ops.BACKEND["cpu"])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [str(ROOT / "recontrast/__init__.py"), str(ROOT / "kernels/__init__.py"), "native"], (
        done.stdout + done.stderr
    )
