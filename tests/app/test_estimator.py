"""`ReContrastDetector`: scikit-learn's contract, as far as images have one, and that it is the detector of the rest."""

import pickle
from dataclasses import replace
from io import BytesIO

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone, is_outlier_detector
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks
from tiny import tiny_set

from recontrast import Recipe, ReContrastDetector, checkpoint
from recontrast.app.estimator_fit import split_images
from recontrast.app.prediction.predict import predict
from recontrast.data.listing import DataWarning
from recontrast.training.train import train

RECIPE = Recipe(backbone="test_resnet", weights="random", steps=2, batch=4, size=32, seed=1)


def detector(**changes):
    return ReContrastDetector(**{"recipe": RECIPE, "false_alarm_rate": 0.25, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return tiny_set(tmp_path_factory.mktemp("data"), train=12)


@pytest.fixture(scope="module")
def good(samples):
    return [sample.path for sample in samples if sample.split == "train"]


@pytest.fixture(scope="module")
def tests(samples):
    return [sample.path for sample in samples if sample.split == "test"]


@pytest.fixture(scope="module")
def fitted(good):
    return detector().fit(good)


# ---- scores and decisions ----------------------------------------------------------------------


def test_signs_and_shapes(fitted, tests):
    scores, margin, said = (getattr(fitted, name)(tests) for name in ("score_samples", "decision_function", "predict"))
    maps, p = fitted.anomaly_maps(tests), fitted.p_values(tests)
    assert maps.shape == (len(tests), 32, 32) and maps.dtype == np.float32
    assert scores.shape == p.shape == (len(tests),) and scores.dtype == margin.dtype == p.dtype == np.float64
    assert np.array_equal(scores, -maps.max((1, 2)))  # the recipe's score is the maximum
    assert np.array_equal(margin, scores - fitted.offset_)
    assert np.array_equal(said, np.where(margin < 0, -1, 1)) and np.array_equal(said == -1, p <= 0.25)
    assert is_outlier_detector(fitted)


def test_the_promise(fitted, good):
    """3 of 12 held out: a rate of 1/4 is the largest of their scores, and none of the three is a false alarm."""
    held = [good[place] for place in fitted.held_out_]
    assert len(held) == 3 and len(fitted.losses_) == 2
    assert fitted.calibration_.scores == tuple(sorted(-fitted.score_samples(held)))
    assert fitted.offset_ == fitted.score_samples(held).min()
    assert (fitted.predict(held) == 1).all() and sorted(fitted.p_values(held)) == [0.5, 0.75, 1.0]
    assert fitted.calibration_.source == "3 of 12 images given to fit"


def test_groups_stay_on_one_side(good, tests):
    """12 images of 4 parts; one part is held out, and the largest of its three scores is the threshold."""
    parts = np.repeat(["a", "b", "c", "d"], 3)
    found = detector(false_alarm_rate=0.5).fit(good, groups=parts)
    assert len(found.held_out_) == 3 and len(set(parts[found.held_out_])) == 1
    held = -found.score_samples([good[place] for place in found.held_out_])
    assert found.calibration_.scores == (max(held),) and found.calibration_.count == 1
    single = detector(false_alarm_rate=0.25).fit(good, groups=np.arange(12))
    assert np.array_equal(single.score_samples(tests), detector().fit(good).score_samples(tests))
    with pytest.raises(ValueError, match=r"false_alarm_rate: for a rate of 0\.05 wanted at least 19 images held out"):
        detector(false_alarm_rate=0.05).fit(good, groups=parts)
    for groups, message in (
        ([[1]] * 12, "fit: groups: wanted a name or number for each image, got an array of shape"),
        ([None] * 12, "fit: groups: wanted a name or number for each image, got None or NaN"),
        ([np.nan] * 12, "got None or NaN"),
        ([1, 2], "inconsistent numbers of samples"),
    ):
        with pytest.raises(ValueError, match=message):
            detector().fit(good, groups=groups)


def test_groups_of_the_good_images_count(good):
    """Defects are left out with their groups."""
    labels = np.array([1] * 8 + [-1] * 4)
    found = detector(false_alarm_rate=0.5).fit(good, labels, groups=np.repeat([0, 1, 2], 4))
    assert set(found.held_out_) in ({0, 1, 2, 3}, {4, 5, 6, 7})


def test_region_of_interest(good, tests, tmp_path):
    mask = np.zeros((64, 64), bool)
    mask[:, :32] = True
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "roi.png")
    found = detector(roi=mask).fit(good)
    maps = found.anomaly_maps(tests)
    assert maps[:, :, :16].all() and not maps[:, :, 16:].any()
    by_file = clone(found).set_params(roi=str(tmp_path / "roi.png")).fit(good)
    assert np.array_equal(by_file.score_samples(tests), found.score_samples(tests))
    changed = [np.asarray(Image.open(path)).copy() for path in tests]
    assert found.recipe_.roi == by_file.recipe_.roi
    found.save(tmp_path / "detector.pt")
    again = ReContrastDetector.from_checkpoint(tmp_path / "detector.pt", device="cpu")
    assert np.array_equal(again.score_samples(changed), found.score_samples(tests))
    for images in ([np.zeros((64, 90, 3), np.uint8)], [Image.new("RGB", (90, 64))]):
        with pytest.raises(ValueError, match=r"roi: wanted a mask of the size of image 0"):
            found.predict(images)
    with pytest.raises(ValueError, match=r"roi: wanted a mask \(H, W\) of bool"):
        detector(roi=np.zeros((4, 4))).fit(good)
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask).save(tmp_path / "masks/000.png")
    with pytest.raises(ValueError, match="wanted one region of interest for all images for the estimator"):
        detector(roi=tmp_path / "masks").fit(good)


