"""Time budgets: what is chosen fits, what is given stays, and a budget that is too short says the least that works."""

import json
import math
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import recontrast
from recontrast import checkpoint as checkpoints
from recontrast.recipes.recipe import Recipe
from recontrast.training import budget
from recontrast.training.budget import plan_budget
from recontrast.training.train import train
from tests.command_line import fails, works
from tests.tiny import tiny_set

SMALL = ("--backbone", "test_resnet", "--weights", "random", "--batch", "3", "--device", "cpu", "--holdout", 0)
RECIPE = Recipe(backbone="test_resnet", weights="random", batch=4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny_set(root, train=9)
    return root


@pytest.fixture
def paths(data):
    return sorted((data / "nut" / "train" / "good").iterdir())


@pytest.fixture
def steady(monkeypatch):
    """A machine of known speed: no time to read an image, 40 ms for the network at 256 px, 10^11 products a second."""
    monkeypatch.setattr(budget._Probe, "time_products", lambda self: 1e-11)
    speeds = {"float32": 0.04, "bfloat16": 0.01}
    monkeypatch.setattr(
        budget._Probe, "time_network", lambda self, precision, _=True: speeds[precision] * math.prod(self.size) / 65536
    )
    monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: 0.0))  # the plan itself takes no time
    monkeypatch.setattr(budget._Probe, "time", lambda self, work: 0.5)


def test_more_time_gives_larger_images(paths, steady):
    sizes = [plan_budget(RECIPE, (), paths * 30, 0, seconds, CPU).recipe.size for seconds in (6, 9, 30, 600)]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] == budget.SIZES[-1]


def test_plan_is_an_ensemble_that_fits(paths, steady):
    plan = plan_budget(RECIPE, (), paths * 30, 5, 30, CPU)
    assert plan.recipe.architecture == "ensemble" and plan.recipe.precision == "bfloat16" and plan.seconds < 30
    assert 0 < plan.recipe.bank_share <= 1 and "ensemble at" in plan.description and "270 images" in plan.description


def test_given_fields_stay(paths, steady):
    fixed = {"size": 64, "precision": "float32", "bank_share": 0.3}
    recipe = plan_budget(RECIPE.replace(architecture="patchcore", **fixed), fixed, paths, 0, 60, CPU).recipe
    assert {name: getattr(recipe, name) for name in fixed} == fixed
    recipe = plan_budget(RECIPE.replace(architecture="padim"), ["architecture"], paths, 0, 60, CPU).recipe
    assert recipe.architecture == "padim"


def test_steps_fill_the_budget(paths, steady):
    recipe = RECIPE.replace(size=64, train_encoder=True)
    short, long = (plan_budget(recipe, ["architecture", "size"], paths, 0, s, CPU).recipe.steps for s in (20, 200))
    # 0.5 s a step of 4 images; three quarters of the budget are planned
    assert 15 < short < 30 and 260 < long < 300
    kept = plan_budget(recipe.replace(steps=7), ["architecture", "steps"], paths, 0, 60, CPU)
    assert kept.recipe.steps == 7


@pytest.mark.parametrize(("batch", "timed"), [(1, 1), (3, 3), (6, 6), (8, 8), (200, 8)])
def test_the_timed_step_has_the_batch_of_the_recipe(paths, steady, monkeypatch, batch, timed):
    """What a step takes whatever its batch, such as the optimiser, is counted once a step."""
    sizes = []
    monkeypatch.setattr(budget, "train_step", lambda model, optimisers, x, *rest: sizes.append(len(x)))
    monkeypatch.setattr(budget._Probe, "time", lambda self, work: (work(), 0.5)[1])
    plan = plan_budget(RECIPE.replace(size=64, batch=batch), ["architecture", "size"], paths * 30, 0, 200, CPU)
    assert sizes == [timed]
    steps = (200 * budget.SAFETY - 2 * budget.WRITING) / (0.5 * batch / timed)
    assert abs(plan.recipe.steps - steps) <= 0.02 * steps + 1


def test_tiles_are_counted(tmp_path, steady):
    """The network sees each tile, in training side by side, of held-out images with an overlap of a quarter."""
    paths = [tmp_path / f"{name}.png" for name in range(3)]
    for path in paths:
        Image.new("RGB", (256, 128)).save(path)  # 8 tiles of 64 px, or 5 x 3 that overlap
    recipe = RECIPE.replace(tile=64, batch=16)
    plans = [plan_budget(recipe, ["architecture"], paths, held_out, 100, CPU) for held_out in (0, 2)]
    assert all("steps of 16 tiles at 64 x 64 px" in plan.description for plan in plans)
    own = 0.04 * 64 * 64 / 65536  # seconds for a tile
    assert plans[1].seconds_after - plans[0].seconds_after == pytest.approx(30 * own)
    plan = plan_budget(recipe.replace(architecture="patchcore"), ["architecture"], paths, 0, 100, CPU)
    assert "24 tiles" in plan.description


def test_what_is_chosen_goes_with_what_is_given(paths, steady):
    """Tiles lie anywhere in an image, which PaDiM cannot learn, and its size is at most that of the images."""
    assert plan_budget(RECIPE.replace(tile=32), ["tile"], paths * 2, 0, 60, CPU).recipe.architecture == "patchcore"
    for fields in ({"size": 64}, {"crop": 64}):
        plan = plan_budget(RECIPE.replace(**fields), fields, paths * 2, 0, 60, CPU)
        assert plan.recipe.architecture == "ensemble" and plan.recipe.small_size == (64, 64)
    assert plan_budget(RECIPE, (), paths * 2, 0, 60, CPU).recipe.small_size == 128


