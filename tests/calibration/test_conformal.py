import math

import numpy as np
import pytest
import torch

from recontrast import checkpoint as checkpoints
from recontrast.calibration.conformal import (
    Calibration,
    allowed_false_alarms,
    calibrate_maps,
    conformal_threshold,
    describe_promise,
    false_alarm_interval,
)
from recontrast.calibration.score_drift import measure_score_drift
from recontrast.checkpoint import digest
from recontrast.inference.calibrate import calibrate
from recontrast.recipes.recipe import Recipe
from recontrast.training.train import build_model

RECIPE = Recipe(backbone="test_resnet", weights="random", size=64, encoder_bn="eval")


def build_calibration(scores, rate=0.1, **changes):
    ordered = tuple(sorted(map(float, scores)))
    fields = {"pixel_threshold": 1.0, "pixel_rate": 0.1, "pixel_guarantee": True, "source": "here", "weights": "w"}
    return Calibration(ordered, rate, conformal_threshold(ordered, rate), **{**fields, **changes})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(RECIPE, "tile").eval()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)


@pytest.mark.parametrize("count", [1, 9, 57, 99])
@pytest.mark.parametrize("rate", [0.01, 0.05, 0.29, 0.5, 0.9])
def test_decisions_follow_from_the_p_values(count, rate):
    random = np.random.default_rng(count)
    scores = random.integers(0, 40, count) / 4  # ties
    if rate * (count + 1) < 1 - 1e-9:
        with pytest.raises(ValueError, match=rf"the lowest that {count} calibration images can promise"):
            build_calibration(scores, rate)
        return
    calibration = build_calibration(scores, rate)
    new = random.integers(-2, 44, 200) / 4
    p = np.array([(1 + sum(c >= s for c in scores)) / (count + 1) for s in new])
    np.testing.assert_allclose(calibration.p_values(new), p, rtol=1e-15)
    np.testing.assert_array_equal(calibration.is_defect(new), p <= rate + 1e-12)
    np.testing.assert_array_equal(calibration.is_defect(new), new > calibration.threshold)
    assert calibration.p_values(new).dtype == np.float64
    assert calibration.is_defect([math.nan, math.inf]).all()


def test_false_alarm_rates_are_beta_distributed():
    random = np.random.default_rng(0)
    n, rate, rates = 59, 0.05, []
    for _ in range(2000):
        sample = random.normal(size=n)
        limit = build_calibration(sample, rate).threshold
        rates.append(0.5 * math.erfc(limit / math.sqrt(2)))  # of all new images
    rates = np.array(rates)
    assert np.mean(rates) == pytest.approx(3 / 60, abs=4 * np.std(rates) / math.sqrt(len(rates)))
    low, high = false_alarm_interval(n, rate)
    assert np.mean((rates > low) & (rates < high)) == pytest.approx(0.9, abs=0.03)
    assert np.mean(rates < low) == pytest.approx(0.05, abs=0.02)


def test_lowest_possible_rates():
    assert (
        allowed_false_alarms(99, 0.01) == 1
        and allowed_false_alarms(99, 0.29) == 29
        and allowed_false_alarms(100, 0.01) == 1
    )
    with pytest.raises(
        ValueError, match=r"0\.0101, the lowest that 98 calibration images can promise, got 0\.01, which needs 99"
    ):
        allowed_false_alarms(98, 0.01)
    for rate in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="wanted a share above 0 and below 1"):
            allowed_false_alarms(99, rate)


def test_another_rate():
    calibration = build_calibration(range(99), 0.01)
    assert (
        calibration.threshold == 98
        and calibration.with_rate(0.1).threshold == 89
        and calibration.with_rate(0.1).rate == 0.1
    )
    with pytest.raises(ValueError, match=r"got 0\.001, which needs 999 good images"):
        calibration.with_rate(0.001)


