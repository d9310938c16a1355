import errno
import os
import pickle
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace

import pytest
import torch

import recontrast
from recontrast import ReContrast, checkpoint
from recontrast.data import atomic
from recontrast.recipes.recipe import Recipe

RECIPE = Recipe(backbone="test_resnet", weights="random", size=64, seed=3, channels_last=False)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ReContrast("test_resnet", weights="random", encoder_bn="eval")
    model.train()(torch.randn(3, 3, 64, 64))  # the running statistics are not the initial ones
    return model


@pytest.fixture
def state(model):
    return checkpoint.Checkpoint(
        step=7,
        category="screw",
        recipe=RECIPE,
        model_config=model.config,
        preprocessing={"size": [64, 64], "crop": None, "mean": list(model.mean), "std": list(model.std)},
        images={"count": 3, "digest": "abc"},
        model=model.state_dict(),
        optimisers=[torch.optim.AdamW(model.parameters()).state_dict()],
        rng={"torch": torch.get_rng_state(), "cuda": None, "batches": {"generator": torch.get_rng_state(), "place": 2}},
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path, state):
    path = checkpoint.save(tmp_path / "new" / "checkpoint.pt", state)
    assert names(path.parent) == ["checkpoint.pt"]
    loaded = checkpoint.load(path)
    assert loaded.recipe == RECIPE
    assert loaded.version == recontrast.__version__
    for name in ("step", "category", "model_config", "preprocessing", "images", "optimisers"):
        assert getattr(loaded, name) == getattr(state, name)
    assert loaded.model.keys() == state.model.keys()
    assert all(torch.equal(loaded.model[key], value) for key, value in state.model.items())


def test_load_model_needs_nothing_but_the_file(tmp_path, model, state):
    path = checkpoint.save(tmp_path / "checkpoint.pt", state)
    images = torch.randn(2, 3, 64, 64)
    loaded, recipe, info = checkpoint.load_model(path, "cpu")
    assert not loaded.training
    assert recipe == RECIPE
    assert (info.step, info.category, info.model) == (7, "screw", {})
    assert (loaded.mean, loaded.std) == (model.mean, model.std)
    model.eval()
    with torch.no_grad():
        for original, restored in zip(model(images), loaded(images), strict=True):
            assert all(map(torch.equal, original, restored))


def test_normalisation_comes_from_the_file(tmp_path, state):
    other = {**state.preprocessing, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    path = checkpoint.save(tmp_path / "checkpoint.pt", replace(state, preprocessing=other))
    loaded, _, _ = checkpoint.load_model(path, "cpu")
    assert (tuple(loaded.mean), tuple(loaded.std)) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


# ---- files that cannot be read -----------------------------------------------


def refused(path, text, kind=ValueError):
    with pytest.raises(kind, match=text) as error:
        checkpoint.load_model(path, "cpu")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_there(tmp_path):
    refused(tmp_path / "none.pt", "wanted a checkpoint file, got no such file", FileNotFoundError)
    refused(tmp_path, "wanted a checkpoint file, got a folder", FileNotFoundError)


@pytest.mark.parametrize("keep", [0, 1, 2, 10, 0.5, -1])
def test_truncated_file_is_refused(tmp_path, state, keep):
    path = checkpoint.save(tmp_path / "checkpoint.pt", state)
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep % size)
    refused(path, "cut off or damaged" if keep not in (0, 1) else "of another kind")


def test_other_files_are_refused(tmp_path):
    class Foreign:
        pass

    path = tmp_path / "some.pt"
    for content in (b"hello", pickle.dumps({"a": 1}), b"\x89PNG\r\n\x1a\n" + bytes(50)):
        path.write_bytes(content)
        refused(path, "got a file of another kind")
    for content in ({"weight": torch.zeros(3)}, torch.zeros(3), torch.nn.Linear(2, 2)):
        torch.save(content, path)
        refused(path, "got a PyTorch file with other content")


def test_code_in_the_file_is_never_executed(tmp_path):
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"recontrast_checkpoint": checkpoint.FORMAT, "model": Trap()}, tmp_path / "trap.pt")
    refused(tmp_path / "trap.pt", "with other content")
    assert not (tmp_path / "ran").exists()


def test_other_format_is_refused(tmp_path, state, monkeypatch):
    monkeypatch.setattr(checkpoint.file, "FORMAT", 99)
    path = checkpoint.save(tmp_path / "checkpoint.pt", replace(state, version="9.9"))
    monkeypatch.undo()
    refused(path, "wanted a checkpoint of format 1, got format 99, written by recontrast 9.9")


