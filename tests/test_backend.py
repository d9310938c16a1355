"""Which kernels run, and how the environment variable chooses them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recontrast import backend, ops

SHOW = "from recontrast import ops; print(ops.BACKEND['cpu'], ops.WHY.get('cpu'))"


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    "requested, report",
    [("torch", "torch chosen by RECONTRAST_BACKEND"), ("triton", None), ("", None)],
)
def test_environment_variable_chooses_the_backend(requested, report):
    if report is None:  # "native None" where the kernels are compiled
        report = f"{ops.BACKEND['cpu']} {ops.WHY.get('cpu')}"
    assert run(SHOW, RECONTRAST_BACKEND=requested).stdout.strip() == report


def test_unknown_backend_is_an_error(monkeypatch):
    monkeypatch.setenv("RECONTRAST_BACKEND", "cuda")
    with pytest.raises(ValueError, match="RECONTRAST_BACKEND: wanted one of native, torch, triton, got 'cuda'"):
        backend.choose("cpu", {})
    code = "import sys; sys.argv = ['recontrast', 'info']; from recontrast.app.cli import main; main()"
    done = run(code, RECONTRAST_BACKEND="fast")
    assert done.stderr == "recontrast: RECONTRAST_BACKEND: wanted one of native, torch, triton, got 'fast'\n"
    assert done.returncode == 2


def test_requested_backend_must_be_available(monkeypatch):
    monkeypatch.setenv("RECONTRAST_BACKEND", "native")
    monkeypatch.setattr(backend, "_native", lambda device: f"_{device}.so was not built")
    with pytest.raises(ValueError, match=r"wanted native kernels on cpu, but _cpu\.so was not built"):
        backend.choose("cpu", {})


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Return the folder in which `backend` looks for its libraries and the record of the build."""
    monkeypatch.setattr(backend, "__file__", str(tmp_path / "backend.py"))
    monkeypatch.setattr(backend, "BACKEND", {"cpu": "native"})
    monkeypatch.setattr(backend, "WHY", {})
    monkeypatch.delenv("RECONTRAST_BACKEND", raising=False)
    return tmp_path


def test_missing_library_is_one_warning(package, monkeypatch):
    monkeypatch.setattr(backend, "_native", lambda device: f"_{device}.so was not built")
    with pytest.warns(UserWarning, match=r"recontrast runs torch kernels on cpu: _cpu\.so was not built"):
        backend.choose("cpu", {})
    assert (backend.BACKEND, backend.WHY) == ({"cpu": "torch"}, {"cpu": "_cpu.so was not built"})


def write_record(folder, **values):
    (folder / "_build.json").write_text(json.dumps(values))


def test_warning_names_what_is_missing_and_what_it_costs(package):
    write_record(package, version="0", mode="auto", missing={"_cpu": "no C++ compiler was found (c++)"})
    wanted = r"recontrast runs torch kernels on cpu: _cpu was not built: no C\+\+ compiler was found \(c\+\+\); the"
    with pytest.warns(backend.KernelWarning, match=wanted):
        backend.choose("cpu", {})
    assert backend.WHY == {"cpu": "_cpu was not built: no C++ compiler was found (c++)"}


def test_chosen_python_mode_does_not_warn(package):
    write_record(package, version="0", mode="python", missing={"_cpu": "chosen"})
    backend.choose("cpu", {})  # a warning would be an error
    assert backend.WHY == {"cpu": "_cpu was not built: chosen"}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"missing": 3}', '{"missing": {"_cpu": 3}}'])
def test_damaged_record_is_like_none(package, content):
    (package / "_build.json").write_text(content)
    assert backend._native("cpu") == "_cpu was not built (pip install -e . builds it; CUDA needs nvcc)"


def test_native_kernels_need_a_torch_with_the_stable_abi(package, monkeypatch):
    (package / "_cpu.so").write_bytes(b"")
    monkeypatch.setattr(backend.torch, "__version__", "2.10.1+cpu")
    assert backend._native("cpu") == "_cpu.so needs torch >= 2.11, got 2.10.1+cpu"


def test_library_of_another_version_is_refused(package):
    (package / "_cpu.so").write_bytes(b"")
    write_record(package, version="0.1.0", mode="auto", missing={})
    assert backend._native("cpu").startswith("_cpu.so is of version 0.1.0, not ")


def test_foreign_library_is_one_sentence(package):
    (package / "_cpu.so").write_bytes(b"\x7fELF of something else")
    assert backend._native("cpu").startswith("_cpu.so does not load: ")


def test_triton_has_every_operator():
    """Registering needs a GPU; here, that each operator is in the module that `ops.KERNEL_MODULES` names."""
    import importlib

    from recontrast import ops

    for name, module in ops.KERNEL_MODULES.items():
        assert callable(getattr(importlib.import_module(f"recontrast.kernels.{module}"), name))
    assert set(ops.KERNEL_MODULES) == set(ops.SCHEMAS)


def test_missing_kernels_are_one_sentence(tmp_path):
    """In a checkout in which nothing was built, without an installed package."""
    (tmp_path / "recontrast").mkdir()
    for name in ("__init__.py", "backend.py"):
        shutil.copy(Path(backend.__file__).with_name(name), tmp_path / "recontrast")
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
from recontrast import backend
print(backend._triton("cuda", {"cosine_sums": "cosine_sums"}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "recontrast.kernels is not installed (pip install -e . in the checkout installs it)\n", done