def maps(count, seed=0):
    return np.random.default_rng(seed).random((count, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_pixel_threshold_is_the_smallest_that_controls_the_risk(rate):
    count, all_maps = 99, maps(99)
    batches = [(part, part.max((1, 2))) for part in np.array_split(all_maps, 7)]
    calibration = calibrate_maps(iter(batches), count, rate=0.1, pixel_rate=rate, source="", weights="")
    candidates = np.unique(all_maps)

    def risk(t):
        return count / (count + 1) * np.mean(all_maps > t) + 1 / (count + 1)

    smallest = next(t for t in candidates if risk(t) <= rate + 1e-12)
    assert calibration.pixel_guarantee and calibration.pixel_threshold == smallest
    np.testing.assert_array_equal(calibration.scores, np.sort(all_maps.max((1, 2))))


def test_pixel_threshold_without_guarantee():
    all_maps = maps(20)
    batch = [(all_maps, all_maps.max((1, 2)))]
    calibration = calibrate_maps(batch, 20, rate=0.1, pixel_rate=0.01, source="", weights="")
    assert not calibration.pixel_guarantee
    assert (
        np.mean(all_maps > calibration.pixel_threshold)
        <= 0.01
        < np.mean(all_maps >= calibration.pixel_threshold) + 1e-3
    )
    assert (
        "no guarantee" in describe_promise(calibration)[-1]
        and "needs 99 good images" in describe_promise(calibration)[-1]
    )
    with pytest.raises(ValueError, match=r"pixel rate: .* got 1"):
        calibrate_maps(batch, 20, rate=0.1, pixel_rate=1.0, source="", weights="")


def test_scores_that_are_not_finite_raise():
    all_maps = maps(20)
    options = {"rate": 0.1, "pixel_rate": 0.1, "source": "", "weights": ""}
    scores = all_maps.max((1, 2))
    scores[3] = np.nan
    with pytest.raises(ValueError, match=r"^image 3 \(counted from 0\): wanted a finite anomaly map of a good image"):
        calibrate_maps([(all_maps, scores)], 20, **options)
    all_maps[17, 0, 0] = -np.inf
    batches = [(all_maps[:16], all_maps[:16].max((1, 2))), (all_maps[16:], all_maps[16:].max((1, 2)))]
    with pytest.raises(ValueError, match=r"^17\.png: wanted a finite anomaly map of a good image"):
        calibrate_maps(batches, 20, names=[f"{index}.png" for index in range(20)], **options)


def test_maps_of_two_sizes_or_too_few():
    batch, wide = (maps(10), np.ones(10)), (np.ones((10, 8, 9), np.float32), np.ones(10))
    calibration = calibrate_maps([batch, wide], 20, rate=0.1, pixel_rate=0.1, source="", weights="")
    assert calibration.count == 20 and calibration.pixel_threshold is None and not calibration.pixel_guarantee
    with pytest.raises(ValueError, match="wanted those of 20 images, got 10"):
        calibrate_maps([batch], 20, rate=0.1, pixel_rate=0.1, source="", weights="")


def test_description_names_the_promise_and_the_spread():
    text = " ".join(describe_promise(build_calibration(range(99), 0.01)))
    low, high = false_alarm_interval(99, 0.01)
    assert "1/100" in text and "on average over calibration sets" in text and "Beta(1, 99)" in text
    assert f"{low:.4g}" in text and f"{high:.4g}" in text
    assert (low, high) == pytest.approx((1 - 0.95 ** (1 / 99), 1 - 0.05 ** (1 / 99)))


def test_serialisation_round_trip():
    calibration = build_calibration(np.random.default_rng(0).random(30))
    assert Calibration.from_dict(calibration.to_dict()) == calibration
    for wrong in ({}, {**calibration.to_dict(), "more": 1}, [1], {**calibration.to_dict(), "threshold": 0.0}):
        with pytest.raises(ValueError, match="calibration: "):
            Calibration.from_dict(wrong)
    with pytest.raises(ValueError, match="ascending"):
        Calibration.from_dict({**calibration.to_dict(), "scores": [2.0, 1.0] * 10})


def save(path, model, calibration=None):
    about = {"size": [64, 64], "crop": None, "mean": list(model.mean), "std": list(model.std)}
    images = {"count": 1, "digest": ""}
    content = checkpoints.Checkpoint(1, "tile", RECIPE, model.config, about, images, model.state_dict())
    checkpoints.save(path, content)
    return path if calibration is None else checkpoints.write_calibration(path, calibration)


def test_checkpoint_stores_the_calibration(model, images, tmp_path):
    calibration = calibrate(model, RECIPE, images, rate=0.1, source="noise", batch=5)
    assert calibration.count == 12 and calibration.weights == digest(model.state_dict(), RECIPE)
    path = save(tmp_path / "checkpoint.pt", model, calibration)
    assert checkpoints.load(path).calibration == calibration
    assert checkpoints.load_model(path, "cpu")[2].calibration == calibration


def test_calibration_of_other_weights_raises(model, images, tmp_path):
    calibration = calibrate(model, RECIPE, images, rate=0.1)
    path = save(tmp_path / "checkpoint.pt", model)
    other = dict(model.state_dict())
    name = next(key for key, value in other.items() if value.dtype == torch.float32)
    other[name] = other[name] + 1e-6
    for wrong in (digest(other, RECIPE), digest(model.state_dict(), RECIPE.replace(views="trained"))):
        with pytest.raises(ValueError, match="wanted a calibration of these weights and this recipe"):
            checkpoints.write_calibration(path, Calibration(**{**calibration.__dict__, "weights": wrong}))
    assert checkpoints.load(path).calibration is None


def test_digest_names_the_views_of_parts_and_stays_that_of_single_images():
    weights = {"a": torch.arange(3.0)}
    for recipe, former in (
        (Recipe(), "1346a640d212f0c1b5cbf1b4257e707f94626909f501a2b3710e48939f3df571"),
        (Recipe(window=(0, 4095)), "17b47172e0077e067fc335071c5f9cdb7b7d8a80b9f8dae8f2bed26fdc47015a"),
    ):
        assert digest(weights, recipe) == former  # before parts had views
    views = Recipe(views_from="_(a|b)_", view_names=("a", "b"))
    others = [views.replace(view_map="mean"), views.replace(view_names=("b", "a")), views.replace(views_from="-(a|b)-")]
    assert len({digest(weights, recipe) for recipe in (Recipe(), views, *others)}) == 5


def test_old_checkpoints_load(model, tmp_path):
    path = save(tmp_path / "checkpoint.pt", model)
    content = torch.load(path, weights_only=True)
    del content["calibration"]
    torch.save(content, path)
    assert checkpoints.load_model(path, "cpu")[2].calibration is None
    torch.save({**content, "calibration": {"scores": 1}}, path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: calibration: wanted the fields"):
        checkpoints.load(path)


def test_warnings_on_a_shift_and_without_one():
    random = np.random.default_rng(0)
    unchanged = [
        measure_score_drift(build_calibration(random.normal(size=50)), random.normal(size=40)).is_significant
        for _ in range(300)
    ]
    assert np.mean(unchanged) <= 0.02
    shifted_mean = [
        measure_score_drift(build_calibration(random.normal(size=50)), random.normal(1.5, 1, 40)).is_significant
        for _ in range(50)
    ]
    wider = [
        measure_score_drift(build_calibration(random.normal(size=90)), random.normal(0, 4, 90)).is_significant
        for _ in range(50)
    ]
    assert all(shifted_mean) and np.mean(wider) > 0.9
    # Six of sixty scores exceed all 96: probability C(150, 54) / C(156, 60). The other scores are unchanged.
    bulk = np.linspace(0.5, 94.5, 54)
    tail = measure_score_drift(build_calibration(range(96)).with_rate(1 / 97), np.concatenate([bulk, np.full(6, 96.0)]))
    exact = math.comb(150, 54) / math.comb(156, 60)
    assert tail.is_significant and tail.alarms == 6 and tail.p_value == pytest.approx(3 * exact)
    assert not measure_score_drift(build_calibration(range(96)).with_rate(1 / 97), bulk).is_significant
    shifted = measure_score_drift(build_calibration(range(50)), np.arange(50, 90))
    assert "far from uniform" in shifted.describe() and shifted.distance == 1 and shifted.alarms == 40
    for wrong in ([], [math.nan]):
        with pytest.raises(ValueError, match="check: scores: wanted finite scores"):
            measure_score_drift(build_calibration(range(50)), wrong)
