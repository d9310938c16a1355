import dataclasses
import math
import shutil

import near_copies
import numpy as np
import pytest
from command_line import SMALL, call, fails, works
from PIL import Image
from small_run import RECIPE, same_weights
from tiny import tiny_set

from recontrast import checkpoint
from recontrast.app.evaluate_job import decide_on_result
from recontrast.calibration.conformal import Calibration, conformal_threshold
from recontrast.checkpoint import digest
from recontrast.data.copies import group_equal_files
from recontrast.data.datasets import Sample
from recontrast.data.fingerprint import compute_fingerprint, read_fingerprints
from recontrast.data.images import read_image
from recontrast.data.listing import DataWarning
from recontrast.data.near_copies import read_sketches, sketch_image
from recontrast.data.tiles import Tiles
from recontrast.evaluation.results import Result, ScoredImage
from recontrast.recipes.paper import RECIPES
from recontrast.recipes.recipe import Recipe
from recontrast.training import open_images, trainer
from recontrast.training.holdout import split_holdout
from recontrast.training.train import train

SHARED = RECIPE.replace(steps=2, checkpoint_every=2, holdout=0.3)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    tiny_set(root, train=20)
    return root


@pytest.fixture(scope="module")
def samples(root):
    return tiny_set(root, train=20)


def test_split_holdout():
    training, held_out = split_holdout(range(270), 0.1, 3)
    assert len(held_out) == 27 and sorted(training + held_out) == list(range(270)) and training == sorted(training)
    assert split_holdout(range(270), 0.1, 3) == (training, held_out)
    assert split_holdout(range(270), 0.1, 4) != (training, held_out)
    assert split_holdout(range(9), 0.0, 3) == (list(range(9)), [])
    for share, count in ((0.1, 3), (0.9, 2)):
        with pytest.raises(ValueError, match="holdout: wanted at least 1 image held out and 1 to train on"):
            split_holdout(range(count), share, 0)
    assert all(recipe.holdout == 0 for recipe in RECIPES.values())
    with pytest.raises(ValueError, match="holdout: wanted a share of at least 0 and below 1, got 1"):
        Recipe(holdout=1)


def test_calibration_uses_the_held_out_images(samples, tmp_path):
    result = train(SHARED, samples, out=tmp_path, device="cpu")
    good = [sample for sample in samples if sample.split == "train"]
    used, held_out = split_holdout(good, 0.3, SHARED.seed)
    saved = checkpoint.load(result.checkpoint)
    assert saved.images["count"] == len(used) == 14 and saved.calibration == result.calibration
    assert result.calibration.count == len(held_out) == 6 and result.calibration.rate == pytest.approx(1 / 7)
    assert result.calibration.weights == digest(result.model.state_dict(), SHARED)
    without_holdout = train(SHARED.replace(holdout=0.0), used, device="cpu")
    assert without_holdout.losses == result.losses and without_holdout.calibration is None
    assert same_weights(without_holdout.model, result.model)


def test_resumed_finished_run_is_calibrated_if_it_was_not(samples, tmp_path, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "calibrate_holdout", stop)
        train(SHARED, samples, out=tmp_path, device="cpu")
    path = tmp_path / "checkpoint.pt"
    before = checkpoint.load(path)
    assert before.step == 2 and before.calibration is None
    calibration = train(SHARED, samples, out=tmp_path, resume=path, device="cpu").calibration
    assert calibration is not None and checkpoint.load(path).calibration == calibration
    other = checkpoint.write_calibration(path, calibration.with_rate(0.5)) and checkpoint.load(path).calibration
    assert (
        train(SHARED, samples, out=tmp_path, resume=path, device="cpu").calibration == other
    )  # an existing calibration stays


