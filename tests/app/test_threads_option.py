"""``--threads``, and where the number of threads is chosen: in training, evaluation and prediction."""

import json

import numpy as np
import pytest
import torch
from command_line import SMALL, fails, works
from saved_model import RECIPE, draw, save

from recontrast.runtime import threads
from recontrast.runtime.thread_count import count_threads
from recontrast.runtime.threads import ENVIRONMENT, ThreadTuner, choose_threads
from recontrast.training.train import train


@pytest.fixture
def used(monkeypatch):
    """Numbers of threads that are in use after each step."""
    numbers = []
    original = ThreadTuner.after_step
    monkeypatch.setattr(ThreadTuner, "after_step", lambda self: (numbers.append("measured"), original(self)))
    after_step = threads.after_step

    def count(device):
        numbers.append(torch.get_num_threads())
        after_step(device)

    for module in ("recontrast.training.trainer.threads", "recontrast.training.one_pass.threads"):
        monkeypatch.setattr(f"{module}.after_step", count)
    monkeypatch.setattr("recontrast.inference.infer.after_step", count)
    return numbers


@pytest.fixture
def _free_choice(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def test_given_number(used, tmp_path):
    good = draw(tmp_path / "good", 6, seed=0)
    run = tmp_path / "run"
    works("train", good, "--all-good", *SMALL, "--holdout", 0, "--out", run, "--threads", 3)
    assert used == [3, 3]
    works("predict", run, good, "--out", tmp_path / "out", "--no-overlays", "--device", "cpu", "--threads", 2)
    assert set(used[2:]) == {2}
    assert torch.get_num_threads() == 1
    for command in (["train", good, "--all-good"], ["predict", run, good, "--out", tmp_path / "out"]):
        assert fails(*command, "--threads", 0).endswith("--threads: wanted at least 1, got 0")


@pytest.mark.usefixtures("_free_choice")
def test_measured_number(used, tmp_path):
    good = draw(tmp_path / "good", 6, seed=0)
    run = tmp_path / "run"
    works("train", good, "--all-good", *SMALL, "--holdout", 0, "--out", run)
    assert used == [1, "measured"] * 2
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["threads"] == 1
    used.clear()
    save(tmp_path / "other/checkpoint.pt", RECIPE)
    works("predict", tmp_path / "other", good, "--out", tmp_path / "out", "--no-overlays", "--device", "cpu")
    assert used and used[::2] == [1] * (len(used) // 2)


def test_calls_of_the_library_change_nothing(used):
    """The number of threads belongs to the program that calls."""
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    train(RECIPE.replace(steps=2, size=32, batch=2, holdout=0.0), images, device="cpu")
    assert used == [1, 1]


def test_runtimes_of_exported_files_take_the_given_number():
    with choose_threads(5, pytest.fail):
        assert count_threads() == 5
    assert count_threads() == torch.get_num_threads()
