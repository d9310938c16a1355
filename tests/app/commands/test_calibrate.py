import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from command_line import call, fails, works
from PIL import Image
from saved_model import RECIPE, draw, save

from recontrast import checkpoint as checkpoints
from recontrast.app import api
from recontrast.data.datasets import Sample
from recontrast.data.images import read_image
from recontrast.data.listing import DataWarning
from recontrast.training import train as training


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("data") / "good", 24, seed=0)


@pytest.fixture
def run(tmp_path):
    save(tmp_path / "run" / "checkpoint.pt", RECIPE)
    return tmp_path / "run"


def test_calibrate_then_decide(run, good, tmp_path):
    said = works("calibrate", run, "--good", good, "--false-alarm-rate", 0.1, "--device", "cpu")
    found = checkpoints.load(run / "checkpoint.pt").calibration
    assert found.count == 24 and found.rate == 0.1 and found.source == str(good)
    assert "at most 2/25 = 0.08" in said and "Beta(2, 23)" in said and f"{found.threshold:.6g}" in said
    out = tmp_path / "out"
    said = works("predict", run, good, "--out", out, "--decide", "--no-overlays", "--device", "cpu")
    assert "24 images scored, 1 called defects at a false-alarm rate of 0.1" in said
    rows = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    assert sum(row["decision"] == "defect" for row in rows) == 1
    said = works("predict", run, good, "--out", out, "--false-alarm-rate", 0.5, "--no-overlays", "--device", "cpu")
    assert "11 called defects at a false-alarm rate of 0.5" in said
    assert json.loads((out / "scores.json").read_text())["calibration"]["rate"] == 0.5
    assert "got 0.001, which needs 999" in fails(
        "predict", run, good, "--out", out, "--false-alarm-rate", 0.001, "--device", "cpu"
    )


def test_others_are_compared_by_the_calibration_that_is_there(run, good, tmp_path):
    new = draw(tmp_path / "new", 8, seed=1)
    assert "got none: create one with --good DIR" in fails("calibrate", run, "--check", new, "--device", "cpu")
    works("calibrate", run, "--good", good, "--false-alarm-rate", 0.1, "--device", "cpu")
    before = (run / "checkpoint.pt").stat()
    said = works("calibrate", run, "--check", new, "--device", "cpu")
    assert "8 new good images" in said and "threshold" not in said
    after = (run / "checkpoint.pt").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)  # nothing is written
    assert "--good: wanted good images" in fails("calibrate", run, "--device", "cpu")
    assert "not of views trained, float32: no decisions are made" in fails(
        "calibrate", run, "--check", new, "--views", "trained", "--device", "cpu"
    )


def test_a_calibration_from_more_images_is_not_replaced_in_silence(run, good):
    first, fewer = sorted(good.iterdir())[0], sorted(good.iterdir())[:12]
    options = ["--false-alarm-rate", 0.1, "--device", "cpu"]
    assert "replaces" not in works("calibrate", run, "--good", good, *options)
    assert "replaces" not in works("calibrate", run, "--good", good, *options)
    some = [word for path in fewer for word in ("--good", path)]
    said = works("calibrate", run, *some, *options)
    assert said.splitlines()[-1] == f"calibration: {run / 'checkpoint.pt'}, replaces one from 24 images"
    help = " ".join(works("calibrate", "--help").replace("│", " ").split())
    assert "--good A --good B" in help and "--check A --check B" in help
    assert call("calibrate", run, "--good", good, first).exit_code == 2


def test_check_warns_of_other_images_alone(run, good, tmp_path):
    like, unlike = draw(tmp_path / "like", 16, seed=1), draw(tmp_path / "unlike", 16, seed=2, spread=50.0)
    options = ["calibrate", run, "--good", good, "--false-alarm-rate", 0.1, "--device", "cpu", "--check"]
    assert "are compatible with uniform" in works(*options, like)
    result = call(*options, unlike)
    assert result.exit_code == 0
    assert "recontrast: warning: p-values of good images are far from uniform" in result.stderr


