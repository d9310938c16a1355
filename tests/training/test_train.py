import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import RECIPE, log_of, same_weights
from tiny import tiny_set

from recontrast import checkpoint
from recontrast.data.fingerprint import compute_fingerprint, describe_images, read_fingerprints
from recontrast.data.locks import lock_folder
from recontrast.recipes.yaml_file import read_recipe
from recontrast.runtime.termination import SIGNALS
from recontrast.training import trainer
from recontrast.training.sampler import BatchSampler
from recontrast.training.train import build_model, train

SOURCE = (sys.executable, "-c")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def uninterrupted(samples, tmp_path_factory):
    """Result of an uninterrupted run, for comparison."""
    return train(RECIPE, samples, out=tmp_path_factory.mktemp("uninterrupted"), device="cpu")


# ---- a full run ---------------------------------------------------------------


def test_result_log_and_files_of_a_run(samples, tmp_path):
    calls = []
    result = train(RECIPE, samples, out=tmp_path / "out", device="cpu", on_log=lambda *args: calls.append(args))
    assert len(result.losses) == 6
    assert result.category == "nut"
    assert not result.model.training
    assert [call[0] for call in calls] == [2, 4, 6]
    assert calls[1][1] == pytest.approx(sum(result.losses[2:4]) / 2)
    assert all(call[2] > 0 for call in calls)
    assert [call[3] for call in calls] == [1.0, 1.0, 1.0]  # the ramp takes 0.6 steps
    lines = log_of(tmp_path / "out")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert [line["loss"] for line in lines] == [call[1] for call in calls]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint.pt", "log.jsonl", "recipe.yaml"]
    saved = checkpoint.load(result.checkpoint)
    assert (saved.step, saved.category, saved.images["count"]) == (6, "nut", 7)
    loaded, recipe, _ = checkpoint.load_model(result.checkpoint, "cpu")
    assert recipe == RECIPE
    assert same_weights(loaded, result.model)


def test_loss_decreases(samples):
    result = train(RECIPE.replace(steps=20, alpha_end=-3.0, batch=7, size=64), samples, device="cpu")
    assert result.checkpoint is None
    assert sum(result.losses[-5:]) < 0.7 * sum(result.losses[:5])


def test_equal_seeds_give_equal_weights(samples, uninterrupted):
    again = train(RECIPE, samples, device="cpu")
    assert again.losses == uninterrupted.losses
    assert same_weights(again.model, uninterrupted.model)
    other = train(RECIPE.replace(seed=2), samples, device="cpu")
    assert other.losses != uninterrupted.losses


def test_global_generator_has_no_effect_after_the_start(samples, uninterrupted):
    again = train(RECIPE, samples, device="cpu", on_log=lambda *args: torch.manual_seed(0))
    assert again.losses == uninterrupted.losses


def test_test_images_are_never_used(samples, uninterrupted):
    training_samples = [sample for sample in samples if sample.split == "train"]
    assert len(training_samples) < len(samples)
    assert train(RECIPE, training_samples, device="cpu").losses == uninterrupted.losses


@pytest.mark.parametrize("batch, drop_last", [(1, False), (100, False), (3, True), (7, True)])
def test_batch_sizes(samples, batch, drop_last):
    recipe = RECIPE.replace(batch=batch, drop_last=drop_last, steps=3, encoder_bn="eval")
    assert all(map(math.isfinite, train(recipe, samples, device="cpu").losses))


def test_one_step_and_one_image(samples):
    assert len(train(RECIPE.replace(steps=1), samples[:1], device="cpu").losses) == 1


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"channels_last": True}, {"precision": "float32"}])
def test_precision_and_memory_format_change_losses_little(samples, uninterrupted, change):
    result = train(RECIPE.replace(channels_last=False).replace(**change), samples, device="cpu")
    assert result.losses[:2] == pytest.approx(uninterrupted.losses[:2], rel=0.03)
    is_channels_last = next(result.model.parameters()).is_contiguous(memory_format=torch.channels_last)
    assert is_channels_last == bool(change.get("channels_last"))


def test_cache_of_decoded_images(samples, uninterrupted, tmp_path):
    for _ in range(2):
        assert train(RECIPE, samples, device="cpu", cache_dir=tmp_path).losses == uninterrupted.losses
    assert len(list(tmp_path.iterdir())) == 1