def test_without_a_promise(good, tests):
    found = detector(false_alarm_rate=None).fit(good[:5])
    assert found.calibration_ is None and np.isnan(found.offset_) and not len(found.held_out_)
    assert found.score_samples(tests).shape == (len(tests),)
    for method in ("predict", "decision_function", "p_values"):
        with pytest.raises(ValueError, match=rf"{method}: wanted a detector with a calibration"):
            getattr(found, method)(tests)


def test_it_is_the_run_of_train(samples, good, tests):
    """All images used: the weights are those that the command line would train."""
    found = detector(false_alarm_rate=None).fit(good)
    ours, theirs = found.model_.state_dict(), train(RECIPE, samples, category="images", device="cpu").model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- what X may be -----------------------------------------------------------------------------


def test_paths_pictures_and_arrays_are_one(fitted, tests):
    pictures = [Image.open(path) for path in tests]
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    wanted = fitted.score_samples(tests)
    for same in (list(map(str, tests)), np.array(list(map(str, tests))), pictures, pixels, pixels / 255.0,
                 (pixels / 255).astype(np.float32), [pictures[0], tests[1], *pixels[2:]]):  # fmt: skip
        assert np.array_equal(fitted.score_samples(same), wanted)


def test_fit_on_arrays_is_fit_on_files(fitted, good, tests):
    pixels = np.stack([np.asarray(Image.open(path)) for path in good])
    assert np.array_equal(detector().fit(pixels).score_samples(tests), fitted.score_samples(tests))


def test_every_kind_of_picture_scores_as_its_file(fitted, tests, tmp_path):
    """EXIF rotation, alpha, palettes with a transparent colour, 16 bits and grey, of different sizes."""
    picture = Image.open(tests[-1]).resize((60, 44))
    turned = picture.getexif()
    turned[0x0112] = 6
    levels = np.asarray(picture.convert("L")).astype(np.uint32) * 257 + 3
    deep = Image.fromarray(np.minimum(levels, 65535).astype(np.uint16))
    picture.save(tmp_path / "turned.jpg", exif=turned)
    picture.convert("RGBA").save(tmp_path / "alpha.png")
    picture.quantize(16).save(tmp_path / "palette.png", transparency=3)
    picture.convert("L").save(tmp_path / "grey.png")
    deep.save(tmp_path / "deep.png")
    picture.save(tmp_path / "colour.tiff")
    paths = sorted(tmp_path.iterdir())
    pictures = [Image.open(path) for path in paths]
    wanted = fitted.score_samples(paths)
    assert len(set(wanted)) == 4  # alpha is dropped, and 16 bits are those 8
    assert np.array_equal(fitted.score_samples(pictures), wanted)
    assert np.array_equal(fitted.score_samples(pictures), wanted)  # the caller's pictures were left as they were
    assert pictures[paths.index(tmp_path / "palette.png")].info["transparency"] == 3
    grey = np.asarray(Image.open(tmp_path / "grey.png"))
    assert np.array_equal(
        fitted.score_samples(np.stack([grey, grey])), [wanted[paths.index(tmp_path / "grey.png")]] * 2
    )
    for picture in pictures:
        picture.close()


