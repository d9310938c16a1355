"""Good images that are added to a fitted PatchCore, PaDiM or ensemble, or with which a run by steps goes on."""

import json
import shutil
from dataclasses import replace

import near_copies
import numpy as np
import pytest
import torch

import recontrast
from recontrast import checkpoint as checkpoints
from recontrast.data.fingerprint import read_fingerprints
from recontrast.data.near_copies import read_sketches
from recontrast.inference.detector import open_detector
from recontrast.models.patchcore import PatchCore
from recontrast.training import extend as extend_module
from recontrast.training import trainer as trainer_module
from tests.command_line import call, fails, works
from tests.tiny import tiny_set

SMALL = ("--backbone", "test_resnet", "--weights", "random", "--size", "64", "--batch", "3", "--device", "cpu",
         "--set", "channels_last=false", "--no-evaluate")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data set, and a folder with 5 new images, a copy of one of them, and 2 images of the data set."""
    root = tmp_path_factory.mktemp("data")
    tiny_set(root, train=12)
    tiny_set(root / "other", train=5, seed=1)
    shutil.move(root / "other/nut/train/good", root / "new")
    shutil.copy(root / "new/004.png", root / "new/005.png")
    for name in ("000.png", "007.png"):
        shutil.copy(root / "nut/train/good" / name, root / "new" / f"old{name}")
    return root


@pytest.fixture(scope="module")
def fitted(data, tmp_path_factory):
    """A fitted and calibrated run."""
    run = tmp_path_factory.mktemp("fitted")
    works("train", data / "nut", "--architecture", "patchcore", *SMALL, "--set", "bank_share=0.05", "--holdout", 0.2,
          "--out", run)  # fmt: skip
    return run


@pytest.fixture
def run(fitted, tmp_path):
    return shutil.copytree(fitted, tmp_path / "run")


def test_bank_keeps_its_vectors_and_gains_a_share(run, data):
    before = checkpoints.load(run / "checkpoint.pt")
    old = [p.score for p in open_detector(run / "checkpoint.pt", "cpu").predict(data / "new")]
    printed = works("train", "--extend", run, "--good", data / "new", "--device", "cpu")
    after = checkpoints.load(run / "checkpoint.pt")
    bank, points = before.model["bank"], 8 * 8
    assert torch.equal(after.model["bank"][: len(bank)], bank)
    assert len(after.model["bank"]) == len(bank) + int(5 * points * 0.05)
    new = [p.score for p in open_detector(run / "checkpoint.pt", "cpu").predict(data / "new")]
    assert np.less_equal(new, np.array(old) + 1e-6).all() and min(np.subtract(new, old)) < -1e-3
    assert "5 images added in" in printed and "15 in all" in printed
    assert "3 images are left out" in printed and "old000.png" in printed
    last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    assert last["images"] == 15 and last["step"] == after.step > before.step


def test_new_vectors_are_the_farthest_from_the_bank(run, data):
    old = checkpoints.load(run / "checkpoint.pt").model["bank"].float()
    works("train", "--extend", run, "--good", data / "new", "--device", "cpu")
    gained = checkpoints.load(run / "checkpoint.pt").model["bank"][len(old) :].float()
    model = open_detector(run / "checkpoint.pt", "cpu").model.model
    model.bank = old.half()
    first = float(torch.cdist(gained[:1], old).min())
    scores = [p.score for p in recontrast.load(run, "cpu").predict(data / "new")]
    assert len(scores) == 8
    pixels = torch.stack([torch.from_numpy(i) for i in _read(data / "new")]).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.mean, model.std))
    distances = model.distances((pixels - mean) / std)[0][0]
    assert first == pytest.approx(float(distances.max()), rel=1e-2)


def _read(folder):
    from PIL import Image

    return [np.array(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


def test_description_of_the_training_images_grows(run, data):
    before = checkpoints.load(run / "checkpoint.pt").images
    works("train", "--extend", run, "--good", data / "new", "--device", "cpu")
    after = checkpoints.load(run / "checkpoint.pt").images
    assert after["count"] == before["count"] + 5 and after["digest"] != before["digest"]
    assert read_fingerprints(after) > read_fingerprints(before) and len(read_fingerprints(after)) == 15
    assert read_sketches(after).shape == (15, 1024)
    np.testing.assert_array_equal(read_sketches(after)[:10], read_sketches(before))
    assert "that were (first:" in fails("calibrate", run, "--good", data / "new", "--false-alarm-rate", 0.2)
    assert "got 8 that it was" in fails("train", "--extend", run, "--good", data / "new")


def test_calibration_is_removed_or_made_again(run, data):
    printed = works("train", "--extend", run, "--good", data / "new", "--device", "cpu")
    assert checkpoints.load(run / "checkpoint.pt").calibration is None
    assert "the calibration is removed, because it belongs to the detector before" in printed
    assert f"to calibrate again, run recontrast calibrate {run / 'checkpoint.pt'} --good DIR" in printed
    works("calibrate", run, "--good", data / "nut/test/good", "--false-alarm-rate", 0.3, "--device", "cpu")
    tiny_set(data / "third", train=6, seed=2)
    detector = recontrast.extend(run, data / "third/nut/train/good", holdout=0.5, device="cpu")
    assert detector.calibration.count == 3 and len(read_fingerprints(_images(run))) == 18
    shutil.rmtree(data / "third")


def _images(run):
    return checkpoints.load(run / "checkpoint.pt").images


@pytest.fixture(scope="module", params=[(), ("--tile", 64)], ids=["whole", "tiles"])
def pictures(request, tmp_path_factory):
    """A run on 12 pictures, and new ones: two of the run and eight others, each of which was saved twice."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(8)
    drawn = [near_copies.draw(rng) for _ in range(20)]
    for folder, part in (("old", drawn[:12]), ("new", drawn[12:])):
        (root / folder).mkdir()
        for index, picture in enumerate(part):
            picture.save(root / folder / f"{index:02}.png")
    for index, picture in enumerate(drawn[12:]):
        near_copies.rescale(picture, 0.95).save(root / "new" / f"{index:02}-again.png")
    for index in (3, 7):
        near_copies.rescale(drawn[index], 0.95).save(root / "new" / f"old{index}.png")
    small = SMALL if not request.param else [option for option in SMALL if option not in ("--size", "64")]
    works("train", root / "old", "--architecture", "patchcore", *small, *request.param, "--holdout", 0,
          "--out", root / "run")  # fmt: skip
    return root


