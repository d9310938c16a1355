"""Processes started by torchrun give the same result as one process with the full batch."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import process_endings
import pytest
import torch
import torchrun_worker
from saved_model import RECIPE, save
from tiny import tiny_set

from recontrast.runtime.distributed import World

WORKER = Path(torchrun_worker.__file__)
PROCESSES = 3
REPETITIONS = int(os.environ.get("RECONTRAST_TEST_REPETITIONS", "2"))  # of each way to end a process


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven good images, for batches of 5 and 2, and categories of seven and two test images, fewer than processes."""
    root = tmp_path_factory.mktemp("data")
    tiny_set(root, train=6, good=4, defects=3)
    tiny_set(root, "bolt", train=1, good=1, defects=1, seed=1)  # other pictures, not copies
    return root


@pytest.fixture(scope="module")
def outputs(data, tmp_path_factory):
    """Output folder of three processes."""
    out = tmp_path_factory.mktemp("outputs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, WORKER, data, out], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("case", torchrun_worker.CASES)
def test_same_trajectory_as_one_process(case, data, outputs, tmp_path):
    """Uneven shares, BatchNorm over the batch and processes without images: equal to 1e-9 in float64."""
    torchrun_worker.train_case(case, data, tmp_path)
    single, several = (json.loads((folder / "losses0.json").read_text()) for folder in (tmp_path, outputs / case))
    assert len(single) == torchrun_worker.CASES[case].steps
    np.testing.assert_allclose(several, single, rtol=1e-9)
    single_weights = torch.load(tmp_path / "model0.pt")
    initial = torchrun_worker.build_small_model(torchrun_worker.CASES[case]).state_dict()
    for rank in range(PROCESSES):
        weights = torch.load(outputs / case / f"model{rank}.pt")
        assert weights.keys() == single_weights.keys()
        for name, value in single_weights.items():
            torch.testing.assert_close(
                weights[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
            )
    changed = [name for name in single_weights if not torch.equal(single_weights[name], initial[name])]
    assert any(name.startswith("encoder") for name in changed) and any(name.startswith("decoder") for name in changed)
    assert sorted(p.name for p in (outputs / case / "run").iterdir()) == ["checkpoint.pt", "log.jsonl", "recipe.yaml"]


@pytest.mark.parametrize("kind", ["exact", "streamed"])
def test_same_evaluation_as_one_process(kind, data, outputs, tmp_path):
    """Each image is scored once and in order, and the metrics are those of all images."""
    torchrun_worker.evaluate_untrained_model(data, tmp_path)
    single = json.loads((tmp_path / f"{kind}0.json").read_text())
    assert [row["images"] for row in single["rows"]] == [2, 7]
    for rank in range(PROCESSES):
        assert json.loads((outputs / f"{kind}{rank}.json").read_text()) == single


def test_processes_with_different_data_are_refused(outputs):
    for rank in range(PROCESSES):
        text = (outputs / f"error{rank}.txt").read_text()
        assert text.startswith("train: training images: wanted the same on every process, got {'count': 7")
        assert text.endswith("on 1")
    assert not (outputs / "refused").exists()


@pytest.mark.parametrize("count", [0, 1, 2, 3, 10, 11, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_cover_all_items_once(count, size):
    items = np.arange(count)
    worlds = [World(rank, size) for rank in range(size)]
    assert [len(items[world.share(count)]) for world in worlds] == worlds[0].shares(count)
    np.testing.assert_array_equal(np.concatenate([items[world.share(count)] for world in worlds]), items)
    assert max(worlds[0].shares(count)) - min(worlds[0].shares(count)) <= 1


def test_table_reproduced_by_all_processes(outputs):
    """All processes return the comparison, and only the first one writes files."""
    tables = [json.loads((outputs / f"table{rank}.json").read_text()) for rank in range(PROCESSES)]
    assert tables[0] == tables[1] == tables[2] == json.loads((outputs / "table" / "comparison.json").read_text())
    assert [line["entry"] for line in tables[0]["lines"]] == ["frozen", "trained", "both"]
    assert all(line["ours"] is not None for line in tables[0]["lines"])
    run = outputs / "table" / "both" / "nut" / "seed-111"
    assert (run / "results.json").exists() and not (run / "checkpoint.pt").exists()


def test_evaluation_names_images_that_fail(tmp_path):
    """A broken image in the share of each process: every process ends with status 2, and the others have scores."""
    root, checkpoint = tmp_path / "data", save(tmp_path / "checkpoint.pt", RECIPE)
    tiny_set(root, train=1, good=4, defects=4)
    (root / "nut/test/good/001.png").write_bytes(b"no image")
    (root / "nut/test/square/002.png").write_bytes(b"no image")
    (root / "nut/ground_truth/square/003_mask.png").write_bytes(b"no image")
    broken = {"good/001.png", "square/002.png", "square/003.png"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    tables = []
    for count in (1, 2):
        out = tmp_path / str(count)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command += ["-m", "recontrast", "evaluate", checkpoint, root, "--out", out, "--device", "cpu", "--batch", "1"]
        done = subprocess.run([*command, "--save-maps"], env=environment, capture_output=True, text=True, timeout=600)
        # torchrun ends the other process when one has failed, if it is still running: its exit code is -SIGTERM then.
        exit_codes = {int(code) for code in re.findall(r"exitcode +: (-?\d+)", done.stderr)}
        assert exit_codes - {-signal.SIGTERM} == {2} and done.stdout.count("3 of 8 test images are missing") == 1
        assert all(done.stderr.count(f"test/{name}: ") == 1 for name in broken), done.stderr
        with (out / "scores.csv").open(newline="") as file:
            rows = {row["path"].split("/test/")[1]: row for row in csv.DictReader(file)}
        assert len(rows) == 8 and {name for name, row in rows.items() if row["error"]} == broken
        maps = {path.relative_to(out / "maps").as_posix() for path in out.rglob("*.tiff")}
        assert len(maps) == 6 and not (out / "unfinished-evaluate.json").exists()  # the image without its mask has one
        tables.append({name: row["score"] for name, row in rows.items()})
    assert tables[0] == tables[1]


def test_example_prints_the_same_with_two_processes():
    example = Path(__file__).parents[2] / "examples" / "two_processes.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    losses = []
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        command = [sys.executable, *launcher, example]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        losses.append([float(line.split()[-1]) for line in done.stdout.splitlines()])
    assert len(losses[0]) == 6 and losses[0][-1] < losses[0][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-3)


@pytest.fixture(scope="module")
def exit_codes():
    """Exit codes of the processes that end in each way, by case."""
    command = [sys.executable, process_endings.__file__, str(REPETITIONS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600 + 60 * REPETITIONS)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


@pytest.mark.parametrize("case", process_endings.CASES)
def test_processes_end_without_abort(case, exit_codes):
    """A wrapped model or a process group may outlive the block that joined the processes."""
    codes, errors = exit_codes
    assert codes[case] == [process_endings.CASES[case]] * (2 * REPETITIONS), errors