def test_missing_or_wrong_parts_are_refused(tmp_path, state):
    path = tmp_path / "checkpoint.pt"
    torch.save({"recontrast_checkpoint": checkpoint.FORMAT, "step": 1}, path)
    refused(path, "the checkpoint lacks category, recipe, ")
    few = {key: value for key, value in state.model.items() if "decoder" not in key}
    checkpoint.save(path, replace(state, model=few))
    refused(path, "its weights do not fit the model")
    for layers in ([[1.5]], [["a"]], [[-1]], "ab", [3], 0, [[0]] * 65):
        checkpoint.save(path, replace(state, model_config={**state.model_config, "layers": layers}))
        refused(path, "model_config: layers: wanted a whole number of at least 1 or groups of blocks, got ")
    checkpoint.save(path, replace(state, model_config={**state.model_config, "wings": 2}))
    refused(path, "wanted a model that recontrast .* can build, got one of ")


# ---- writing: complete or unchanged ---------------------------------------------


def test_full_disk_before_writing(tmp_path, state, monkeypatch):
    path = checkpoint.save(tmp_path / "checkpoint.pt", state)
    before = path.read_bytes()
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda folder: Usage(10_000, 9_000, 1_000))
    with pytest.raises(OSError, match=r"could not be written \(No space.*\): wanted [\d,]+ bytes, 1,000 are free") as e:
        checkpoint.save(path, replace(state, step=8))
    assert str(path) in str(e.value)
    assert e.value.errno == errno.ENOSPC
    assert "\n" not in str(e.value)
    assert names(tmp_path) == ["checkpoint.pt"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_full_disk_at_the_end(tmp_path, state, monkeypatch, failing):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = checkpoint.save(tmp_path / "checkpoint.pt", state)
    before = path.read_bytes()
    monkeypatch.setattr(atomic.os, failing, full)
    with pytest.raises(OSError, match="could not be written"):
        checkpoint.save(path, state)
    assert names(tmp_path) == ["checkpoint.pt"]
    assert path.read_bytes() == before


def test_interrupt_leaves_no_file(tmp_path, state, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path / "checkpoint.pt", state)
    assert names(tmp_path) == []


def test_other_errors_are_not_changed(tmp_path, state):
    with pytest.raises(Exception, match=r"pickle|Can't") as error:
        checkpoint.save(tmp_path / "checkpoint.pt", replace(state, images={"count": lambda: 3}))
    assert not isinstance(error.value, OSError)
    assert names(tmp_path) == []


def test_folder_that_is_a_file_is_refused(tmp_path, state):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^cannot write .*checkpoint\.pt: (Not a directory|File exists)$"):
        checkpoint.save(tmp_path / "file" / "checkpoint.pt", state)


WRITE = """
import os, resource, signal, sys
import torch
from recontrast.data import atomic
from recontrast import checkpoint
path, how = sys.argv[1:]
state = checkpoint.load(path)
if how == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
else:
    setattr(atomic.os, how, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
try:
    checkpoint.save(path, state)
except OSError as error:
    print(error)
    sys.exit(2)
"""


def run(path, how):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", WRITE, str(path), how]
    return subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=600)


def test_file_size_limit_leaves_the_last_checkpoint(tmp_path, state):
    """The operating system refuses to write more in the middle of the file."""
    resource = pytest.importorskip("resource")
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000
    path = checkpoint.save(tmp_path / "checkpoint.pt", state)
    before = path.read_bytes()
    process = run(path, "limit")
    assert process.returncode == 2, process.stderr
    assert f"{path}: could not be written (File too large): wanted " in process.stdout
    assert process.stdout.count("\n") == 1
    assert names(tmp_path) == ["checkpoint.pt"]
    assert path.read_bytes() == before


def test_kill_leaves_the_last_checkpoint(tmp_path, state):
    """The last complete checkpoint stays, and the next save removes the leftover temporary file."""
    path = checkpoint.save(tmp_path / "checkpoint.pt", state)
    before = path.read_bytes()
    process = run(path, "replace")
    assert process.returncode == -9
    assert path.read_bytes() == before
    assert len(names(tmp_path)) == 2
    checkpoint.save(path, replace(state, step=8))
    assert names(tmp_path) == ["checkpoint.pt"]
    assert checkpoint.load(path).step == 8