def test_pictures_saved_again_stay_on_one_side(pictures, tmp_path, monkeypatch):
    run, taken = shutil.copytree(pictures / "run", tmp_path / "run"), []
    split = extend_module.split_new_images
    monkeypatch.setattr(extend_module, "split_new_images", lambda *args: taken.extend(split(*args)) or tuple(taken))
    result = call("train", "--extend", run, "--good", pictures / "new", "--holdout", 0.5, "--device", "cpu")
    assert result.exit_code == 0, result.output
    added, held_out = [[sample.path.stem for sample in part] for part in taken[:2]]
    assert "--good: 8 of 18 images seem to be another one of them" in result.stderr
    assert "--good: 2 of 18 images seem to be training images, saved again or rescaled" in result.stderr
    assert "count as one image of the calibration" in result.stderr and "not searched" not in result.stderr
    assert {"old3", "old7"} < set(added) and len(added) == 2 + 2 * 4 and len(held_out) == 4
    assert not {name[:2] for name in held_out} & {name[:2] for name in added}
    images = _images(run)
    assert checkpoints.load(run / "checkpoint.pt").calibration.count == 4
    assert read_sketches(images).shape == (22, 1024)


def test_checkpoint_without_sketches_compares_new_images_alone(pictures, tmp_path):
    run = shutil.copytree(pictures / "run", tmp_path / "run")
    saved = checkpoints.load(run / "checkpoint.pt")
    del saved.images["sketches"]
    checkpoints.save(run / "checkpoint.pt", saved)
    result = call("train", "--extend", run, "--good", pictures / "new", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "--good: 8 of 18 images seem to be another one of them" in result.stderr
    assert "the detector sees them more often than others" in result.stderr
    assert "--good: training images that were saved again are not searched" in result.stderr
    assert "sketches" not in _images(run)


def test_only_training_images_saved_again(pictures, tmp_path):
    run = shutil.copytree(pictures / "run", tmp_path / "run")
    again = [option for index in (3, 7) for option in ("--good", pictures / "new" / f"old{index}.png")]
    result = call("train", "--extend", run, *again, "--holdout", 0.5, "--device", "cpu")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "wanted new images to hold out, got 2 that seem to be training images" in result.stderr


def check_extension_without_fingerprints(run, data, printed):
    """Extend a run as of an older version: its images are not told from new ones, and may not calibrate it."""
    saved = checkpoints.load(run / "checkpoint.pt")
    for name in ("each", "sketches"):
        del saved.images[name]
    checkpoints.save(run / "checkpoint.pt", saved)
    before, former = (run / "checkpoint.pt").read_bytes(), data / "nut/train/good"
    message = fails("train", "--extend", run, "--good", former, "--holdout", 0.5)
    assert "holdout: wanted none for" in message and "does not tell which images it was trained on" in message
    assert (run / "checkpoint.pt").read_bytes() == before
    result = call("train", "--extend", run, "--good", former, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "--good: images that the detector was trained on are not told from new ones" in result.stderr
    assert printed in result.stdout
    assert not any(text in result.stdout for text in ("in all", "of the run", "new images"))
    assert {"count", "each"}.isdisjoint(_images(run))
    message = fails("train", "--extend", run, "--good", data / "new", "--holdout", 0.5)
    assert "holdout: wanted none for" in message
    works("train", "--extend", run, "--good", data / "new", "--device", "cpu")
    works("report", run, data / "nut", "--out", run / "report.html", "--device", "cpu")


def test_checkpoint_without_fingerprints(run, data):
    check_extension_without_fingerprints(run, data, "12 images added in")
    assert "images" not in json.loads((run / "log.jsonl").read_text().splitlines()[-1])


def test_results_of_an_evaluation_are_removed(run, data):
    works("evaluate", run, data / "nut", "--out", run, "--device", "cpu")
    assert (run / "results.json").exists()
    works("train", "--extend", run, "--good", data / "new", "--device", "cpu")
    assert not (run / "results.json").exists() and not (run / "scores.csv").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), MemoryError])