@pytest.mark.parametrize("X, sentence", [
    ("a.png", "got one path, 'a.png': put it into a list"),
    (Image.new("RGB", (9, 9)), "got one PIL image: put it into a list"),
    ([], "got an empty one"),
    (3, "got int"),
    ([b"a.png"], "got bytes at position 0"),
    (np.zeros((4, 6)), r"got an array \(4, 6\) of float64"),
    (np.zeros((2, 8, 8, 4), np.uint8), r"got an array \(2, 8, 8, 4\) of uint8: pass images\[\.\.\., :3\]"),
    (np.zeros((2, 8, 8, 3), np.int64), r"wanted uint8, or floats in \[0, 1\], got int64"),
    (np.full((1, 8, 8, 3), 200.0), r"wanted floats in \[0, 1\] \(divide by 255, or pass uint8\), got 200 to 200"),
    (np.full((1, 8, 8, 3), np.nan), "got NaN or infinity"),
    (["missing.png"], "missing.png: wanted an image, got no such file"),
])  # fmt: skip
def test_refuses_what_is_no_image(fitted, X, sentence):
    for call in (fitted.score_samples, detector(false_alarm_rate=None).fit):
        with pytest.raises((ValueError, OSError), match=sentence) as error:
            call(X)
        assert "\n" not in str(error.value)


# ---- parameters --------------------------------------------------------------------------------


@pytest.mark.parametrize("changes, sentence", [
    ({"false_alarm_rate": 0.01}, "at least 99 images .* half of them are left .* got 99 held out of 12"),
    ({"false_alarm_rate": 1.0}, "false_alarm_rate: wanted None or a share above 0 and below 1, got 1.0"),
    ({"holdout": 2}, "at least 3 images held out while one is left for training, got 2 held out of 12"),
    ({"holdout": 12}, "got 12 held out of 12"),
    ({"holdout": 1.5}, "holdout: wanted None, a number of images or a share in"),
    ({"recipe": "mvtc"}, "mvtc"),
    ({"recipe": 3}, "recipe: wanted a Recipe, a name or a YAML file, got int"),
    ({"steps": 0}, "steps: wanted a whole number of at least 1"),
    ({"random_state": -1}, "seed: wanted a whole number"),
    ({"size": 33}, "multiples of"),
    ({"recipe": RECIPE.replace(tile=32)}, "recipe: wanted a detector of whole images, got one of tiles"),
    ({"device": "tpu0"}, "device: wanted"),
])  # fmt: skip
def test_refuses_parameters_in_fit(good, changes, sentence):
    with pytest.raises((ValueError, OSError), match=sentence) as error:
        detector(**changes).fit(good)
    assert "\n" not in str(error.value)


def test_holdout():
    from recontrast.training.holdout import resolve_holdout_count

    asked = ((0.05, None), (0.2, None), (0.2, 9), (0.2, 0.5), (None, 0.5))
    assert [resolve_holdout_count(60, *these) for these in asked] == [19, 12, 9, 30, 0]


def test_parameters_take_the_place_of_the_recipes(good):
    found = detector(steps=np.int64(2), size=64, batch=3, random_state=np.int64(5), encoder_lr=1e-4).fit(good)
    assert found.recipe_ == RECIPE.replace(steps=2, size=64, batch=3, seed=5, encoder_lr=1e-4)
    assert found.anomaly_maps(good[:1]).shape == (1, 64, 64)


def test_labels(good, tests):
    """With labels only the good images are used; without, all are."""
    X, y = [*tests[3:], *good], [-1] * 3 + [1] * 12
    found = detector().fit(X, y)
    assert found.held_out_.min() >= 3
    assert np.array_equal(found.score_samples(tests), detector().fit(good).score_samples(tests))
    for wrong, sentence in (([0] * 15, r"got \[0\]"), ([-1] * 15, "at least one image"), ([1] * 3, "inconsistent")):
        with pytest.raises(ValueError, match=sentence):
            detector().fit(X, wrong)


# ---- scikit-learn's machinery ------------------------------------------------------------------