def test_too_few_images(samples, tmp_path):
    with pytest.raises(ValueError, match="got 0 of 3 good images held out"):
        train(SHARED.replace(holdout=0.1), samples[:3], out=tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_command_line_holds_out_a_tenth_by_default(root, tmp_path):
    assert tiny_set(tmp_path / "many", train=90)
    output = works("train", tmp_path / "many", "--out", tmp_path / "a", *SMALL)
    assert "9 of 90 good images held out for calibration; --holdout 0 trains on all" in output
    assert "at the promised false-alarm rate of 0.1" in output and "of 3 defect images found" in output
    assert checkpoint.load(tmp_path / "a" / "checkpoint.pt").calibration.count == 9
    output = works("evaluate", tmp_path / "a", root, "--device", "cpu")
    assert "at the promised false-alarm rate of 0.1" in output and "of 3 good images called defects" in output
    for options in (["--recipe", "mvtec"], ["--holdout", 0]):
        output = works("train", root, "--out", tmp_path / "b", "--overwrite", "--no-evaluate", *SMALL, *options)
        assert "held out" not in output
        assert checkpoint.load(tmp_path / "b" / "checkpoint.pt").calibration is None
    assert "holdout: wanted a share" in fails("train", root, "--out", tmp_path / "c", *SMALL, "--holdout", 1)
    result = call("train", root, "--out", tmp_path / "d", "--no-evaluate", *SMALL)
    assert result.exit_code == 0 and "20 good images are too few to hold any out" in result.stdout
    few = tiny_set(tmp_path / "few", train=3) and tmp_path / "few"
    assert "got 0 of 3 good images held out" in fails("train", few, "--out", tmp_path / "e", *SMALL, "--holdout", 0.1)


def test_decided():
    scores = tuple(float(i) for i in range(99))
    found = Calibration(scores, 0.1, conformal_threshold(scores, 0.1), None, 0.1, False, "here", "w")
    empty = dataclasses.asdict(Result([], "mvtec", (8, 8), "max", None, "sum", "any"))

    def result(good, bad):
        scored = [ScoredImage("", "nut", "", label, s) for label, some in ((0, good), (1, bad)) for s in some]
        return Result(**{**empty, "scored": scored})

    decision = decide_on_result(result(np.linspace(0, 99, 20), [1000.0, 5.0, math.inf, 95.0]), found, {}, RECIPE)
    assert decision.describe() == (
        "at the promised false-alarm rate of 0.1: 2 of 20 good images called defects (10.0 %), "
        "3 of 4 defect images found (75.0 %)"
    )
    assert decision.warnings() == [] and decision.to_dict()["false_alarms"] == 2 and decision.appearance_drift is None
    decision = decide_on_result(result(np.linspace(80, 140, 20), []), found, {}, RECIPE)
    assert "defect images found" not in decision.describe() and "far from uniform" in decision.warnings()[0]
    assert decide_on_result(result([], [5.0]), found, {}, RECIPE).warnings() == []


def test_copies_stay_on_one_side_and_count_once(samples, tmp_path):
    good = [sample for sample in samples if sample.split == "train"]
    copies = []
    for index, sample in enumerate(good):  # every image twice: byte by byte, or as a BMP with the same pixels
        path = tmp_path / f"{index}{'.png' if index % 2 else '.bmp'}"
        if index % 2:
            path.symlink_to(sample.path)
        else:
            Image.open(sample.path).save(path)
        copies.append(dataclasses.replace(sample, path=path))
    paths = [sample.path for sample in good + copies]
    owners = group_equal_files(paths)
    assert owners == [*range(20), *(index if index % 2 else index + 20 for index in range(20))]
    for seed in range(20):
        used, held_out = split_holdout(range(40), 0.3, seed, owners)
        assert sorted(used + held_out) == list(range(40))
        assert not {owners[index] for index in used} & {owners[index] for index in held_out}
    with pytest.warns(DataWarning, match=r"^train: 20 of 40 images seem to be another one .*: they stay on one side"):
        result = train(SHARED, good + copies, device="cpu")
    trained = read_fingerprints(result.state.images)
    fingerprints = [compute_fingerprint(read_image(sample.path, size=SHARED.size)) for sample in good]
    assert result.state.images["count"] == 28 and len(trained) == 14 and trained < set(fingerprints)
    assert result.calibration.count == 6
    with pytest.raises(ValueError, match="got 0 of 1 different good images held out"):
        split_holdout(range(5), 0.5, 0, [0] * 5)


def test_pictures_saved_again_stay_on_one_side(samples, tmp_path, monkeypatch):
    good = [sample for sample in samples if sample.split == "train"]
    again = []
    for index, sample in enumerate(good):
        path = tmp_path / f"{index}.png"
        Image.open(sample.path).point(lambda level: level + 5).save(path)
        again.append(dataclasses.replace(sample, path=path))
    with pytest.warns(DataWarning, match=r"^train: 20 of 40 images .* saved again or rescaled .*, and count as one"):
        result = train(SHARED, good + again, out=tmp_path / "run", device="cpu")
    trained = read_fingerprints(result.state.images)
    sides = [
        [compute_fingerprint(read_image(item.path, size=SHARED.size)) in trained for item in pair]
        for pair in zip(good, again, strict=True)
    ]
    assert all(first == second for first, second in sides) and sum(first for first, _ in sides) == 14
    assert result.calibration.count == 6 and len(read_sketches(result.state.images)) == 28
    with pytest.warns(DataWarning):
        resumed = train(SHARED, good + again, resume=tmp_path / "run" / "checkpoint.pt", device="cpu")
    assert resumed.state.images == result.state.images
    with monkeypatch.context() as patch:  # as an older version divided them, which must stay on a resume
        patch.setattr(open_images, "find_near_copies", lambda sketches: [])
        former = train(SHARED, good + again, out=tmp_path / "former", device="cpu").state.images
    assert former["digest"] != result.state.images["digest"]
    with pytest.warns(DataWarning):
        resumed = train(SHARED, good + again, resume=tmp_path / "former" / "checkpoint.pt", device="cpu")
    assert resumed.state.images["digest"] == former["digest"]
    with pytest.warns(DataWarning, match="training sees them more often than others"):
        train(SHARED.replace(holdout=0.0), good + again, device="cpu")


def test_parts_saved_again_stay_on_one_side_if_their_views_fill_a_batch(tmp_path):
    """14 parts are fewer than the batch, but their 28 views are not."""
    rng, good = np.random.default_rng(5), []
    for index in range(10):
        for view in ("left", "right"):
            picture = near_copies.draw(rng)
            for end, image in (("", picture), ("-again", near_copies.rescale(picture, 0.95))):
                path = tmp_path / f"{index}{end}_{view}.png"
                image.save(path)
                good.append(Sample(path, None, 0, "nut", "train", "good"))
    recipe = SHARED.replace(views_from=r"_(left|right)\.", batch=20, steps=1, holdout=0.3, drop_last=True)
    with pytest.warns(DataWarning, match=r"^train: 10 of 20 images .* saved again or rescaled .*, and count as one"):
        result = train(recipe, good, device="cpu")
    trained, views = read_fingerprints(result.state.images), result.recipe.image_views
    sides = [
        [compute_fingerprint(views.read(tmp_path / f"{index}{end}_left.png", size=SHARED.size)) in trained
         for end in ("", "-again")]
        for index in range(10)
    ]  # fmt: skip
    assert all(first == again for first, again in sides) and sum(first for first, _ in sides) == 7
    assert result.calibration.count == 3


def test_pictures_saved_again_stay_on_one_side_with_tiles(tmp_path):
    """Whole images are compared, also where training cuts them into tiles."""
    rng, good = np.random.default_rng(5), []
    for index in range(10):
        picture = near_copies.draw(rng)
        picture.save(tmp_path / f"{index}.png")
        near_copies.rescale(picture, 0.95).save(tmp_path / f"{index}-again.png")
        good += [Sample(tmp_path / f"{index}{end}.png", None, 0, "nut", "train", "good") for end in ("", "-again")]
    recipe = SHARED.replace(tile=64, stride=64, holdout=0.4)
    with pytest.warns(DataWarning, match=r"^train: 10 of 20 images .* saved again or rescaled .*, and count as one"):
        result = train(recipe, good, out=tmp_path / "run", device="cpu")
    trained = read_fingerprints(result.state.images)

    def is_trained(sample):
        tiles = Tiles(read_image(sample.path), 64, 64)
        return compute_fingerprint(tiles[range(len(tiles))]) in trained

    sides = [(is_trained(first), is_trained(again)) for first, again in zip(good[::2], good[1::2], strict=True)]
    assert all(first == again for first, again in sides) and sum(first for first, _ in sides) == 6
    assert result.calibration.count == 4
    used = [sample for sample in good if is_trained(sample)]
    sketches = np.stack([sketch_image(read_image(sample.path)) for sample in used])
    np.testing.assert_allclose(read_sketches(result.state.images), sketches, atol=1e-3)
    with pytest.warns(DataWarning):
        resumed = train(recipe, good, resume=tmp_path / "run" / "checkpoint.pt", device="cpu")
    assert resumed.state.images == result.state.images
    (tmp_path / "new").mkdir()
    for index in range(9):
        near_copies.draw(rng).save(tmp_path / "new" / f"{index}.png")
    near_copies.rescale(Image.open(used[0].path), 0.94).save(tmp_path / "new" / "old.png")
    arguments = ("--good", tmp_path / "new", "--false-alarm-rate", 0.1, "--device", "cpu")
    result = call("calibrate", tmp_path / "run", *arguments)
    assert result.exit_code == 0 and "1 of 10 images seem to be training images, saved again" in result.stderr
    assert "old.png" in result.stderr


def test_test_images_saved_again_are_named(root, samples, tmp_path):
    train(SHARED, samples, out=tmp_path / "run", device="cpu")
    trained = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    fingerprints = read_fingerprints(trained.images)
    used = [sample for sample in samples if compute_fingerprint(read_image(sample.path, size=32)) in fingerprints]
    shutil.copytree(root, tmp_path / "data")
    Image.open(used[3].path).resize((62, 62)).save(tmp_path / "data/nut/test/good/again.png")
    result = call("evaluate", tmp_path / "run", tmp_path / "data", "--device", "cpu")
    assert result.exit_code == 0
    assert "test: 1 of 7 images seem to be training images, saved again or rescaled: " in result.stderr
    assert "again.png" in result.stderr and "were trained on" not in result.stderr
    assert "seem to be" not in call("evaluate", tmp_path / "run", root, "--device", "cpu").stderr
    (tmp_path / "good").mkdir()
    for index, sample in enumerate(samples[-6:]):
        shutil.copy(sample.path, tmp_path / "good" / f"{index}.png")
    for index in (2, 5):
        Image.open(used[index].path).resize((62, 62)).save(tmp_path / "good" / f"again{index}.png")
    result = call(
        "calibrate", tmp_path / "run", "--good", tmp_path / "good", "--false-alarm-rate", 0.2, "--device", "cpu"
    )
    assert result.exit_code == 0 and "2 of 8 images seem to be training images, saved again" in result.stderr