def test_several_categories_in_one_model(samples, tmp_path):
    more = tiny_set(tmp_path, "bolt", seed=5)
    result = train(RECIPE, [*samples, *more], out=tmp_path / "out", device="cpu")
    assert result.category == "nut+bolt"
    assert checkpoint.load(result.checkpoint).images["count"] == 14
    assert train(RECIPE, [*samples, *more], category="unified", device="cpu").category == "unified"


def test_category_sets_the_batch_norm_mode(samples):
    fixed = train(RECIPE.replace(steps=1), samples, category="screw", device="cpu").model
    moving = train(RECIPE.replace(steps=1), samples, category="zipper", device="cpu").model
    counts = [int(next(b for n, b in m.encoder.named_buffers() if "num_batches" in n)) for m in (fixed, moving)]
    assert counts == [0, 1]


def test_a_given_model_is_trained_in_place(samples):
    model = build_model(RECIPE, "nut")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert train(RECIPE, samples, model=model, device="cpu").model is model
    after = model.state_dict()
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"encoder", "bottleneck", "decoder"}  # but not the frozen encoder


# ---- errors ----------------------------------------------------------


@pytest.mark.parametrize(
    "change, text",
    [
        ({"drop_last": True, "batch": 8}, "batch: wanted at most the 7 training images, got 8"),
        ({"size": 72}, "at least 32 px and multiples of it .stride of test_resnet.*, got 72x72"),
        ({"size": 16}, "at least 32 px and multiples of it .stride of test_resnet.*, got 16x16"),
        ({"size": 64, "crop": 48}, "at least 32 px and multiples of it .stride of test_resnet.*, got 48x48"),
        ({"backbone": "test_resnett"}, "test_resnet"),
    ],
)
def test_recipes_that_do_not_fit_raise(samples, tmp_path, change, text):
    with pytest.raises(ValueError, match=text):
        train(RECIPE.replace(**change), samples, out=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_missing_training_images_raise(samples):
    with pytest.raises(ValueError, match="wanted good training images, got none among 6 samples"):
        train(RECIPE, [sample for sample in samples if sample.split == "test"], device="cpu")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_missing_devices_raise(samples, device):
    with pytest.raises(ValueError, match="device: wanted "):
        train(RECIPE, samples, device=device)


# ---- divergence ------------------------------------------------


def test_loss_that_is_not_finite_raises(samples, tmp_path, monkeypatch):
    def broken(*arguments):
        loss = step(*arguments)
        broken.calls += 1
        return loss * float("nan") if broken.calls == 5 else loss

    step, broken.calls = trainer.train_step, 0
    monkeypatch.setattr(trainer, "train_step", broken)
    with pytest.raises(ValueError, match=r"the loss of nut is nan at step 5: lower decoder_lr \(0.002\)") as error:
        train(RECIPE, samples, out=tmp_path, device="cpu")
    assert "\n" not in str(error.value)
    assert checkpoint.load(tmp_path / "checkpoint.pt").step == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "log.jsonl", "recipe.yaml"]


def test_learning_rate_that_is_too_high_raises(samples, tmp_path):
    with pytest.raises(ValueError, match=r"(the loss of nut is|is not finite at step)"):
        train(RECIPE.replace(decoder_lr=1e38, steps=30), samples, out=tmp_path, device="cpu")
    assert not (tmp_path / "checkpoint.pt").exists()


def test_weights_that_are_not_finite_are_not_saved(samples, tmp_path, monkeypatch):
    """The loss of a step is computed before the update, so it is still finite."""

    def broken(model, *arguments):
        loss = step(model, *arguments)
        next(model.decoder_parameters()).data[0] = float("inf")
        return loss

    step = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", broken)
    with pytest.raises(ValueError, match="is not finite at step 1: lower decoder_lr"):
        train(RECIPE.replace(checkpoint_every=1), samples, out=tmp_path, device="cpu")
    assert not (tmp_path / "checkpoint.pt").exists()


