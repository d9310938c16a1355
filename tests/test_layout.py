"""Who may import whom: imports between folders run one way, and `ALLOWED` has one line for each folder."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [*sorted(ROOT.glob("recontrast/**/*.py")), *sorted(ROOT.glob("kernels/*.py"))]
FILES = [path for path in FILES if not path.is_relative_to(ROOT / "recontrast/kernels")]  # a link in some checkouts
# Folder, or file of the root -> what it may import of this package, besides itself. From the bottom up.
ALLOWED = {
    "reference": "",
    "kernels": "",
    "backend": "",  # and the kernels, by name, on a device that needs them
    "data": "",
    "metrics": "",
    "ops": "reference backend",
    "models": "ops",
    "runtime": "models",
    "mining": "",
    "loss": "ops mining runtime",
    "anomaly_map": "ops loss",
    "recipes": "data",
    "calibration": "data",
    "checkpoint": "data models runtime recipes calibration",
    "inference": "data metrics models runtime anomaly_map recipes calibration checkpoint",
    "evaluation": "data metrics models runtime recipes calibration checkpoint inference",
    "training": "data models runtime mining loss recipes calibration checkpoint inference",
    "export": "data models reference anomaly_map recipes calibration checkpoint inference",
    "experiments": "data runtime recipes checkpoint inference evaluation training",
    "app": "data metrics ops models runtime recipes calibration checkpoint inference evaluation training export "
    "experiments kernels",
    "__main__": "app",
    "__init__": "metrics ops models loss mining anomaly_map recipes app",  # on first use
}
# Packages that only some folders may import, so that `import recontrast` stays light and the losses need no timm.
OUTSIDE = {
    "timm": "models app",
    "triton": "kernels app",
    "typer": "app",
    "rich": "app",
    "yaml": "recipes",
    "PIL": "data inference app",
    "pyarrow": "app",
    "ray": "app",
    "sklearn": "app",
    "torchvision": "",
}


def folder(path):
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
            allowed = {folder(path), *ALLOWED[folder(path)].split()}
            assert target in allowed, f"{path.relative_to(ROOT)} must not import {name}"
        elif package in OUTSIDE:
            assert folder(path) in OUTSIDE[package].split(), f"{path.name} must not import {package}"
        else:
            assert package not in {"tests", "benchmarks"}


def test_every_folder_has_a_line():
    assert {folder(path) for path in FILES} == set(ALLOWED)


def test_lines_run_from_the_bottom_up():
    """A folder imports only folders above its own line here, so that there is no cycle."""
    for position, (name, allowed) in enumerate(ALLOWED.items()):
        assert set(allowed.split()) <= set(list(ALLOWED)[:position]), name


def lines_of(text, python):
    """Lines of a file; of Python without docstrings, which shall be complete."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [node.body[0] for node in ast.walk(ast.parse(text)) if isinstance(node, documented)] if python else []
    strings = [node for node in found if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return len(text.splitlines()) - sum(node.end_lineno - node.lineno + 1 for node in strings)


@pytest.mark.parametrize("path", [*FILES, *sorted(ROOT.glob("csrc/**/*.*"))], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    lines = lines_of(path.read_text(), path.suffix == ".py")
    assert lines <= 310, f"{path.name} has {lines} lines: two ideas?"


def test_docstrings_are_no_lines_of_code():
    text = '"""One\nand two."""\n\n\ndef f():\n    """Three."""\n    return 4\n'
    assert (lines_of(text, True), lines_of(text, False)) == (4, 7)


def functions_of(text):
    """Name, line and number of lines of each function; docstrings do not count."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first, lines = node.body[0], node.end_lineno - node.lineno + 1
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines -= first.end_lineno - first.lineno + 1
            yield node.name, node.lineno, lines


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_fit_on_a_screen(path):
    """A longer one gives its reason in a comment on the line of its ``def``."""
    text = path.read_text()
    for name, line, lines in functions_of(text):
        assert lines <= 60 or "#" in text.splitlines()[line - 1], f"{path.name}: {name} has {lines} lines"


def test_functions_are_counted_without_docstrings():
    assert list(functions_of('def f():\n    """A\n    docstring."""\n    return 1\n')) == [("f", 1, 2)]


def test_no_assert_outside_tests():
    """Python drops them with -O; an error has a sentence."""
    scripts = [path for folder in ("benchmarks", "docs", "examples") for path in ROOT.glob(f"{folder}/*.py")]
    scripts = [path for path in scripts if not path.name.startswith("bench_")]  # pytest runs those
    for path in [*FILES, *scripts, ROOT / "setup.py"]:
        found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not found, f"{path.relative_to(ROOT)}: assert in lines {found}"


def test_import_is_light():
    """`import recontrast` alone brings no timm, typer, rich or scikit-learn."""
    import subprocess

    code = "import sys, recontrast; print([m for m in ('timm', 'typer', 'rich', 'sklearn', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def test_walking_the_package_finds_its_modules_alone():
    """Tools that walk packages see every module of ours, and none of the checkout's other folders."""
    import subprocess

    code = """
import pkgutil, recontrast
print(*(module.name for module in pkgutil.walk_packages(recontrast.__path__, "recontrast.")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    names = {f"recontrast.{library.name.partition('.')[0]}" for library in ROOT.glob("recontrast/*.so")}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = ("recontrast", *parts) if parts[0] == "kernels" else parts
        names.add(".".join(parts).removesuffix(".__init__"))
    assert set(done.stdout.split()) == names - {"recontrast"}, done.stdout + done.stderr


@pytest.mark.parametrize("start", ["checkout", "elsewhere"])
def test_kernels_are_importable(start, tmp_path):
    """Python started in the checkout imports the checkout's package; either way the package has its kernels."""
    import subprocess

    code = """
import recontrast.kernels
from recontrast import ReContrast, ops
print(recontrast.__file__, recontrast.kernels.__file__, ops.BACKEND["cpu"])
"""
    folder = ROOT if start == "checkout" else tmp_path
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package, kernels, backend = done.stdout.split()
    if start == "checkout":
        assert package == str(ROOT / "recontrast/__init__.py")
    in_checkout = Path(package).is_relative_to(ROOT / "recontrast")
    parent = ROOT if in_checkout else Path(package).parent
    assert Path(kernels).resolve() == (parent / "kernels/__init__.py").resolve()
    assert backend == "native"