@pytest.mark.parametrize("where", ["observe", "build_bank", "save"])
def test_failure_leaves_the_checkpoint_as_it_was(run, data, monkeypatch, error, where):
    before = {path.name: path.read_bytes() for path in run.iterdir()}

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(*((checkpoints, "save") if where == "save" else (PatchCore, where)), fail)
    result = call("train", "--extend", run, "--good", data / "new", "--device", "cpu")
    assert result.exit_code == (130 if error is KeyboardInterrupt else 2) and "Traceback" not in result.output
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_bad_input(fitted, data, tmp_path):
    bad = tmp_path / "more"
    shutil.copytree(data / "new", bad)
    (bad / "000.png").write_bytes(b"no image")
    for arguments, message in [
        (("--extend", fitted), "--good: wanted good images to add, got none"),
        (("--extend", fitted, "--good", bad), "--good: wanted images that can be read, got 1 others"),
        (("--extend", fitted, "--good", data / "missing"), "missing"),
        (("--extend", tmp_path, "--good", data / "new"), "checkpoint.pt"),
        (("--extend", fitted, "--good", data / "new", "--holdout", "0.01"), "holdout: wanted at least 1 image"),
        (("--extend", fitted, "--good", data / "new", "--holdout", "1.5"), "holdout: wanted a share in [0, 1)"),
        (("--extend", fitted, "--good", data / "new", "--size", "64"),
         "--extend: wanted only --good, --all-good, --holdout, --steps, --device, --import, --threads with it, "
         "got --size too"),
        ((data, "--extend", fitted, "--good", data / "new"), "got DATA too"),
        ((data, "--good", data / "new"), "--good: wanted either DATA or this, got both"),
    ]:  # fmt: skip
        assert message in fails("train", *arguments)