# ---- interrupted, killed, resumed ---------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, *SIGNALS])
def test_interrupt_waits_for_the_end_of_the_step(number, samples, uninterrupted, tmp_path, monkeypatch):
    def interrupted(*args):
        interrupted.calls += 1
        if interrupted.calls == 4:
            signal.raise_signal(number)  # in the middle of the step
        return step(*args)

    step, interrupted.calls = trainer.train_step, 0
    monkeypatch.setattr(trainer, "train_step", interrupted)
    # Background jobs start with SIGINT ignored, those of nohup with SIGHUP.
    defaults = {signal.SIGINT: signal.default_int_handler, **dict.fromkeys(SIGNALS, signal.SIG_DFL)}
    before = {other: signal.signal(other, handler) for other, handler in defaults.items()}
    try:
        with pytest.raises(KeyboardInterrupt):
            train(RECIPE, samples, out=tmp_path, device="cpu")
        assert {other: signal.getsignal(other) for other in defaults} == defaults
    finally:
        for other, handler in before.items():
            signal.signal(other, handler)
    assert checkpoint.load(tmp_path / "checkpoint.pt").step == 4
    result = train(RECIPE, samples, out=tmp_path, resume=tmp_path / "checkpoint.pt", device="cpu")
    assert result.losses == uninterrupted.losses[4:]
    assert same_weights(result.model, uninterrupted.model)


# Trains with another seed; killed at the log line of a step.
REPLACE_AND_KILL = """
import os, signal, sys
from recontrast.data.datasets import mvtec
from recontrast.training.train import train
from small_run import RECIPE

def on_log(step, *rest):
    if step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)

train(RECIPE.replace(seed=2, log_every=1), mvtec(sys.argv[2], "nut"), out=sys.argv[3], device="cpu", on_log=on_log)
"""


def test_a_replaced_run_is_kept_until_the_first_checkpoint(samples, uninterrupted, tmp_path):
    """Killed before its first checkpoint, a new run leaves the earlier one whole; after it, nothing of the earlier."""
    shutil.copytree(uninterrupted.checkpoint.parent, tmp_path, dirs_exist_ok=True)
    (tmp_path / "results.json").write_text('{"rows": []}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = RECIPE.replace(seed=2, log_every=1)

    def stop_at(fatal):
        arguments = [str(fatal), str(Path(samples[0].path).parents[3]), str(tmp_path)]
        command = [sys.executable, "-c", REPLACE_AND_KILL, *arguments]  # a fork could not make a backward pass
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        assert subprocess.run(command, env=environment, timeout=600).returncode == -signal.SIGKILL

    stop_at(2)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name[0] != "."} == before
    stop_at(4)
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "."} == {*before} - {"results.json"}
    assert [line["step"] for line in log_of(tmp_path)] == [1, 2, 3, 4]
    assert checkpoint.load(tmp_path / "checkpoint.pt").recipe == read_recipe(tmp_path / "recipe.yaml") == other


def test_second_run_in_a_folder_is_refused(samples, tmp_path):
    with lock_folder(tmp_path):
        child = os.fork()
        if not child:
            try:
                train(RECIPE, samples, out=tmp_path, device="cpu")
            except BaseException as error:  # nothing may leave the fork
                os._exit(0 if "got one in use since" in str(error) else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


def test_interrupt_between_steps_and_within(samples, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, samples, out=tmp_path, device="cpu", on_log=interrupted)
    assert checkpoint.load(tmp_path / "checkpoint.pt").step == 2
    monkeypatch.setattr(trainer, "train_step", interrupted)  # the state within a step is not saved
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, samples, out=tmp_path, device="cpu", resume=tmp_path / "checkpoint.pt")
    assert checkpoint.load(tmp_path / "checkpoint.pt").step == 2


KILLED = """
import os, signal, sys
from recontrast.data.datasets import mvtec
from recontrast.recipes.recipe import Recipe
from recontrast.training.train import train
root, out, recipe = sys.argv[1:]
recipe = Recipe.from_dict(eval(recipe))
train(recipe, mvtec(root, "nut"), out=out, device="cpu",
      on_log=lambda step, *rest: step == 5 and os.kill(os.getpid(), signal.SIGKILL))
"""


