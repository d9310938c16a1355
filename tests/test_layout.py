"""Tests of the layout: imports between folders run one way, and files and functions stay short."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = [*sorted(ROOT.glob("recontrast/**/*.py")), *sorted(ROOT.glob("kernels/*.py"))]
FILES = [path for path in FILES if not path.is_relative_to(ROOT / "recontrast/kernels")]  # a link in some checkouts
# Folder, or file of the root -> parts of this package that it may import besides itself, from the bottom up.
ALLOWED = {
    "reference": "",
    "kernels": "",
    "float32": "",
    "device_limits": "",
    "backend": "",  # also the kernels, by name, on a device that needs them
    "data": "",
    "lazy_import": "",
    "loggers": "",
    "metrics": "lazy_import device_limits",
    "op_checks": "",
    "norm_act": "reference op_checks",
    "mined_loss": "reference op_checks",
    "ops": "reference backend op_checks mined_loss norm_act",
    "distances": "ops",
    "inside": "device_limits",
    "models": "data device_limits loggers reference ops distances inside",
    "runtime": "data models",
    "mining": "",
    "loss": "ops mined_loss mining distances runtime",
    "anomaly_map": "ops distances float32 inside",
    "recipes": "data",
    "architectures": "models mining inside loss anomaly_map recipes",
    "registration": "architectures recipes",
    "calibration": "data",
    "checkpoint": "data lazy_import models architectures runtime recipes calibration",
    "inference": "data lazy_import loggers metrics ops float32 models runtime anomaly_map inside recipes calibration "
    "checkpoint",
    "evaluation": "data device_limits metrics models runtime recipes calibration checkpoint inference",
    "training": "data models float32 architectures runtime mining loss recipes calibration checkpoint inference",
    "export": "data loggers ops models anomaly_map inside recipes calibration checkpoint inference",
    "service": "data recipes calibration runtime inference",
    "experiments": "data models architectures runtime recipes registration checkpoint inference evaluation training",
    "app": "data metrics ops models architectures runtime recipes registration calibration checkpoint inference "
    "evaluation training export service experiments kernels backend float32 reference",
    "__main__": "app",
    "__init__": "metrics ops models loss mining anomaly_map architectures recipes registration app",  # on first use
}
# Packages that only some folders may import, so that `import recontrast` stays light and the losses need no timm.
OUTSIDE = {
    "timm": "models app",
    "triton": "kernels app",
    "typer": "app",
    "rich": "app",
    "yaml": "recipes",
    "PIL": "data inference app",
    "pyarrow": "app data",
    "ray": "app",
    "sklearn": "app",
    "torchvision": "",
    "h11": "service app",
    "pydicom": "data",
}


def folder(path):
    """Return the key of `ALLOWED` for a file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def imports(path):
    """Yield the dotted names that a file imports."""
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


def test_every_folder_is_listed():
    assert {folder(path) for path in FILES} == set(ALLOWED)


def test_folders_are_listed_from_the_bottom_up():
    """A folder imports only folders listed before it, so there are no cycles."""
    for position, (name, allowed) in enumerate(ALLOWED.items()):
        assert set(allowed.split()) <= set(list(ALLOWED)[:position]), name


def count_lines(text, python):
    """Return the number of lines of a file; docstrings of Python files do not count."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    first = [node.body[0] for node in ast.walk(ast.parse(text)) if isinstance(node, documented)] if python else []
    strings = [node for node in first if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
    return len(text.splitlines()) - sum(node.end_lineno - node.lineno + 1 for node in strings)


@pytest.mark.parametrize("path", [*FILES, *sorted(ROOT.glob("csrc/**/*.*"))], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_readable(path):
    lines = count_lines(path.read_text(), path.suffix == ".py")
    assert lines <= 310, f"{path.name} has {lines} lines: divide it"


def test_docstrings_do_not_count_as_lines():
    text = '"""One\nand two."""\n\n\ndef f():\n    """Three."""\n    return 4\n'
    assert (count_lines(text, True), count_lines(text, False)) == (4, 7)


def list_functions(text):
    """Yield name, line and length of each function; docstrings do not count."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first, lines = node.body[0], node.end_lineno - node.lineno + 1
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                lines -= first.end_lineno - first.lineno + 1
            yield node.name, node.lineno, lines


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_functions_fit_on_a_screen(path):
    """Longer functions give the reason in a comment on their ``def`` line."""
    text = path.read_text()
    for name, line, lines in list_functions(text):
        assert lines <= 60 or "#" in text.splitlines()[line - 1], f"{path.name}: {name} has {lines} lines"


def test_docstrings_do_not_count_in_functions():
    assert list(list_functions('def f():\n    """A\n    docstring."""\n    return 1\n')) == [("f", 1, 2)]


def test_no_assert_outside_tests():
    """Python drops assertions with -O, and an exception has a message."""
    scripts = [path for folder in ("benchmarks", "docs", "examples") for path in ROOT.glob(f"{folder}/*.py")]
    scripts = [path for path in scripts if not path.name.startswith("bench_")]  # run by pytest
    for path in [*FILES, *scripts, ROOT / "setup.py"]:
        lines = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not lines, f"{path.relative_to(ROOT)}: assert in lines {lines}"


