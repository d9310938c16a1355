"""Interrupted and resumed runs of every recipe give bit-identical results to uninterrupted ones."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from small_run import log_of, same_weights
from tiny import tiny_set

from recontrast import checkpoint
from recontrast.recipes import yaml_file
from recontrast.recipes.paper import RECIPES
from recontrast.training.train import train

TINY = {
    "backbone": "test_resnet",
    "weights": "random",
    "size": 32,
    "batch": 3,
    "log_every": 1,
    "checkpoint_every": 99,
}
VIT = {**TINY, "backbone": "test_vit", "steps": 5, "encoder_bn": "eval", "optimiser": "stableadamw", "clip": 0.1}
RUNS = {
    "stable": RECIPES["mvtec_stable"].replace(steps=7, wipe_every=3, rest=2, **TINY),
    "unified": RECIPES["mvtec_unified"].replace(steps=5, **TINY),
    "rd4ad": RECIPES["mvtec"].replace(
        **{**TINY, "batch": 4}, steps=4, train_encoder=False, pairs="self", mining=False, loss="point"
    ),
    "dinomaly": RECIPES["dinomaly_mvtec"].replace(**VIT, crop=None, layers=None, map_size=None),  # dropout draws too
    "inp_former": RECIPES["inp_former_mvtec"].replace(**VIT, crop=None, layers=None, map_size=None),
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("data"), train=7, good=0, defects=0)


@pytest.fixture(scope="module")
def uninterrupted(samples, tmp_path_factory):
    """Results of uninterrupted runs."""
    return {
        name: train(recipe, samples, out=tmp_path_factory.mktemp(name), device="cpu") for name, recipe in RUNS.items()
    }


def assert_equal_optimisers(first, second):
    for a, b in zip(first.optimisers, second.optimisers, strict=True):
        assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
        for key, value in a["state"].items():
            assert all(torch.equal(value[name], b["state"][key][name]) for name in value)


@pytest.mark.parametrize(
    "name, stop",
    [
        ("stable", 2),
        ("stable", 3),
        ("stable", 4),
        ("unified", 3),
        ("unified", 4),
        ("rd4ad", 2),
        ("dinomaly", 3),
        ("inp_former", 3),
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(samples, uninterrupted, tmp_path, name, stop):
    """Stopped before, at and after a reset of the optimiser, and before and at the drop of the learning rates."""
    recipe = RUNS[name]

    def interrupt(step, *_):
        if step == stop:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(recipe, samples, out=out, device="cpu", on_log=interrupt)
    assert checkpoint.load(out / "checkpoint.pt").step == stop
    resumed = train(recipe, samples, out=out, resume=out / "checkpoint.pt", device="cpu")
    assert resumed.losses == uninterrupted[name].losses[stop:]
    assert same_weights(resumed.model, uninterrupted[name].model)
    assert_equal_optimisers(checkpoint.load(out / "checkpoint.pt"), checkpoint.load(uninterrupted[name].checkpoint))
    assert yaml_file.read_recipe(out / "recipe.yaml") == recipe


KILLED = """
import io, os, signal, sys, torch
from recontrast.data.datasets import mvtec
from recontrast import checkpoint
from recontrast.recipes import yaml_file
from recontrast.training.train import train

def save(content, file, calls=[]):
    calls.append(1)
    buffer = io.BytesIO()
    original_save(content, buffer)
    data = buffer.getvalue()
    file.write(data if len(calls) == 1 else data[: len(data) // 2])
    file.flush()
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

original_save, torch.save = torch.save, save
root, out, recipe = sys.argv[1:]
torch.set_num_threads(1)
train(yaml_file.read_recipe(recipe), mvtec(root, "nut"), out=out, device="cpu")
"""


def test_killed_while_a_checkpoint_is_written(samples, uninterrupted, tmp_path):
    """SIGKILL with half of the second checkpoint on disk: the run resumes from the first one."""
    recipe = RUNS["stable"].replace(checkpoint_every=2)
    root, out, path = samples[0].path.parents[3], tmp_path / "out", tmp_path / "killed.yaml"
    arguments = [sys.executable, "-c", KILLED, str(root), str(out), str(yaml_file.write_recipe(path, recipe))]
    result = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert max(path.stat().st_size for path in out.glob(".recontrast-*.tmp")) > 0
    assert checkpoint.load(out / "checkpoint.pt").step == 2
    resumed = train(recipe, samples, out=out, resume=out / "checkpoint.pt", device="cpu")
    assert resumed.losses == uninterrupted["stable"].losses[2:]
    assert same_weights(resumed.model, uninterrupted["stable"].model)
    assert [line["step"] for line in log_of(out)] == list(range(1, 8))
    assert sorted(os.listdir(out)) == ["checkpoint.pt", "log.jsonl", "recipe.yaml"]


def test_resuming_with_another_schedule_raises(samples, uninterrupted):
    recipe, path = RUNS["stable"], uninterrupted["stable"].checkpoint
    for change in ({"wipe_every": 4}, {"rest": 1}, {"amsgrad": True}, {"mining": False}):
        (key,) = change
        with pytest.raises(ValueError, match=rf"checkpoint.pt: wanted the recipe .* got another \({key}: "):
            train(recipe.replace(**change), samples, resume=path, device="cpu")
