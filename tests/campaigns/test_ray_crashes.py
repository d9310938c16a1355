"""Prediction with Ray whose driver or workers are killed at random moments: the next call ends as an unbroken one."""

import importlib.util
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from campaigns.conftest import FIGURES
from campaigns.scenarios import normalise
from faults import copy, list_hidden, read_folder, run_command, start, wait
from saved_model import RECIPE, draw, save

from recontrast.app.prediction import parquet_parts, ray_predict
from recontrast.data.unfinished import name_mark

EARLIER, IMAGES = 8, 24  # images of an earlier call with the same folder, and of all calls after it
KINDS = {"driver": 24, "worker": 24, "driver and worker": 12, "driver with its own cluster": 12}
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of Ray's own modules
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray"),
]


def pytest_generate_tests(metafunc):
    metafunc.parametrize("kind", list(KINDS))


@dataclass
class Cluster:
    """A running Ray cluster, and the process that started it."""

    address: str
    process: int


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster that a forked process starts, so that other forks of this one can connect to it."""
    if FIGURES not in os.environ:  # the test runs in a new process, which has the cluster
        yield None
        return
    os.environ["RAY_AUTH_MODE"] = "token"  # set before the import of Ray, which sets it for its own process otherwise
    ray = ray_predict._import_ray(None)
    folder = tmp_path_factory.mktemp("cluster")

    def action():
        with ray_predict._cluster(ray, None, cpus=2):
            (folder / "address").write_text(ray.get_runtime_context().gcs_address)
            (folder / "started").touch()
            while not (folder / "end").exists():
                time.sleep(0.05)
        return {"code": 0}

    process = start(action, folder / "report")
    deadline = time.monotonic() + 120
    while not (folder / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield Cluster((folder / "address").read_text(), process)
    (folder / "end").touch()
    assert wait(process, folder / "report")["code"] == 0


def read_process(pid):
    """Return the title of a process and its parent; None if it has ended."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        state, parent = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else (title, int(parent))


def list_workers(ancestor):
    """List the processes of Ray that score images and descend from a process."""
    processes = {int(name): read_process(name) for name in os.listdir("/proc") if name.isdigit()}

    def descends(pid):
        while pid != ancestor and processes.get(pid) is not None:
            pid = processes[pid][1]
        return pid == ancestor

    return [pid for pid, entry in processes.items() if entry is not None and "MapWorker" in entry[0] and descends(pid)]


def kill_worker(chance, ancestor, driver, ended, seconds):
    """Kill one of the workers, or all, that have started since the call, at most ``seconds`` after the first one.

    Return whether one was killed while the call had not ended.
    """
    while read_process(driver) is not None:
        if workers := [pid for pid in list_workers(ancestor) if pid not in ended]:
            time.sleep(chance.choice([0, chance.uniform(0, seconds)]))  # it starts, loads, or scores
            workers = [pid for pid in workers if read_process(pid) is not None]
            if not workers or read_process(driver) is None:
                return False
            for pid in workers if chance.random() < 0.3 else [chance.choice(workers)]:
                os.kill(pid, signal.SIGKILL)
            return True
        time.sleep(0.02)
    return False


def read_results(out):
    """Return the rows of all parts, in order, and the other files of a folder."""
    _, pq = parquet_parts.import_arrow()
    files = read_folder(out, normalise)
    names = [name for name in files if name.startswith(parquet_parts.FOLDER)]
    rows = [row for name in names for row in pq.ParquetFile(out / name).read().to_pylist()]
    return sorted(rows, key=lambda row: row["path"]), {name: files[name] for name in files if name not in names}


def list_leftovers(out):
    return list_hidden(out.parent) + [path.name for path in (out / parquet_parts.FOLDER).glob(".*")]


def describe_killed(out, former, whole):
    """Return what is wrong with the folder of a killed call; None if nothing is."""
    if not out.exists():
        return None
    rows, files = read_results(out)
    if any(row not in whole[0] for row in rows) or len({row["path"] for row in rows}) != len(rows):
        return "rows that the unbroken call does not have"
    if name_mark(ray_predict.COMMAND) in files or (rows, files) in (([], {}), former, whole):
        return None
    return f"{len(rows)} rows without a mark, beside {sorted(files)}"


@pytest.fixture
def _whole(request):
    """Skip an ordinary run: tests/app/prediction/test_ray_predict.py kills a driver and a worker there."""
    if request.config.option.markexpr != "campaign":
        pytest.skip("needs `pytest -m campaign`: minutes on a busy machine")


def test_prediction_with_killed(_whole, campaign, tmp_path, cluster, kind):
    checkpoint, images = save(tmp_path / "checkpoint.pt", RECIPE), draw(tmp_path / "images", IMAGES, seed=1)
    out, report = tmp_path / "work" / "out", tmp_path / "report"
    out.parent.mkdir()
    is_own = kind.endswith("its own cluster")
    arguments = ["predict", checkpoint, "--out", out, "--engine", "ray", "--device", "cpu"]
    arguments += ["--part", "2", "--batch", "2", "--workers", "2"]
    arguments += [] if is_own else ["--address", cluster.address]

    def predict(*inputs):
        return start(run_command([*arguments, *inputs]), report)

    results = {0: ([], {})}
    for count in (EARLIER, IMAGES):
        begun = time.monotonic()
        copy(None, out)
        result = wait(predict(*sorted(images.iterdir())[:count]), report)
        assert result["code"] == 0, result["text"]
        duration = time.monotonic() - begun
        results[count] = read_results(out)
        copy(out, tmp_path / str(count))
    whole = results[IMAGES]
    for seed in range(3 * KINDS[kind]):
        if campaign.tried == KINDS[kind]:
            break
        chance = random.Random(seed)
        earlier = EARLIER if seed % 2 else 0
        copy(tmp_path / str(EARLIER) if earlier else None, out)
        ended = [] if is_own else list_workers(cluster.process)
        driver = predict(images)
        is_hit, wrong = True, None
        if "worker" in kind:
            is_hit = kill_worker(chance, cluster.process, driver, ended, duration / 2)
        if "driver" in kind:
            time.sleep(chance.uniform(0, duration / 2 if "worker" in kind else duration))
            os.kill(driver, signal.SIGKILL)
        result = wait(driver, report)
        if "driver" in kind:
            is_hit &= result["code"] == -9
            if result["code"] not in (0, -9):
                wrong = f"ended with {result['code']}: {result['text'][-300:]}"
            wrong = wrong or describe_killed(out, results[earlier], whole)
            result = wait(predict(images), report)
        if wrong is None and result["code"] != 0:
            wrong = f"the call ended with {result['code']}: {result['text'][-500:]}"
        elif wrong is None and read_results(out) != whole:
            wrong = "results of another call"
        elif wrong is None and (leftovers := list_leftovers(out)):
            wrong = f"left {leftovers}"
        if wrong is not None:
            campaign.failed(f"{kind}, seed {seed}: {wrong}")
        elif is_hit:  # the call had not ended
            campaign.passed()