# Writes that do not go through `data.atomic`: to an open file, to memory, or to a new temporary folder of our own.
WRITES = {
    "recontrast/app/cli.py": {"open(os.devnull, 'w')"},
    "recontrast/app/prediction/ray_predict.py": {"os.open(os.devnull, os.O_WRONLY)"},
    "recontrast/checkpoint/file.py": {"torch.save({_KEY: FORMAT, **content}, file)"},
    "recontrast/data/heatmaps.py": {"np.save(content, anomaly)"},
    "recontrast/data/locks.py": {"open_no_follow(path, os.O_RDWR | os.O_CREAT)"},
    "recontrast/data/prepare.py": {"(folder / MARKER_FILE).write_text(json.dumps(description, indent=1) + '\\n')"},
    "recontrast/data/regular_file.py": {"open_no_follow(path, flags)"},
    "recontrast/data/system.py": {
        "os.open(path, flags)",  # to sync what was written
        "os.open(path, flags | _NO_FOLLOW | NO_WAIT, 0o666)",
    },
    "recontrast/export/low_precision_file.py": {
        "page.write_text(report.to_markdown(file.name))",
        "table.write_text(json.dumps({'exported': file.name, **report.to_dict()}, indent=1) + '\\n')",
    },
    "recontrast/export/write_files.py": {
        "torch.export.save(program, target, extra_files={f'{KEY}.json': description})",
        "open(path, 'wb')",
        "path.write_bytes(model.SerializeToString())",
        "openvino.save_model(model, path, compress_to_fp16=half)",
    },
    "recontrast/inference/file_checks.py": {"path.write_bytes(content)"},
    "recontrast/inference/pt2_file.py": {"zipfile.ZipFile(buffer, 'w', zipfile.ZIP_STORED)"},
    "recontrast/data/list_files.py": {"pq.write_table(table, sink, write_page_checksum=True)"},  # to memory
    "recontrast/app/prediction/parquet_parts.py": {"pq.write_table(table, sink, write_page_checksum=True)"},
}


def list_writes(source):
    """Return the calls that may open a file for writing, except those below a folder named ``staging``."""
    calls = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        text, name = ast.unparse(node), ast.unparse(node.func).rpartition(".")[2]
        texts = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
        modes = set(texts) & {"w", "wb", "w+b", "a", "ab", "a+b", "r+", "r+b"}  # "x" opens new files alone
        is_write = name in ("write_text", "write_bytes", "tofile", "write_table", "save_model", "savez")
        is_write |= name in ("open", "ZipFile", "TemporaryFile") and bool(modes)
        is_write |= text.startswith(("np.save(", "torch.save(", "torch.export.save(", "onnx.save("))
        is_write |= text.startswith(("os.open(", "open_no_follow(")) and "O_RDONLY" not in text
        if is_write and not text.startswith("(staging / "):
            calls.append(text)
    return calls


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_written_by_one_mechanism(path):
    """`data.atomic` follows no link and leaves no half file; `open_to_change` continues files of our own."""
    allowed = {ast.unparse(ast.parse(call)) for call in WRITES.get(str(path.relative_to(ROOT)), ())}
    assert set(list_writes(path.read_text())) == allowed


def test_writes_are_recognised():
    source = """
open(p, "w"); p.open("ab"); (out / "a").write_text("b"); np.save(p, a); os.open(p, os.O_CREAT | os.O_WRONLY)
open(p); p.open("rb"); (staging / "a").write_bytes(b""); os.open(p, os.O_RDONLY); torch.load("a")
"""
    assert len(list_writes(source)) == 5


def test_import_is_light():
    """`import recontrast` does not import timm, typer, rich, scikit-learn or Pillow."""
    import subprocess

    code = "import sys, recontrast; print([m for m in ('timm', 'typer', 'rich', 'sklearn', 'PIL') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]", process.stdout


def test_walking_the_package_lists_its_modules():
    """`pkgutil.walk_packages` lists every module of the package, and no other folder of the checkout."""
    import subprocess

    code = """
import pkgutil, recontrast
print(*(module.name for module in pkgutil.walk_packages(recontrast.__path__, "recontrast.")))
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    names = {f"recontrast.{library.name.partition('.')[0]}" for library in ROOT.glob("recontrast/*.so")}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = ("recontrast", *parts) if parts[0] == "kernels" else parts
        names.add(".".join(parts).removesuffix(".__init__"))
    assert set(process.stdout.split()) == names - {"recontrast"}, process.stdout + process.stderr


@pytest.mark.parametrize("start", ["checkout", "elsewhere"])
def test_kernels_are_importable(start, tmp_path):
    """The package and its kernels import from anywhere; in the checkout, the checkout's package is imported."""
    import subprocess

    code = """
import recontrast.kernels
from recontrast import ReContrast, ops
print(recontrast.__file__, recontrast.kernels.__file__, ops.BACKEND["cpu"])
"""
    folder = ROOT if start == "checkout" else tmp_path
    process = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    package, kernels, backend = process.stdout.split()
    if start == "checkout":
        assert package == str(ROOT / "recontrast/__init__.py")
    in_checkout = Path(package).is_relative_to(ROOT / "recontrast")
    parent = ROOT if in_checkout else Path(package).parent
    assert Path(kernels).resolve() == (parent / "kernels/__init__.py").resolve()
    assert backend == "native"


def test_every_package_is_installed():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11 and later
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in FILES if path.name == "__init__.py"}
    wanted = {".".join(folder.parts) for folder in folders} - {"kernels"} | {"recontrast.kernels"}
    assert listed == wanted
