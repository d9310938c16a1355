"""Processes started by torchrun make the run that one makes with the whole batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import process_endings
import pytest
import torch
import torchrun_worker
from tiny import tiny_set

from recontrast.runtime.distributed import World

WORKER = Path(torchrun_worker.__file__)
PROCESSES = 3
REPETITIONS = int(os.environ.get("RECONTRAST_TEST_REPETITIONS", "2"))  # of each way to end a process


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven good images, batches of 5 and 2; seven test images, and two: one process of three has none of those."""
    root = tmp_path_factory.mktemp("data")
    tiny_set(root, train=6, good=4, defects=3)
    tiny_set(root, "bolt", train=1, good=1, defects=1)
    return root


@pytest.fixture(scope="module")
def many(data, tmp_path_factory):
    """What three processes left."""
    out = tmp_path_factory.mktemp("many")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, WORKER, data, out], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("case", torchrun_worker.CASES)
def test_same_trajectory_as_one_process(case, data, many, tmp_path):
    """Data length not divisible, BatchNorm of the whole batch, processes without images: float64 to 1e-9."""
    torchrun_worker.run(case, data, tmp_path)
    here, there = (json.loads((folder / "losses0.json").read_text()) for folder in (tmp_path, many / case))
    assert len(here) == torchrun_worker.CASES[case].steps
    np.testing.assert_allclose(there, here, rtol=1e-9)
    alone = torch.load(tmp_path / "model0.pt")
    begun = torchrun_worker.small(torchrun_worker.CASES[case]).state_dict()
    for rank in range(PROCESSES):
        found = torch.load(many / case / f"model{rank}.pt")
        assert found.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )
    moved = [name for name in alone if not torch.equal(alone[name], begun[name])]
    assert any(name.startswith("encoder") for name in moved) and any(name.startswith("decoder") for name in moved)
    assert sorted(p.name for p in (many / case / "run").iterdir()) == ["checkpoint.pt", "log.jsonl", "recipe.yaml"]


@pytest.mark.parametrize("kind", ["exact", "streamed"])
def test_same_evaluation_as_one_process(kind, data, many, tmp_path):
    """Every image once, in its place; the metrics of the whole, whatever a process saw of it."""
    torchrun_worker.measured(data, tmp_path)
    here = json.loads((tmp_path / f"{kind}0.json").read_text())
    assert [row["images"] for row in here["rows"]] == [2, 7]
    for rank in range(PROCESSES):
        assert json.loads((many / f"{kind}{rank}.json").read_text()) == here


def test_processes_with_different_data_are_refused(many):
    for rank in range(PROCESSES):
        text = (many / f"error{rank}.txt").read_text()
        assert text.startswith("train: training images: wanted the same on every process, got {'count': 7")
        assert text.endswith("on 1")
    assert not (many / "refused").exists()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 11, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_are_everything_once(count, size):
    items = np.arange(count)
    places = [World(rank, size) for rank in range(size)]
    assert [len(items[place.share(count)]) for place in places] == places[0].shares(count)
    np.testing.assert_array_equal(np.concatenate([items[place.share(count)] for place in places]), items)
    assert max(places[0].shares(count)) - min(places[0].shares(count)) <= 1


def test_a_table_made_together(many):
    """One training, three evaluations, and every process knows the outcome; the first alone wrote."""
    tables = [json.loads((many / f"table{rank}.json").read_text()) for rank in range(PROCESSES)]
    assert tables[0] == tables[1] == tables[2] == json.loads((many / "table" / "comparison.json").read_text())
    assert [line["entry"] for line in tables[0]["lines"]] == ["frozen", "trained", "both"]
    assert all(line["ours"] is not None for line in tables[0]["lines"])
    here = many / "table" / "both" / "nut" / "seed-111"
    assert (here / "results.json").exists() and not (here / "checkpoint.pt").exists()


def test_example_prints_the_same_with_two_processes():
    example = Path(__file__).parents[2] / "examples" / "two_processes.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = []
    for start in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        command = [sys.executable, *start, example]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found.append([float(line.split()[-1]) for line in done.stdout.splitlines()])
    assert len(found[0]) == 6 and found[0][-1] < found[0][0]
    np.testing.assert_allclose(found[1], found[0], rtol=2e-3)


@pytest.fixture(scope="module")
def exit_codes():
    """Exit codes of the processes that end in each way, by case."""
    command = [sys.executable, process_endings.__file__, str(REPETITIONS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300 * REPETITIONS)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


@pytest.mark.parametrize("case", process_endings.CASES)
def test_processes_end_without_abort(case, exit_codes):
    """A wrapped model or a process group may outlive the block that joined the processes."""
    codes, errors = exit_codes
    assert codes[case] == [process_endings.CASES[case]] * (2 * REPETITIONS), errors