def test_unreadable_images_are_named_and_left_out(run, good, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "text.png").write_text("no image")
    said = fails("calibrate", run, "--good", good, "--good", tmp_path / "more", "--false-alarm-rate", 0.1)
    assert "text.png" in said
    found = checkpoints.load(run / "checkpoint.pt").calibration
    assert found.count == 24
    works("calibrate", run, "--good", good, "--false-alarm-rate", 0.1)
    assert np.allclose(found.scores, checkpoints.load(run / "checkpoint.pt").calibration.scores)
    assert "none of 1 images could be read" in fails(
        "calibrate", run, "--good", tmp_path / "more", "--false-alarm-rate", 0.5
    )


def test_what_cannot_be_promised_is_refused(run, good, tmp_path):
    before = (run / "checkpoint.pt").read_bytes()
    assert (
        "1/25 = 0.04, the lowest that 24 calibration images can promise, got 0.01, which needs 99 good images"
        in fails("calibrate", run, "--good", good)
    )
    assert "above 0 and below 1, got 1.5" in fails("calibrate", run, "--good", good, "--false-alarm-rate", 1.5)
    rate = ["--false-alarm-rate", 0.1]
    assert "pixel rate" in fails("calibrate", run, "--good", good, *rate, "--pixel-rate", 0)
    assert "--batch: wanted at least 1" in fails("calibrate", run, "--good", good, *rate, "--batch", 0)
    assert "got 24 of them again" in fails("calibrate", run, "--good", good, *rate, "--check", good)
    assert "no such file or folder" in fails("calibrate", run, "--good", tmp_path / "none")
    assert "wanted a checkpoint" in fails("calibrate", tmp_path / "none", "--good", good, *rate)
    assert (run / "checkpoint.pt").read_bytes() == before


def test_decisions_without_a_calibration_are_refused(run, good, tmp_path):
    for option in (["--decide"], ["--false-alarm-rate", 0.1]):
        said = fails("predict", run, good, "--out", tmp_path / "out", *option)
        assert f"run recontrast calibrate {run / 'checkpoint.pt'} --good DIR first" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tile", [None, 32])
def test_images_of_the_training_are_refused(good, tmp_path, tile):
    """Whatever they are called and however they are stored; also where arrays were trained on."""
    recipe = RECIPE.replace(tile=tile, steps=1, batch=4)
    (tmp_path / "data").mkdir()
    paths = sorted(good.iterdir())[:9]
    if tile is None:
        samples = np.stack([read_image(path, size=64) for path in paths])
    else:
        samples = [Sample(path, None, 0, "nut", "train", "good") for path in paths]
    training.train(recipe, samples, out=tmp_path / "run", device="cpu")
    fresh = draw(tmp_path / "fresh", 20, seed=3)
    with Image.open(paths[4]) as image:
        image.save(tmp_path / "again.bmp")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    options = ["calibrate", tmp_path / "run", "--false-alarm-rate", 0.1, "--device", "cpu", "--good", fresh]
    for option in ("--good", "--check"):
        said = fails(*options, option, tmp_path / "again.bmp")
        wanted = f"{option}: wanted good images that were not trained on, got 1 of {1 if option == '--check' else 21}"
        assert f"{wanted} that were (first: {tmp_path / 'again.bmp'})" in said
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    works(*options)
    found = checkpoints.load(tmp_path / "run" / "checkpoint.pt")
    older = {name: value for name, value in found.images.items() if name != "each"}
    checkpoints.save(tmp_path / "run" / "checkpoint.pt", replace(found, images=older))
    works(*options, "--good", tmp_path / "again.bmp")
    training.train(recipe.replace(checkpoint_every=1), samples, out=tmp_path / "on", device="cpu",
                 resume=tmp_path / "run" / "checkpoint.pt")  # fmt: skip