# ---- PaDiM and the ensemble -----------------------------------------------------------------------


GAUSSIANS = (*SMALL, "--holdout", 0, "--set", "gaussian_features=6")
ENSEMBLE = ("--architecture", "ensemble", *GAUSSIANS, "--set", "small_size=64", "--set", "bank_share=1")


@pytest.fixture(scope="module")
def united(data, tmp_path_factory):
    """The images of the run and the new ones, in this order."""
    root = tmp_path_factory.mktemp("united") / "nut/train/good"
    shutil.copytree(data / "nut/train/good", root)
    for number in range(5):
        shutil.copy(data / f"new/{number:03}.png", root / f"new{number}.png")
    return root


def check_equal(extended, whole, *, rtol=2e-3):
    """Compare what two runs have fitted, up to the rounding of what is stored."""
    assert extended.model.keys() == whole.model.keys()
    for name, value in whole.model.items():
        torch.testing.assert_close(extended.model[name], value, rtol=rtol, atol=rtol * float(value.abs().max()))
    assert extended.images["observed"] == whole.images["observed"] == 17
    assert extended.images["count"] == 17 and set(read_fingerprints(extended.images)) == set(
        read_fingerprints(whole.images)
    )


def test_gaussians_are_those_of_all_images(data, united, tmp_path):
    for name, images in (("run", data / "nut"), ("whole", united.parents[1])):
        works("train", images, "--architecture", "padim", *GAUSSIANS, "--out", tmp_path / name)
    before = checkpoints.load(tmp_path / "run/checkpoint.pt")
    printed = works("train", "--extend", tmp_path / "run", "--good", data / "new", "--device", "cpu")
    assert "5 images added in" in printed and "17 in all" in printed
    assert "3 images are left out, because they are trained on already" in printed
    extended, whole = (checkpoints.load(tmp_path / name / "checkpoint.pt") for name in ("run", "whole"))
    check_equal(extended, whole)
    assert not torch.allclose(before.model["centres"], extended.model["centres"], rtol=1e-3)
    scores = [open_detector(tmp_path / name / "checkpoint.pt", "cpu").predict(data / "new").scores
              for name in ("run", "whole")]  # fmt: skip
    np.testing.assert_allclose(*scores, rtol=1e-3)


def test_ensemble_is_that_of_all_images(data, united, tmp_path):
    """Bank, Gaussians, and the weights of both by left-out images of both kinds."""
    for name, images in (("run", data / "nut"), ("whole", united.parents[1])):
        works("train", images, *ENSEMBLE, "--out", tmp_path / name)
    before = checkpoints.load(tmp_path / "run/checkpoint.pt")
    printed = works("train", "--extend", tmp_path / "run", "--good", united, "--device", "cpu")
    assert "5 images added to 12 of the run in" in printed and "left out" not in printed
    extended, whole = (checkpoints.load(tmp_path / name / "checkpoint.pt") for name in ("run", "whole"))
    check_equal(extended, whole)
    for name in ("scales", "score_scales"):
        torch.testing.assert_close(extended.model[name], whole.model[name], rtol=1e-3, atol=0)
        assert not torch.allclose(before.model[name], extended.model[name], rtol=5e-3)