def test_equal_seeds_and_the_global_state(fitted, good, tests):
    torch.manual_seed(7)
    np.random.seed(7)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = detector().fit(good)
    other = detector(random_state=2).fit(good)
    pickle.loads(pickle.dumps(again))
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpys)
    assert np.array_equal(again.anomaly_maps(tests), fitted.anomaly_maps(tests))
    assert np.array_equal(again.held_out_, fitted.held_out_) and again.offset_ == fitted.offset_
    assert not np.array_equal(other.score_samples(tests), fitted.score_samples(tests))


def test_clone_and_parameters(fitted):
    fresh = clone(fitted)
    assert fresh.get_params() == fitted.get_params() and not hasattr(fresh, "model_")
    assert fresh.set_params(steps=9, false_alarm_rate=0.1).get_params()["steps"] == 9
    with pytest.raises(NotFittedError):
        fresh.predict([])
    with pytest.raises(NotFittedError):
        fresh.save("nowhere.pt")


def test_pickle_and_joblib(fitted, tests, tmp_path):
    file = BytesIO()
    joblib.dump(fitted, file)
    file.seek(0)
    for found in (pickle.loads(pickle.dumps(fitted)), joblib.load(file)):
        assert found.get_params() == fitted.get_params()
        assert np.array_equal(found.anomaly_maps(tests), fitted.anomaly_maps(tests))
        assert np.array_equal(found.predict(tests), fitted.predict(tests)) and found.offset_ == fitted.offset_
    unfitted = pickle.loads(pickle.dumps(clone(fitted)))
    assert unfitted.get_params() == fitted.get_params() and not hasattr(unfitted, "model_")


def test_pickle_of_an_earlier_version(fitted, tests):
    """Parameters that it did not have take their defaults."""
    for whole in (fitted, clone(fitted)):
        state = dict(whole.__getstate__())
        for name in ("roi", "encoder_lr"):
            del state[name]
        found = ReContrastDetector.__new__(ReContrastDetector)
        found.__setstate__(state)
        assert repr(found) == repr(whole) and clone(found).get_params() == found.get_params() == whole.get_params()
    state = dict(detector(encoder_lr=0.1, false_alarm_rate=0.2).__getstate__())
    del state["false_alarm_rate"]
    found = ReContrastDetector.__new__(ReContrastDetector)
    found.__setstate__(state)
    assert found.false_alarm_rate == 0.05 and found.encoder_lr == 0.1


def test_a_pickle_needs_no_device_of_its_own(fitted, tests):
    """One that was told a device that this machine lacks is read, and says so when it is used."""
    found = pickle.loads(pickle.dumps(fitted))
    found.set_params(device="cuda:77")
    found = pickle.loads(pickle.dumps(found))
    with pytest.raises(ValueError, match="device: wanted one of"):
        found.predict(tests)
    assert np.array_equal(found.set_params(device="cpu").predict(tests), fitted.predict(tests))


def test_pipeline(fitted, good, tests):
    mirrored = make_pipeline(FunctionTransformer(_mirrored), detector()).fit(good)
    twice = [Image.fromarray(np.asarray(Image.open(path))[:, ::-1]) for path in tests]
    assert np.array_equal(mirrored.predict(tests), mirrored[-1].predict(twice))
    assert np.array_equal(mirrored.decision_function(tests), mirrored[-1].decision_function(twice))
    assert pickle.loads(pickle.dumps(mirrored)).score_samples(tests).tolist() == mirrored.score_samples(tests).tolist()


def _mirrored(paths):
    return [Image.fromarray(np.asarray(Image.open(path))[:, ::-1]) for path in paths]


def test_grid_search(good, tests):
    X, y = [*good, *tests], [1] * 15 + [-1] * 3
    grid = {"recipe": [RECIPE, RECIPE.replace(steps=1)]}
    found = GridSearchCV(detector(), grid, scoring="roc_auc", cv=StratifiedKFold(3), error_score="raise").fit(X, y)
    scores = found.cv_results_["mean_test_score"]
    assert scores.shape == (2,) and ((scores >= 0) & (scores <= 1)).all()
    assert set(found.predict(tests)) <= {-1, 1} and found.best_estimator_.held_out_.max() < 15
    assert 0 <= found.score(X, y) <= 1


