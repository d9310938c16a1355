"""Prediction over Ray: every image exactly once, whoever dies; what needs no Ray is in test_parts.py."""

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from command_line import call
from PIL import Image
from saved_model import save

from recontrast import checkpoint as checkpoints
from recontrast.app.prediction import parquet_parts, ray_predict
from recontrast.app.prediction.predict import predict
from recontrast.inference.calibrate import calibrate
from recontrast.recipes.recipe import Recipe
from recontrast.training.train import build_model

RECIPE = Recipe(backbone="test_resnet", weights="random", size=32, encoder_bn="eval")
IMAGES = 48

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own modules, about its own ways


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures that take a moment to decode, under many names, and one that is none."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for place in range(IMAGES):
        if place < 6:
            Image.fromarray(random.integers(0, 256, (900, 900, 3), np.uint8)).save(root / f"{place:02}.png")
        else:
            os.link(root / f"{place % 6:02}.png", root / f"{place:02}.png")
    (root / "bad.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A detector that calls about half of the pictures defects."""
    torch.manual_seed(0)
    model = build_model(RECIPE, "tile")
    about = {"size": list(RECIPE.out), "crop": None, "mean": list(model.mean), "std": list(model.std)}
    good = np.random.default_rng(1).integers(0, 256, (19, *RECIPE.out, 3), np.uint8)
    found = calibrate(model, RECIPE, good, rate=0.5, pixel_rate=0.5)
    state = model.state_dict()
    return checkpoints.save(
        tmp_path_factory.mktemp("run") / "checkpoint.pt",
        checkpoints.Checkpoint(
            1, "tile", RECIPE, model.config, about, {"count": 1, "digest": ""}, model=state, calibration=found
        ),
    )


@pytest.fixture(scope="module")
def ray():
    """One session for all tests."""
    module = ray_predict._import_ray(None)
    with ray_predict._cluster(module, None, cpus=2):
        yield module


@pytest.fixture
def killed_driver(ray, checkpoint, folder, tmp_path):
    """A run in the same cluster whose driver is killed when two parts are there; its workers die with it.

    The worker waits after two parts: otherwise a busy machine may finish the run before the driver is killed.
    """
    address = ray.get_runtime_context().gcs_address
    code = f"""
import time
from pathlib import Path
from recontrast.app.prediction import ray_predict
out = Path({str(tmp_path / "out")!r})

class Worker(ray_predict.Worker):
    def __call__(self, parts):
        while len(list(self.settings["folder"].glob("part-*"))) >= 2:
            time.sleep(0.02)
        return super().__call__(parts)

ray_predict.Worker = Worker
ray_predict.predict(Path({str(checkpoint)!r}), [Path({str(folder)!r})], out, workers=1, part=4, address={address!r})
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with (tmp_path / "said").open("wb") as said:
        driver = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=said, stderr=said)
    deadline = time.monotonic() + 300
    while len(files := list((tmp_path / "out" / parquet_parts.FOLDER).glob("part-*"))) < 2:
        assert driver.poll() is None, (tmp_path / "said").read_text()
        assert time.monotonic() < deadline, (tmp_path / "said").read_text()
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert len(files) == 2
    return tmp_path / "out"


def running(process):
    """Whether it may still write: a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def rows(out):
    """Path -> row; each once."""
    found = pq.read_table(out / parquet_parts.FOLDER).to_pylist()
    assert len(found) == len({row["path"] for row in found}) == IMAGES + 1
    return {row["path"]: row for row in found}


def test_killed_worker(ray, checkpoint, folder, tmp_path, monkeypatch):
    """On the way: what it had left is done by others, each image is there once, as the local prediction has it.

    The workers wait after half of the parts: otherwise a busy machine may finish the run before one is killed.
    """
    killed, before, go_on = [], set(), tmp_path / "go_on"

    class Worker(ray_predict.Worker):
        def __call__(self, parts):
            while len(list(self.settings["folder"].glob("part-*"))) >= 12 and not go_on.exists():
                time.sleep(0.02)
            return super().__call__(parts)

    monkeypatch.setattr(ray_predict, "Worker", Worker)

    def kill(done, total):
        if not killed and done >= total / 3:
            last = max(
                (tmp_path / "out" / parquet_parts.FOLDER).glob("part-*"), key=lambda file: file.stat().st_mtime_ns
            )
            killed.append(int(parquet_parts.read_metadata(last)["worker"].split(":")[1]))
            assert done < total
            os.kill(killed[0], signal.SIGKILL)
            deadline = time.monotonic() + 60
            while running(killed[0]):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            before.update((tmp_path / "out" / parquet_parts.FOLDER).glob("part-*"))
            go_on.touch()

    summary = ray_predict.predict(checkpoint, [folder], tmp_path / "out", workers=2, part=2, batch=2, on_progress=kill)
    assert killed and (summary.scored, len(summary.unread)) == (IMAGES, 1)
    found = rows(tmp_path / "out")
    assert len(before) >= 8  # of 25 parts
    late = set((tmp_path / "out" / parquet_parts.FOLDER).glob("part-*")) - before
    assert late and killed[0] not in {int(parquet_parts.read_metadata(file)["worker"].split(":")[1]) for file in late}
    here = predict(checkpoint, [folder], tmp_path / "local", overlays=False, batch=2, device="cpu")
    assert len(here.predictions) == IMAGES and summary.defects == sum(p.decision.defect for p in here.predictions)
    assert 0 < summary.defects
    for one in here.predictions:
        row = found[one.path]
        assert row["score"] == pytest.approx(one.score, rel=1e-4)
        assert row["error"] is None and row["flagged"] is None
        assert row["decision"] == one.decision.label and row["p_value"] == one.decision.p_value
        assert (row["regions"] is None) == (one.decision.regions is None)
        if row["regions"]:
            assert [r["area"] for r in row["regions"]] == [r.area for r in one.decision.regions]
    bad = found[str(folder / "bad.png")]
    assert bad["score"] is None and "bad.png" in bad["error"] and here.unread == [bad["error"]]
    about = json.loads((tmp_path / "out" / "predict.json").read_text())
    assert (about["images"], about["unread"]) == (IMAGES + 1, 1)


def test_killed_driver_goes_on(ray, checkpoint, folder, killed_driver, tmp_path):
    """The command makes what is missing, of a list of the same images, and leaves what is there as it is."""
    before = {file: file.stat().st_ino for file in (killed_driver / parquet_parts.FOLDER).glob("part-*")}
    pq.write_table(pa.table({"path": parquet_parts.list_inputs([folder])}), tmp_path / "list.parquet")
    options = ["--out", killed_driver, "--engine", "ray", "--part", 4, "--decide"]
    result = call("predict", checkpoint, tmp_path / "list.parquet", *options)
    found = rows(killed_driver)
    defects = sum(row["decision"] == "defect" for row in found.values())
    assert result.stdout == f"{IMAGES} images scored, {defects} defects: {killed_driver / parquet_parts.FOLDER}\n"
    said = result.stderr.splitlines()
    first, last = (re.fullmatch(rf"predict (\d+)/{IMAGES + 1}", said[place]) for place in (0, -2))
    assert int(first[1]) > 4 * len(before) - 4 and int(last[1]) == IMAGES + 1
    assert said[-1].startswith(f"recontrast: {folder / 'bad.png'}: wanted") and result.exit_code == 2  # one is unread
    assert all(file.stat().st_ino == inode for file, inode in before.items())
    assert not [file for file in (killed_driver / parquet_parts.FOLDER).iterdir() if file.name.startswith(".")]


def test_error_of_a_worker_is_one_sentence(ray, checkpoint, folder, tmp_path):
    """The folder cannot be written."""
    (tmp_path / parquet_parts.FOLDER).symlink_to("/proc")
    with pytest.raises(OSError, match=r"^a worker stopped: .*part-.*: No such file or directory$"):
        ray_predict.predict(checkpoint, [folder], tmp_path)


def test_vision_transformer(ray, folder, tmp_path):
    """Dinomaly and its position embeddings in workers of their own: the scores of one process."""
    recipe = Recipe(architecture="dinomaly", backbone="test_vit", weights="random", size=64, rule="hardest")
    transformer = save(tmp_path / "transformer.pt", recipe)
    ray_predict.predict(transformer, [folder], tmp_path / "workers", workers=2, part=4)
    call("predict", transformer, folder, "--out", tmp_path / "alone", "--no-overlays", "--device", "cpu")  # one is bad
    found = {path: row["score"] for path, row in rows(tmp_path / "workers").items() if row["error"] is None}
    with (tmp_path / "alone/scores.csv").open(newline="") as file:
        wanted = {row["path"]: float(row["score"]) for row in csv.DictReader(file) if not row["error"]}
    assert len(found) == IMAGES and found == pytest.approx(wanted, rel=1e-5)


def test_too_many_workers(ray, checkpoint, folder, tmp_path):
    with pytest.raises(ValueError, match="--workers: wanted at most one for each of 2 CPUs, got 3"):
        ray_predict.predict(checkpoint, [folder], tmp_path, workers=3)


def test_sigterm_handler_is_restored():
    """ray.init replaces the handler; training in the same process would not defer the signal any more."""

    def init(*args, **options):
        signal.signal(signal.SIGTERM, lambda number, frame: None)

    module = SimpleNamespace(is_initialized=lambda: False, init=init, shutdown=lambda: None)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with ray_predict._cluster(module, None):
            assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGTERM) is before
    finally:
        signal.signal(signal.SIGTERM, before)


