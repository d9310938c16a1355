"""Few shots, their augmentation, and classes drawn equally often: which images are used, and what is said of it."""

import dataclasses
import itertools
import json
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from command_line import SMALL, fails, works
from small_run import RECIPE, same_weights
from tiny import tiny_set

from recontrast import checkpoint
from recontrast.data import datasets
from recontrast.data.fingerprint import read_fingerprints
from recontrast.training import trainer
from recontrast.training.sampler import BatchSampler
from recontrast.training.shots import count_long_tail, describe_shots, select_shots
from recontrast.training.train import train


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two classes, of 12 and 3 good images."""
    root = tmp_path_factory.mktemp("data")
    tiny_set(root, train=12)
    tiny_set(root, "bolt", train=3, seed=1)
    return root


@pytest.fixture(scope="module")
def samples(root):
    return [sample for group in datasets.load(root).values() for sample in group]


def good_of(samples):
    return [(s.category, s.path.name) for s in samples if s.split == "train"]


def test_the_draw_depends_on_the_seed_and_the_paths_alone(samples, root, tmp_path):
    chosen = select_shots(samples, 2, 5)
    assert Counter(name for name, _ in good_of(chosen)) == {"nut": 2, "bolt": 2}
    assert [s for s in chosen if s.split == "test"] == [s for s in samples if s.split == "test"]
    assert [s for s in samples if s in chosen] == chosen, "in their order"
    for seed in range(5):  # another order of listing, and another place of the data set
        shuffled = random.Random(seed).sample(samples, len(samples))
        assert set(good_of(select_shots(shuffled, 2, 5))) == set(good_of(chosen))
    shutil.copytree(root, tmp_path / "elsewhere")
    moved = [sample for group in datasets.load(tmp_path / "elsewhere").values() for sample in group]
    assert good_of(select_shots(moved, 2, 5)) == good_of(chosen)
    assert len({tuple(good_of(select_shots(samples, 2, seed))) for seed in range(20)}) > 10
    assert select_shots(chosen, 2, 5) == chosen, "drawn again, the same"
    assert select_shots(samples, None, 5) == samples


def test_fewer_shots_are_among_more(samples):
    draws = [set(good_of(select_shots(samples, {"nut": count}, 3))) for count in (1, 2, 4, 8, 12)]
    assert all(first < second for first, second in itertools.pairwise(draws))
    assert [sum(name == "nut" for name, _ in draw) for draw in draws] == [1, 2, 4, 8, 12]
    assert all(sum(name == "bolt" for name, _ in draw) == 3 for draw in draws), "a class without a number keeps all"


def test_every_image_is_equally_likely(samples):
    drawn = Counter(name for seed in range(600) for name in good_of(select_shots(samples, {"nut": 3}, seed)))
    counts = [drawn[("nut", f"{index:03}.png")] for index in range(12)]
    assert sum(counts) == 1800 and max(abs(count - 150) for count in counts) < 50, counts  # 4.7 deviations


def test_copies_are_one_image(tmp_path):
    samples = tiny_set(tmp_path, train=3)
    good = [s for s in samples if s.split == "train"]
    shutil.copy(good[0].path, good[0].path.with_name("zz.png"))
    samples = datasets.load(tmp_path)["nut"]
    assert len(good_of(samples)) == 4
    with pytest.raises(ValueError, match="shots: wanted at most the 3 different good images of nut, got 4"):
        select_shots(samples, 4, 0)
    for seed in range(10):
        chosen = good_of(select_shots(samples, 3, seed))
        assert len(chosen) == 3 and ("nut", "zz.png") not in chosen


def test_too_many_shots_and_unknown_classes(samples, root, tmp_path):
    with pytest.raises(ValueError, match="shots: wanted at most the 3 good images of bolt, got 4"):
        select_shots(samples, 4, 0)
    with pytest.raises(ValueError, match="shots: wanted classes among bolt, nut, got 'srew'"):
        select_shots(samples, {"srew": 4}, 0)
    text = fails("train", root / "bolt", "--shots", "4", "--out", tmp_path / "run", *SMALL)
    assert "shots: wanted at most the 3 good images of bolt, got 4" in text
    assert not (tmp_path / "run").exists()
    for value in ("four", "4.5", "nut=", "nut=4,bolt"):
        text = fails("train", root / "nut", "--shots", value, "--out", tmp_path / "run", *SMALL)
        assert "--shots: wanted a number such as 4, or screw=4,tile=16, got" in text
    assert "shots: wanted none, a whole number" in fails(
        "train", root / "nut", "--shots", "0", "--out", tmp_path / "run", *SMALL
    )


def test_decoded_images_have_no_classes_and_shots():
    images = np.zeros((4, 32, 32, 3), np.uint8)
    for change, text in (
        ({"shots": 2}, "shots: wanted none .* got 2"),
        ({"sampling": "classes"}, "sampling: wanted 'images' .* got 'classes'"),
        ({"holdout": 0.5}, r"holdout: wanted 0 .* got 0\.5"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            train(RECIPE.replace(**change), images)


def test_command_line_says_which_images_are_used(root, tmp_path):
    """The tree, the log, the recipe, the checkpoint and the report name the shots; few images are not held out."""
    out = tmp_path / "run"
    few = ("--shots", 4, "--seed", 1, "--augment", "flips")
    printed = works("train", root / "nut", *few, "--out", out, *SMALL)
    assert "good: 4 images (good, to train on)" in " ".join(printed.split())
    assert "few shots: 4 good images of nut, drawn with seed 1" in printed
    assert "4 good images are too few to hold any out for calibration" in printed
    first = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert "few shots: 4 good images of nut, drawn with seed 1" in first["data"]
    saved = checkpoint.load(out / "checkpoint.pt")
    assert saved.recipe.shots == 4 and saved.recipe.augment == "flips"
    assert saved.images["count"] == 4 and len(read_fingerprints(saved.images)) == 4, "copies are not counted"
    works("report", out, root / "nut")
    page = (out / "report.html").read_text()
    assert "trained on few good images: 4 of each class, augmented (flips)" in page and "<dt>shots</dt>" in page


def test_held_out_images_are_shots_and_have_no_copies(samples, tmp_path, monkeypatch):
    """The images held out are a share of the shots; none of them, and no copy of one, is trained on."""
    nut = [sample for sample in samples if sample.category == "nut"]
    recipe = RECIPE.replace(shots=8, holdout=0.25, augment="rotations", steps=4, batch=8)
    seen = []
    original = trainer.BatchSampler.__next__

    def record(sampler):
        indices = original(sampler)
        seen.extend(indices.tolist())
        return indices

    monkeypatch.setattr(trainer.BatchSampler, "__next__", record)
    result = train(recipe, nut, out=tmp_path, device="cpu")
    assert result.calibration is not None and len(result.calibration.scores) == 2
    assert result.calibration.rate == pytest.approx(1 / 3), "what two images can promise, not sixteen views"
    assert result.state.images["count"] == 6 and max(seen) >= 6 and max(seen) < 48
    with pytest.raises(ValueError, match=r"holdout: wanted at least 1 image held out .* got 0 of 4 good images"):
        train(recipe.replace(shots=4, holdout=0.1), nut, device="cpu")


def test_augmented_copies_enter_the_bank(samples, tmp_path):
    nut = [sample for sample in samples if sample.category == "nut"]
    fields = {
        "backbone": "test_resnet",
        "weights": "random",
        "size": 32,
        "architecture": "patchcore",
        "bank_share": 1.0,
    }
    sizes = {}
    for name in ("none", "flips", "rotations"):
        recipe = dataclasses.replace(RECIPE, **fields, shots=2, augment=name, score="max")
        result = train(recipe, nut, device="cpu")
        sizes[name] = len(result.model.bank)
        assert result.state.images["count"] == 2
    assert sizes["flips"] == 4 * sizes["none"] and sizes["rotations"] == 8 * sizes["none"]


@pytest.mark.parametrize("change", [{"sampling": "classes"}, {"augment": "rotations"}, {"shots": {"nut": 5}}])
def test_resumed_and_cached_runs_are_identical(samples, tmp_path, change):
    """A run that stops and goes on ends with the same weights; so does one with cached features."""
    recipe = RECIPE.replace(**change)
    whole = train(recipe, samples, device="cpu")

    def stop(step, *_):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, samples, out=tmp_path, device="cpu", on_log=stop)
    resumed = train(recipe, samples, out=tmp_path, device="cpu", resume=tmp_path / "checkpoint.pt")
    assert same_weights(whole.model, resumed.model)
    assert not same_weights(whole.model, train(RECIPE, samples, device="cpu").model)
    cached = train(recipe, samples, device="cpu", teacher_cache=2**28)
    np.testing.assert_allclose(cached.losses, whole.losses, rtol=1e-4)
    with pytest.raises(ValueError, match=f"{next(iter(change))}: "):
        train(RECIPE, samples, device="cpu", resume=tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("counts", [(200, 50, 15, 5), (7, 1), (9,), (3, 3, 3)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_classes_are_drawn_equally_often(counts, drop_last):
    classes = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    batches = BatchSampler(len(classes), 4, drop_last=drop_last, seed=7, classes=classes)
    again = BatchSampler(len(classes), 4, drop_last=drop_last, seed=7, classes=classes)
    drawn = []
    while len(drawn) < 4000:
        batch = next(batches)
        assert np.array_equal(batch, next(again))
        drawn.extend(batch.tolist())
    share = np.bincount(classes[drawn], minlength=len(counts)) / len(drawn)
    assert np.abs(share - 1 / len(counts)).max() < 0.02, share
    times = np.bincount(drawn, minlength=len(classes))
    for number in range(len(counts)):  # and the images of one class equally often
        of_class = times[classes == number]
        assert of_class.min() >= 1 and of_class.max() - of_class.min() <= 0.5 * of_class.mean() + 12


def test_restored_sampler_of_classes_continues():
    classes = np.repeat([0, 1, 2], [9, 3, 1])
    batches = BatchSampler(13, 4, drop_last=False, seed=3, classes=classes)
    for _ in range(5):
        next(batches)
    state = {key: value.clone() if torch.is_tensor(value) else value for key, value in batches.state().items()}
    expected = [next(batches).tolist() for _ in range(9)]
    other = BatchSampler(13, 4, drop_last=False, seed=99, classes=classes)
    other.restore(state)
    assert [next(other).tolist() for _ in range(9)] == expected


def test_long_tail():
    counts = {"b": 200, "a": 200, "c": 50, "d": 300}
    assert count_long_tail(counts, 100) == {"a": 65, "b": 14, "c": 3, "d": 300}
    assert count_long_tail(counts, 1) == counts
    assert count_long_tail({"a": 3, "b": 3}, 1000) == {"a": 3, "b": 1}
    for wrong in (({"a": 3}, 10), (counts, 0.5), (counts, float("nan"))):
        with pytest.raises(ValueError, match="long tail: wanted 2 classes and an imbalance of at least 1"):
            count_long_tail(*wrong)


def test_descriptions(samples):
    assert describe_shots(samples, None, 1) is None
    chosen = select_shots(samples, 2, 1)
    assert describe_shots(chosen, 2, 1) == "few shots: 2 good images of each of 2 classes, drawn with seed 1"
    chosen = select_shots(samples, {"nut": 2}, 1)
    wanted = "few shots: 3 good images of bolt, 2 good images of nut, drawn with seed 1"
    assert describe_shots(chosen, {"nut": 2}, 1) == wanted


def test_help_names_the_options():
    text = works("train", "--help")
    assert all(option in text for option in ("--shots", "--augment", "--sampling"))