def test_ensemble_needs_its_former_images(data, united, tmp_path):
    works("train", data / "nut", *ENSEMBLE, "--out", tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    message = fails("train", "--extend", tmp_path, "--good", data / "new")
    assert "--good: wanted all 12 images of the run with the new ones" in message and "got 2" in message
    saved = checkpoints.load(tmp_path / "checkpoint.pt")
    checkpoints.save(tmp_path / "checkpoint.pt", replace(saved, images={**saved.images, "observed": 11}))
    message = fails("train", "--extend", tmp_path, "--good", united)
    assert "wanted a run that observed all its images, got one that time ended after 11 of 12" in message
    old = {name: value for name, value in saved.images.items() if name != "observed"}
    checkpoints.save(tmp_path / "checkpoint.pt", replace(saved, images=old))
    assert "wanted a checkpoint with the number of images that it was fitted to, got one of an older version" in fails(
        "train", "--extend", tmp_path, "--good", united
    )
    assert len(before) > 0 and checkpoints.load(tmp_path / "checkpoint.pt").step == saved.step


# ---- detectors that are trained by steps ---------------------------------------------------------


@pytest.fixture(scope="module", params=["recontrast", "rd4ad", "uniad", "dinomaly", "inp_former"])
def trained(request, data, tmp_path_factory):
    """A calibrated run of eight steps."""
    run = tmp_path_factory.mktemp("trained")
    name = ("--architecture", request.param) if request.param != "rd4ad" else (
        "--set", "train_encoder=false", "--set", "pairs=self", "--set", "mining=false")  # fmt: skip
    backbone = ("--backbone", "test_vit") if request.param in ("dinomaly", "inp_former") else ()
    works(
        "train",
        data / "nut",
        *name,
        *SMALL,
        *backbone,
        "--steps",
        8,
        "--set",
        "log_every=2",
        "--holdout",
        0.2,
        "--out",
        run,
    )
    return run


def test_run_by_steps_goes_on(trained, data, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    before = checkpoints.load(run / "checkpoint.pt")
    printed = works("train", "--extend", run, "--good", data / "new", "--good", data / "nut/train/good",
                    "--steps", 5, "--device", "cpu")  # fmt: skip
    after = checkpoints.load(run / "checkpoint.pt")
    # 12 images, of which 2 were held out, and are new now, unless their copies lie among the new ones
    again = len(read_fingerprints(before.images))
    new = 5 + 12 - again
    assert f"5 further steps on {new} new images and {again} of the run in" in printed
    assert "images of the run were not given" not in printed
    assert "the calibration is removed, because it belongs to the detector before" in printed
    assert before.calibration is not None and after.calibration is None
    assert (before.step, before.recipe.steps, after.step, after.recipe.steps) == (8, 8, 13, 13)
    assert after.images["count"] == again + new and len(read_fingerprints(after.images)) == again + new
    assert read_sketches(after.images).shape == (again + new, 1024)
    assert any(not torch.equal(before.model[name], value) for name, value in after.model.items())
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12, 13]
    assert "steps: 13" in (run / "recipe.yaml").read_text()
    assert len(recontrast.load(run, "cpu").predict(data / "new")) == 8
    works("report", run, data / "nut", "--out", tmp_path / "report.html", "--device", "cpu")


def test_optimisers_go_on_too(trained, data, tmp_path):
    """As in a run of all steps, whose first eight saw the same images: the moments are kept."""
    run = shutil.copytree(trained, tmp_path / "run")
    before = checkpoints.load(run / "checkpoint.pt")
    works("train", "--extend", run, "--good", data / "new", "--good", data / "nut/train/good", "--steps", 1,
          "--device", "cpu")  # fmt: skip
    after = checkpoints.load(run / "checkpoint.pt")
    counts = [[int(s["state"][0]["step"]) for s in saved.optimisers] for saved in (before, after)]
    assert counts == [[8] * len(before.optimisers), [9] * len(before.optimisers)]


def test_new_images_alone_and_the_default_number_of_steps(trained, data, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    printed = works("train", "--extend", run, "--good", data / "new/000.png", "--good", data / "new/001.png",
                    "--good", data / "new/002.png", "--device", "cpu")  # fmt: skip
    former = len(read_fingerprints(checkpoints.load(trained / "checkpoint.pt").images))
    assert "2 further steps on 3 new images and 0 of the run in" in printed
    assert f"{former} images of the run were not given: what they alone show may be forgotten" in printed
    works("calibrate", run, "--good", data / "nut/test/good", "--false-alarm-rate", 0.3, "--device", "cpu")
    tiny_set(tmp_path / "third", train=8, seed=2)
    detector = recontrast.extend(run, tmp_path / "third/nut/train/good", holdout=0.5, steps=1, device="cpu")
    assert detector.calibration.count == 4 and detector.recipe.steps == 11


def test_run_by_steps_without_fingerprints(trained, data, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    check_extension_without_fingerprints(run, data, "2 further steps on 12 images in")
    message = fails("train", data / "nut", "--resume", run)
    assert "wanted the new and former training images that the run was started with, got 10" in message


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("where", ["step", "save"])
def test_failure_leaves_the_run_as_it_was(trained, data, monkeypatch, error, where, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}

    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(*((checkpoints, "save") if where == "save" else (trainer_module, "train_step")), fail)
    result = call("train", "--extend", run, "--good", data / "new", "--device", "cpu")
    assert result.exit_code == (130 if error is KeyboardInterrupt else 2) and "Traceback" not in result.output
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_bad_steps(trained, fitted, data, tmp_path):
    for run, steps, message in [
        (trained, 0, "steps: wanted at least 1, got 0"),
        (fitted, 3, "steps: wanted none for architecture 'patchcore', which is fitted in one pass, got 3"),
    ]:
        assert message in fails("train", "--extend", run, "--good", data / "new", "--steps", steps)
    run = shutil.copytree(trained, tmp_path / "run")
    saved = checkpoints.load(run / "checkpoint.pt")
    checkpoints.save(run / "checkpoint.pt", replace(saved, recipe=saved.recipe.replace(steps=20)))
    message = fails("train", "--extend", run, "--good", data / "new")
    assert "wanted a finished run, got one after 8 of 20 steps: continue it with --resume" in message


def test_classes_are_drawn_equally_often(data, tmp_path, monkeypatch):
    tiny_set(tmp_path / "set", "bolt", train=3, seed=3)
    shutil.copytree(data / "nut", tmp_path / "set/nut")
    run, folders = tmp_path / "run", [tmp_path / "set" / name / "train/good" for name in ("nut", "bolt")]
    works("train", tmp_path / "set", "--category", "all", *SMALL, "--steps", 2, "--holdout", 0, "--out", run,
          "--sampling", "classes")  # fmt: skip
    seen, list_classes = [], trainer_module.list_classes
    monkeypatch.setattr(trainer_module, "list_classes", lambda opened: seen.append(list_classes(opened)) or seen[-1])
    good = ("--good", folders[0], "--good", folders[1], "--good", data / "new/000.png", "--steps", 1)
    works("train", "--extend", run, *good, "--device", "cpu")
    assert np.bincount(seen[0]).tolist() == [12, 3, 1]
    for name in "ab":
        tiny_set(tmp_path / name, train=2, seed=ord(name))
        shutil.move(tmp_path / name / "nut/train/good", tmp_path / name / "more")
    good = ("--good", tmp_path / "a/more", "--good", tmp_path / "b/more")
    before = (run / "checkpoint.pt").read_bytes()
    message = fails("train", "--extend", run, *good)
    assert "--good: wanted the class of each image, since the run draws classes equally often" in message
    assert f"got 4 whose folder or list does not name it alone (first: {tmp_path / 'a/more/000.png'})" in message
    assert (run / "checkpoint.pt").read_bytes() == before
    with pytest.raises(ValueError, match="good: wanted the class of each image"):
        extend_module.extend(run / "checkpoint.pt", sorted((tmp_path / "a/more").iterdir()), device="cpu")
