"""``recontrast doctor``: each finding on a machine where it holds."""

import importlib.metadata
import importlib.util

import pytest
import torch
from command_line import call, works

from recontrast import backend, metrics, ops
from recontrast.app import health


def find(name, checks=None):
    found = [check for check in checks or health.check_installation() if check.name == name]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def installed(monkeypatch):
    """Return a mapping name -> version of the installed packages, and one of their requirements, to be changed."""
    versions, requirements = {"torch": "2.14.1+cu130"}, {"recontrast": ["torch>=2.6", 'ray>=2; extra == "ray"']}

    def look_up(table):
        def get(name):
            if name not in table:
                raise importlib.metadata.PackageNotFoundError(name)
            return table[name]

        return get

    monkeypatch.setattr(importlib.metadata, "version", look_up(versions))
    monkeypatch.setattr(importlib.metadata, "requires", look_up(requirements))
    return versions, requirements


def test_this_machine_works():
    lines = works("doctor").splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "note", "missing"}
    assert any(line.split()[:3] == ["ok", "kernels", "cpu"] for line in lines)


def test_missing_and_old_requirements_fail(installed):
    versions, requirements = installed
    requirements["recontrast"] += ["timm>=1.0.12", "numpy>=1.26"]
    versions["numpy"] = "1.25.9"
    checks = {check.name: check for check in health._check_requirements()}
    assert checks["torch"] == health.Check("torch", "ok", "2.14.1+cu130")
    assert checks["timm"] == health.Check("timm", "failed", "not installed: pip install 'timm>=1.0.12'")
    text = "wanted at least 1.26, got 1.25.9: pip install --upgrade numpy"
    assert checks["numpy"] == health.Check("numpy", "failed", text)
    assert set(checks) == {"torch", "timm", "numpy"}  # not the extras


def test_checkout_without_metadata_is_a_note(installed):
    _, requirements = installed
    del requirements["recontrast"]
    assert [check.state for check in health._check_requirements()] == ["note"]


@pytest.mark.parametrize("pinned, state", [("2.14.1", None), ("2.13.0", "failed")])
def test_torchvision_of_another_torch_fails(installed, pinned, state):
    versions, requirements = installed
    versions["torchvision"] = "0.28.0"
    requirements["torchvision"] = ["numpy", f"torch=={pinned}", "pillow!=8.3.*,>=5.3.0"]
    assert [check.state for check in health._check_torchvision()] == ([state] if state else [])


def test_missing_extra_names_the_command_and_what_brings_it(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find_spec(name))
    check = find("ray", health._check_extras())
    assert check == health.Check("ray", "missing", "predict --ray: no ray: pip install 'recontrast[ray]'")


@pytest.mark.parametrize(
    "reason, state",
    [("_cpu was not built: no C++ compiler was found (c++)", "missing"), ("_cpu.so does not load: bad", "failed")],
)
def test_kernels_that_are_not_there(monkeypatch, reason, state):
    monkeypatch.setattr(backend, "read_build", dict)  # these tests also run where plain PyTorch was chosen
    monkeypatch.setitem(ops.BACKEND, "cpu", "torch")
    monkeypatch.setitem(ops.WHY, "cpu", reason)
    check = find("kernels cpu", health._check_kernels())
    assert (check.state, check.text) == (state, f"plain PyTorch: {reason}")


def test_wrong_kernel_fails(monkeypatch):
    right = ops.cosine_sums
    monkeypatch.setattr(ops, "cosine_sums", lambda x, y: right(x, y) * 1.01)
    check = health._compare_kernels("cpu", "native")
    assert check.state == "failed" and "differ by 0.01" in check.text


def test_metrics_without_the_library(monkeypatch):
    monkeypatch.setattr(backend, "read_build", dict)
    monkeypatch.setattr(metrics, "REGIONS_BACKEND", "scipy")
    assert find("metrics", health._check_kernels()).state == "missing"


def test_gpu_that_torch_cannot_use_fails(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(health.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert find("cuda", health._check_devices()).state == "failed"


def test_little_space_is_a_note(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(health, "LEAST_DISK", 1 << 60)
    monkeypatch.setattr(health, "LEAST_MEMORY", 1 << 60)
    states = {check.name: check.state for check in health._check_space()}
    assert states["working folder"] == "note"
    assert states.get("memory", "note") == "note"


def test_failure_gives_status_1(monkeypatch):
    monkeypatch.setattr(health, "check_installation", lambda: iter([health.Check("timm", "failed", "not installed")]))
    result = call("doctor")
    assert result.exit_code == 1
    assert result.stdout.split() == ["failed", "timm", "not", "installed"]