def test_scores_of_one_view_are_decided_by_their_own_calibration(run, good, tmp_path):
    fast = ["--views", "trained", "--precision", "bfloat16", "--device", "cpu"]
    said = works("calibrate", run, "--good", good, "--false-alarm-rate", 0.1, *fast)
    assert "it is valid for --views trained --precision bfloat16 only" in said
    found = checkpoints.load(run / "checkpoint.pt").calibration
    assert (found.views, found.precision) == ("trained", "bfloat16")
    predict = ["predict", run, good, "--out", tmp_path / "out", "--no-overlays"]
    assert "1 called defects at a false-alarm rate of 0.1" in works(*predict, *fast, "--decide")
    reason = "its calibration is for scores of views trained, bfloat16, not of views "
    hint = ": no decisions are made without --views trained --precision bfloat16"
    for options, got in (
        ([], "both, float32"), (fast[:2], "trained, float32"),
        ([*fast, "--no-fold"], "trained, bfloat16, without BatchNorm folding"),
    ):  # fmt: skip
        result = call(*predict, *options, "--device", "cpu")
        assert result.exit_code == 0 and "called defects" not in result.stdout
        assert f"{reason}{got}{hint}" in result.stderr
    assert f"{reason}both, float32{hint}" in fails(*predict, "--decide", "--device", "cpu")
    works("calibrate", run, "--good", good, "--false-alarm-rate", 0.1, "--device", "cpu")
    found = checkpoints.load(run / "checkpoint.pt").calibration
    assert (found.views, found.precision) == (None, None) and not {"views", "precision"} & set(found.to_dict())
    assert "1 called defects" in works(*predict, "--device", "cpu")


def test_evaluate_says_what_it_takes_to_decide(run, good, tmp_path):
    draw(tmp_path / "nut" / "train" / "good", 1, seed=5)
    draw(tmp_path / "nut" / "test" / "good", 2, seed=6)
    draw(tmp_path / "nut" / "test" / "bent", 2, seed=7, spread=80.0)
    words = ["evaluate", run, tmp_path / "nut", "--device", "cpu"]
    works("calibrate", run, "--good", good, "--false-alarm-rate", 0.1, "--views", "trained", "--device", "cpu")
    result = call(*words)
    assert (
        result.exit_code == 0 and "no decisions are made without --views trained --precision float32" in result.stderr
    )
    decided = call(*words, "--views", "trained")
    assert decided.exit_code == 0 and "decisions" not in decided.stderr
    assert "at the promised false-alarm rate of 0.1" in decided.stdout and "promised" not in result.stdout


def test_copies_are_one_image(run, good, tmp_path):
    """Links, copies and files of another format with the same pixels count once."""
    copies = tmp_path / "copies"
    copies.mkdir()
    for index, path in enumerate(sorted(good.iterdir())[:9]):
        (copies / f"{index}.png").write_bytes(path.read_bytes())
        (copies / f"link{index}.png").symlink_to(path)
        Image.open(path).save(copies / f"{index}.bmp")
    options = ["--false-alarm-rate", 0.05, "--device", "cpu"]
    result = call("calibrate", run, "--good", copies, *options)
    message = result.stderr
    assert result.exit_code == 2 and "Traceback" not in message
    assert "warning: --good: 27 images are 9 different images, for example " in message
    assert "the lowest that 9 calibration images can promise" in message
    with pytest.warns(DataWarning, match="9 different images"):
        detector = api.calibrate(run, copies, false_alarm_rate=0.1, device="cpu")
    assert detector.calibration.count == 9


def test_folder_of_classes(run, good, tmp_path):
    """Only the good class sets the threshold."""
    draw(tmp_path / "parts" / "OK", 24, seed=0)
    draw(tmp_path / "parts" / "NG", 3, seed=5)
    options = ["--false-alarm-rate", 0.1, "--device", "cpu"]
    output = works("calibrate", run, "--good", tmp_path / "parts", *options)
    assert f"--good: {tmp_path / 'parts'}\n  OK: 24 images\n" in output
    assert checkpoints.load(run / "checkpoint.pt").calibration.count == 24
    draw(tmp_path / "unclear" / "a", 3, seed=6)
    draw(tmp_path / "unclear" / "b", 3, seed=7)
    message = fails("calibrate", run, "--good", tmp_path / "unclear", *options)
    assert "name the folder of good images itself, or use --all-good" in message
    assert "6 calibration images" in fails("calibrate", run, "--good", tmp_path / "unclear", "--all-good", *options)