# The checks of scikit-learn that hold for images as for tables. The others feed tables of numbers, (n, features):
# what is checked of them there, tests above check with images (pickling, not-fitted, sample order, dtype, NaN, empty).
@pytest.mark.parametrize("check", [
    "check_estimator_cloneable", "check_estimator_tags_renamed", "check_valid_tag_types", "check_estimator_repr",
    "check_no_attributes_set_in_init", "check_parameters_default_constructible", "check_get_params_invariance",
    "check_set_params", "check_mixin_order",
])  # fmt: skip
def test_checks_of_scikit_learn(check):
    getattr(estimator_checks, check)("ReContrastDetector", detector())


def test_batches_do_not_matter_nor_does_the_order(fitted, tests):
    """`check_methods_subset_invariance` and `check_methods_sample_order_invariance`, with images."""
    whole = fitted.score_samples(tests)
    one_by_one = np.concatenate([fitted.score_samples([path]) for path in tests])
    assert np.allclose(one_by_one, whole, rtol=1e-5, atol=1e-6)
    assert np.allclose(fitted.score_samples(tests[::-1])[::-1], whole, rtol=1e-5, atol=1e-6)
    assert not hasattr(fitted, "n_features_in_")  # pixels of any size have no number of features


# ---- files -------------------------------------------------------------------------------------


def test_saved_and_predicted_by_the_command(fitted, tests, tmp_path):
    path = fitted.save(tmp_path / "detector.pt")
    report = predict(path, tests, tmp_path / "out", overlays=False, device="cpu")
    rows = {row.path: row for row in report.predictions}
    scores = -fitted.score_samples(tests)
    np.testing.assert_allclose([rows[str(path)].score for path in tests], scores, rtol=1e-5)  # the command folds
    found = ReContrastDetector.from_checkpoint(path, device="cpu")
    assert np.array_equal(found.anomaly_maps(tests), fitted.anomaly_maps(tests))
    assert np.array_equal(found.predict(tests), fitted.predict(tests))
    assert found.get_params()["recipe"] == RECIPE and found.false_alarm_rate == 0.25


def test_from_a_run(samples, tests, tmp_path):
    """A run without calibration gives scores; its optimisers are not kept."""
    result = train(RECIPE, samples, out=tmp_path / "run", device="cpu")
    found = ReContrastDetector.from_checkpoint(result.checkpoint, device="cpu")
    assert found.false_alarm_rate is None and found.score_samples(tests).shape == (len(tests),)
    small = found.save(tmp_path / "small.pt")
    assert small.stat().st_size < 0.7 * result.checkpoint.stat().st_size
    with pytest.raises(ValueError, match="got a detector alone, which has no training state"):
        train(RECIPE, samples, resume=small, device="cpu")
    with pytest.raises(FileNotFoundError, match="wanted a checkpoint file"):
        ReContrastDetector.from_checkpoint(tmp_path / "none.pt")
    assert checkpoint.load(small).category == "nut"


def test_refuses_checkpoints_of_tiles_and_of_others_calibration(fitted, samples, tests, tmp_path):
    tiled = train(RECIPE.replace(tile=32), samples, out=tmp_path / "tiled", device="cpu").checkpoint
    with pytest.raises(ValueError, match=rf"{tiled}: wanted a detector of whole images, got one of tiles"):
        ReContrastDetector.from_checkpoint(tiled)
    state = checkpoint.load(fitted.save(tmp_path / "ours.pt"))
    other = checkpoint.save(tmp_path / "other.pt", replace(state, recipe=RECIPE.replace(score="mean")))
    with pytest.raises(ValueError, match="wanted a calibration of these weights and this recipe"):
        ReContrastDetector.from_checkpoint(other)


def test_copies_count_once_and_stay_together(good):
    pixels = np.stack([np.asarray(Image.open(path)) for path in good])
    images = [*good, *pixels[:5], *(Image.open(path) for path in good[:2])]
    with pytest.warns(DataWarning, match=r"^fit: 19 images are 12 different images"):
        copied = detector(false_alarm_rate=0.3).fit(images)
    owners = [*range(12), *range(5), *range(2)]
    assert copied.calibration_.count == len({owners[index] for index in copied.held_out_}) == len(copied.held_out_) == 3
    split = split_images(np.stack([pixels[owner] for owner in owners])[:, ::2, ::2], None, None, 1)
    assert len(split.training) == 19 and not len(split.held_out)
    with pytest.warns(DataWarning), pytest.raises(ValueError, match="got 1 held out of 1 good images"):
        detector(false_alarm_rate=0.5).fit([good[0]] * 19)