def test_killed_run_resumes(samples, tmp_path):
    """SIGKILL after step 5, with a checkpoint at step 3: the resumed run is bit-identical to the uninterrupted one."""
    recipe = RECIPE.replace(log_every=1, drop_last=False, batch=3, steps=8, encoder_bn="train")
    whole = train(recipe, samples, out=tmp_path / "whole", device="cpu")
    root = samples[0].path.parents[3]
    arguments = [*SOURCE, KILLED, str(root), str(tmp_path / "out"), repr(recipe.to_dict())]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, **threads}, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr
    path = tmp_path / "out" / "checkpoint.pt"
    assert checkpoint.load(path).step == 3
    assert [line["step"] for line in log_of(tmp_path / "out")] == [1, 2, 3, 4, 5]

    result = train(recipe, samples, out=tmp_path / "out", resume=path, device="cpu")
    assert result.losses == whole.losses[3:]
    assert same_weights(result.model, whole.model)
    assert [line["step"] for line in log_of(tmp_path / "out")] == list(range(1, 9))
    assert [line["loss"] for line in log_of(tmp_path / "out")] == [line["loss"] for line in log_of(tmp_path / "whole")]
    ends = [checkpoint.load(folder / "checkpoint.pt") for folder in (tmp_path / "out", tmp_path / "whole")]
    for optimiser, other in zip(*(end.optimisers for end in ends), strict=True):
        assert optimiser["param_groups"] == other["param_groups"]
        for key, value in optimiser["state"].items():
            assert all(torch.equal(value[name], other["state"][key][name]) for name in value)


def test_resuming_a_finished_run_changes_nothing(samples, uninterrupted):
    before = uninterrupted.checkpoint.read_bytes()
    again = train(RECIPE, samples, out=uninterrupted.checkpoint.parent, resume=uninterrupted.checkpoint, device="cpu")
    assert again.losses == []
    assert same_weights(again.model, uninterrupted.model)
    assert uninterrupted.checkpoint.read_bytes() == before


def test_resuming_another_run_raises(samples, uninterrupted, tmp_path):
    path = uninterrupted.checkpoint

    def check_error(text, recipe=RECIPE, use=samples, **options):
        with pytest.raises(ValueError, match=text) as error:
            train(recipe, use, resume=path, device="cpu", **options)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)

    check_error(r"got another \(batch: 4 and 5; seed: 1 and 2\)", RECIPE.replace(batch=5, seed=2))
    check_error("category: wanted the 'nut' that the run was started with, got 'bolt'", category="bolt")
    check_error("images: wanted the 7 training images that the run was started with, got 6", use=samples[1:])
    check_error("as many with other pixels or in another order", use=[samples[1], samples[0], *samples[2:]])
    other = tiny_set(tmp_path, seed=1)
    check_error("as many with other pixels", use=other)
    intervals = RECIPE.replace(log_every=1, checkpoint_every=100)  # may change: no effect on the weights
    assert train(intervals, samples, resume=path, device="cpu").losses == []


# ---- the order of images --------------------------------------------------------------


def test_batches_cover_each_epoch():
    batches = BatchSampler(10, 4, drop_last=False, seed=0)
    epochs = [[next(batches) for _ in range(3)] for _ in range(3)]
    assert [[len(b) for b in epoch] for epoch in epochs] == [[4, 4, 2]] * 3
    orders = [np.concatenate(epoch).tolist() for epoch in epochs]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1]


def test_batches_drop_last():
    batches = BatchSampler(10, 4, drop_last=True, seed=0)
    assert [len(next(batches)) for _ in range(5)] == [4] * 5


@pytest.mark.parametrize("drop_last", [False, True])
def test_restored_sampler_continues(drop_last):
    uninterrupted, interrupted = (BatchSampler(10, 4, drop_last=drop_last, seed=7) for _ in range(2))
    expected = [next(uninterrupted).tolist() for _ in range(12)]
    for stop in range(12):
        restored = BatchSampler(10, 4, drop_last=drop_last, seed=99)
        restored.restore(interrupted.state())
        assert next(restored).tolist() == next(interrupted).tolist() == expected[stop]


def test_digest_and_fingerprints():
    images = np.random.default_rng(0).integers(0, 256, (130, 2, 3, 3), np.uint8)
    wanted = describe_images(images)
    assert wanted == describe_images(images.copy()) and wanted["count"] == 130
    for other in (images[::-1], images[:-1], images.reshape(130, 3, 2, 3)):
        assert describe_images(other)["digest"] != wanted["digest"]
    assert len(read_fingerprints(wanted)) == 130 and compute_fingerprint(images[77]) in read_fingerprints(wanted)
    assert compute_fingerprint(images[77, ::-1]) not in read_fingerprints(wanted)
    assert describe_images(images[:0])["each"] == "" and not read_fingerprints({"count": 1, "digest": ""})
