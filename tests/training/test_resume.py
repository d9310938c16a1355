"""Stopped and resumed runs of every recipe: to the bit what an unbroken run gives."""

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
}  # 7 images
RUNS = {
    "stable": RECIPES["mvtec_stable"].replace(steps=7, wipe_every=3, rest=2, **TINY),
    "unified": RECIPES["mvtec_unified"].replace(steps=5, **TINY),
    "rd4ad": RECIPES["mvtec"].replace(
        **{**TINY, "batch": 4}, steps=4, train_encoder=False, pairs="self", mining=False, loss="point"
    ),
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("data"), train=7, good=0, defects=0)


@pytest.fixture(scope="module")
def whole(samples, tmp_path_factory):
    """Unbroken runs."""
    return {
        name: train(recipe, samples, out=tmp_path_factory.mktemp(name), device="cpu") for name, recipe in RUNS.items()
    }


def same_optimisers(one, other):
    """States of two checkpoints."""
    for a, b in zip(one.optimisers, other.optimisers, strict=True):
        assert a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys()
        for key, value in a["state"].items():
            assert all(torch.equal(value[name], b["state"][key][name]) for name in value)


@pytest.mark.parametrize(
    "name, stop",
    [("stable", 2), ("stable", 3), ("stable", 4), ("unified", 3), ("unified", 4), ("rd4ad", 2)],
)
def test_goes_on_where_it_was(samples, whole, tmp_path, name, stop):
    """Before a wipe, on it, in a rest; before the learning rates fall, and as they do."""
    recipe = RUNS[name]

    def interrupt(step, *_):
        if step == stop:
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        train(recipe, samples, out=out, device="cpu", on_log=interrupt)
    assert checkpoint.load(out / "checkpoint.pt").step == stop
    again = train(recipe, samples, out=out, resume=out / "checkpoint.pt", device="cpu")
    assert again.losses == whole[name].losses[stop:]
    assert same_weights(again.model, whole[name].model)
    same_optimisers(checkpoint.load(out / "checkpoint.pt"), checkpoint.load(whole[name].checkpoint))
    assert yaml_file.read_recipe(out / "recipe.yaml") == recipe


KILLED = """
import io, os, signal, sys, torch
from recontrast.data.datasets import mvtec
from recontrast import checkpoint
from recontrast.recipes import yaml_file as recipe_file
from recontrast.training.train import train

def save(content, file, calls=[]):
    calls.append(1)
    whole = io.BytesIO()
    real(content, whole)
    text = whole.getvalue()
    file.write(text if len(calls) == 1 else text[: len(text) // 2])
    file.flush()
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

real, torch.save = torch.save, save
root, out, recipe = sys.argv[1:]
torch.set_num_threads(1)
train(recipe_file.read_recipe(recipe), mvtec(root, "nut"), out=out, device="cpu")
"""


def test_killed_while_a_checkpoint_is_written(samples, whole, tmp_path):
    """SIGKILL with half of the second checkpoint on the disk: the first is whole, and the run goes on from it."""
    recipe = RUNS["stable"].replace(checkpoint_every=2)
    root, out, path = samples[0].path.parents[3], tmp_path / "out", tmp_path / "killed.yaml"
    arguments = [sys.executable, "-c", KILLED, str(root), str(out), str(yaml_file.write_recipe(path, recipe))]
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (out / "checkpoint.pt.partial").stat().st_size > 0
    assert checkpoint.load(out / "checkpoint.pt").step == 2
    again = train(recipe, samples, out=out, resume=out / "checkpoint.pt", device="cpu")
    assert again.losses == whole["stable"].losses[2:]
    assert same_weights(again.model, whole["stable"].model)
    assert [line["step"] for line in log_of(out)] == list(range(1, 8))
    assert not (out / "checkpoint.pt.partial").exists()


def test_a_run_resumed_with_another_schedule_is_refused(samples, whole):
    recipe, path = RUNS["stable"], whole["stable"].checkpoint
    for change in ({"wipe_every": 4}, {"rest": 1}, {"amsgrad": True}, {"mining": False}):
        (key,) = change
        with pytest.raises(ValueError, match=rf"checkpoint.pt: wanted the recipe .* got another \({key}: "):
            train(recipe.replace(**change), samples, resume=path, device="cpu")