@pytest.mark.parametrize("architecture", ["patchcore", "recontrast"])
def test_too_short_says_the_least_that_works(paths, steady, architecture):
    recipe = RECIPE.replace(architecture=architecture)
    with pytest.raises(ValueError, match=r"--budget: wanted at least \d+ s on this machine, got 1 s") as caught:
        plan_budget(recipe, ["architecture"], paths * 99, 0, 1.0, CPU)
    least = float(re.search(r"least (\d+) s", str(caught.value))[1])
    plan_budget(recipe, ["architecture"], paths * 99, 0, least + 1, CPU)


def test_memory_bounds_the_size(paths, steady, monkeypatch):
    monkeypatch.setattr(budget, "BYTES", 1 << 20)
    assert plan_budget(RECIPE, (), paths * 30, 0, 600, CPU).recipe.size == budget.SIZES[0]


def test_command(data, tmp_path):
    printed = works("train", data, *SMALL, "--budget", "1m", "--out", tmp_path / "run")
    assert "for 60 s: patchcore at" in printed and re.search(r"one pass over 9 images in .*\(\d+ of 60 s\)", printed)
    recipe = checkpoints.load(tmp_path / "run" / "checkpoint.pt").recipe
    assert recipe.architecture == "patchcore" and recipe.size in budget.SIZES
    printed = works("train", data, *SMALL, "--recipe", "mvtec", "--size", 64, "--budget", "2m", "--out", tmp_path / "b",
                    "--steps", 3)  # fmt: skip
    saved = checkpoints.load(tmp_path / "b" / "checkpoint.pt")
    assert saved.recipe.architecture == "recontrast" and saved.step == saved.recipe.steps == 3
    assert "recontrast: 3 steps of 3 images" in printed and "\n3 steps in " in printed


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("soon", "--budget: wanted a duration such as 90s, 3m or 1h, got 'soon'"),
        ("-3m", "--budget: wanted a duration such as 90s, 3m or 1h, got '-3m'"),
        ("nan", "--budget: wanted a duration"),
        ("0", "--budget: wanted a duration"),
        ("0.1s", "--budget: wanted at least"),
    ],
)
def test_bad_budgets(value, message, data, tmp_path):
    assert message in fails("train", data, *SMALL, f"--budget={value}", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


def test_resuming_with_a_budget_is_refused(data, tmp_path):
    works("train", data, *SMALL, "--size", 32, "--steps", 2, "--out", tmp_path)
    assert "--budget: wanted a new run" in fails("train", data, "--resume", tmp_path, "--budget", "1m")


def test_python_call(data, tmp_path):
    detector = recontrast.train(data, tmp_path, budget="1m", backbone="test_resnet", weights="random", device="cpu")
    assert detector.recipe.architecture == "patchcore" and detector.recipe.size in budget.SIZES  # 9 images are few
    with pytest.raises(ValueError, match="budget: wanted a duration such as 90s, 3m or 1h, got 'soon'"):
        recontrast.train(data, tmp_path / "b", budget="soon", backbone="test_resnet", weights="random", device="cpu")


@pytest.mark.parametrize(("limit", "count"), [(0.0, 12), (None, 30), (600.0, 30)])
def test_time_limit_ends_a_pass(tmp_path, limit, count):
    images = np.random.default_rng(1).integers(0, 255, (30, 32, 32, 3), np.uint8)
    recipe = RECIPE.replace(architecture="patchcore", size=32, bank_share=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = train(recipe, images, out=tmp_path, device="cpu", time_limit=limit)
    texts = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    assert texts == ([] if count == 30 else [
        "train: the time was enough for 12 of 30 images: give more time, or choose a smaller size"])  # fmt: skip
    assert len(result.model.bank) == count * 16 and result.state.step == -(-count // 4)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["images"] == count


def test_time_limit_ends_steps(tmp_path):
    """The checkpoint is complete, and the run goes on from it to the weights of a run without a limit."""
    images = np.random.default_rng(1).integers(0, 255, (6, 32, 32, 3), np.uint8)
    recipe = RECIPE.replace(size=32, batch=2, steps=4, checkpoint_every=1000, log_every=1000)
    text = "train: the time was enough for 1 of 4 steps: resume it, give more time, or choose a smaller size"
    with pytest.warns(RuntimeWarning, match=text):
        result = train(recipe, images, out=tmp_path, device="cpu", time_limit=0.0)
    assert result.state.step == len(result.losses) == 1
    assert checkpoints.load(tmp_path / "checkpoint.pt").step == 1
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == 1
    rest = train(recipe, images, out=tmp_path, device="cpu", resume=tmp_path / "checkpoint.pt", time_limit=600.0)
    whole = train(recipe, images, device="cpu")
    assert rest.state.step == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, rest.model.state_dict()[name]), name


def test_plan_leaves_time_for_what_follows(paths, steady):
    plan = plan_budget(RECIPE.replace(size=64), ["architecture", "size"], paths, 40, 60, CPU)
    network = 0.04 * (64 / 256) ** 2  # in float32
    assert plan.seconds_after == pytest.approx(40 * network + budget.WRITING)
    assert plan.compute_time_limit(50.0) == pytest.approx(50 - budget.AFTER_FACTOR * plan.seconds_after)