def test_no_ray(checkpoint, folder, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"wanted the package ray\[data\], got none installed"):
        ray_predict.predict(checkpoint, [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cpus, workers, each", [
    ([2], 1, 2), ([2], 2, 1), ([2], 3, 0), ([3, 3], 3, 1), ([3, 3], 2, 3), ([8, 2], 2, 4), ([0, 4], 1, 4), ([], 1, 0)
])  # fmt: skip
def test_share_of_the_cpus(cpus, workers, each):
    assert ray_predict.compute_cpus_per_worker(cpus, workers) == each


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "--address: wanted auto, HOST:PORT or ray://HOST:PORT, got 'nonsense'"),
        ("a b:c", "--address: wanted auto, HOST:PORT or ray://HOST:PORT, got 'a b:c'"),
        ("127.0.0.1:70000", "--address: wanted auto, HOST:PORT or ray://HOST:PORT, got '127.0.0.1:70000'"),
        ("127.0.0.1:1", "--address: wanted a running Ray cluster, got none at 127.0.0.1:1: Connection refused"),
        ("ray://127.0.0.1:1", "--address: wanted a running Ray cluster, got none at ray://127.0.0.1:1: Connection"),
        ("host..invalid:1", "--address: wanted a running Ray cluster, got none at host..invalid:1: "),
    ],
)
def test_wrong_address(address, message, monkeypatch):
    module = ray_predict._import_ray(address)
    monkeypatch.setattr(module, "init", None)  # Ray itself would try for minutes
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        ray_predict._connect(module, address, None)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        ray_predict._connect(module, None, None)


@pytest.mark.parametrize("name", ["ConnectionError", "AuthenticationError"])
def test_wrong_token(name, monkeypatch, capfd):
    module = ray_predict._import_ray(None)

    def refuse(**options):
        os.write(2, b"gcs_client.cc: Unauthenticated")
        text = "RAY_AUTH_TOKEN_PATH is set but file cannot be opened: x. Ensure that ..."
        raise ConnectionError(text) if name == "ConnectionError" else module.exceptions.AuthenticationError(text)

    monkeypatch.setattr(module, "init", refuse)
    message = {
        "ConnectionError": "that lets this process in: if it has a token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN",
        "AuthenticationError": "wanted a token for Ray, got none: RAY_AUTH_TOKEN_PATH is set but file cannot be opened",
    }[name]
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(OSError, match=message) as raised:
        ray_predict._connect(module, f"127.0.0.1:{server.getsockname()[1]}", None)
    assert "Ensure" not in str(raised.value) and capfd.readouterr().err == ""
