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

RECIPE = Recipe(backbone="resnet10t", weights="random", size=64, encoder_bn="eval")


def made(scores, rate=0.1, **changes):
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
def test_decisions_are_those_of_the_p_values(count, rate):
    random = np.random.default_rng(count)
    scores = random.integers(0, 40, count) / 4  # ties
    if rate * (count + 1) < 1 - 1e-9:
        with pytest.raises(ValueError, match=rf"with {count} calibration images"):
            made(scores, rate)
        return
    found = made(scores, rate)
    new = random.integers(-2, 44, 200) / 4
    p = np.array([(1 + sum(c >= s for c in scores)) / (count + 1) for s in new])
    np.testing.assert_allclose(found.p_values(new), p, rtol=1e-15)
    np.testing.assert_array_equal(found.is_defect(new), p <= rate + 1e-12)
    np.testing.assert_array_equal(found.is_defect(new), new > found.threshold)
    assert found.p_values(new).dtype == np.float64
    assert found.is_defect([math.nan, math.inf]).all()


def test_false_alarms_keep_the_promise_and_spread_as_beta_says():
    random = np.random.default_rng(0)
    n, rate, found = 59, 0.05, []
    for _ in range(2000):
        sample = random.normal(size=n)
        limit = made(sample, rate).threshold
        found.append(0.5 * math.erfc(limit / math.sqrt(2)))  # of all new images
    found = np.array(found)
    assert np.mean(found) == pytest.approx(3 / 60, abs=4 * np.std(found) / math.sqrt(len(found)))
    low, high = false_alarm_interval(n, rate)
    assert np.mean((found > low) & (found < high)) == pytest.approx(0.9, abs=0.03)
    assert np.mean(found < low) == pytest.approx(0.05, abs=0.02)


def test_smallest_rates():
    assert (
        allowed_false_alarms(99, 0.01) == 1
        and allowed_false_alarms(99, 0.29) == 29
        and allowed_false_alarms(100, 0.01) == 1
    )
    with pytest.raises(ValueError, match=r"with 98 calibration images 0\.0101, got 0\.01, which needs 99 good images"):
        allowed_false_alarms(98, 0.01)
    for rate in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="wanted a share above 0 and below 1"):
            allowed_false_alarms(99, rate)


def test_another_rate():
    found = made(range(99), 0.01)
    assert found.threshold == 98 and found.with_rate(0.1).threshold == 89 and found.with_rate(0.1).rate == 0.1
    with pytest.raises(ValueError, match=r"got 0\.001, which needs 999 good images"):
        found.with_rate(0.001)


def maps(count, seed=0):
    return np.random.default_rng(seed).random((count, 8, 8)).astype(np.float32)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_pixel_threshold_is_the_smallest_that_controls_the_risk(rate):
    count, found = 99, maps(99)
    batches = [(part, part.max((1, 2))) for part in np.array_split(found, 7)]
    made = calibrate_maps(iter(batches), count, rate=0.1, pixel_rate=rate, source="", weights="")
    candidates = np.unique(found)

    def risk(t):
        return count / (count + 1) * np.mean(found > t) + 1 / (count + 1)

    smallest = next(t for t in candidates if risk(t) <= rate + 1e-12)
    assert made.pixel_guarantee and made.pixel_threshold == smallest
    np.testing.assert_array_equal(made.scores, np.sort(found.max((1, 2))))


def test_pixel_threshold_without_guarantee():
    found = maps(20)
    batch = [(found, found.max((1, 2)))]
    made = calibrate_maps(batch, 20, rate=0.1, pixel_rate=0.01, source="", weights="")
    assert not made.pixel_guarantee
    assert np.mean(found > made.pixel_threshold) <= 0.01 < np.mean(found >= made.pixel_threshold) + 1e-3
    assert "no guarantee" in describe_promise(made)[-1] and "needs 99 good images" in describe_promise(made)[-1]
    with pytest.raises(ValueError, match=r"pixel rate: .* got 1"):
        calibrate_maps(batch, 20, rate=0.1, pixel_rate=1.0, source="", weights="")


def test_scores_that_are_no_numbers():
    found = maps(20)
    with pytest.raises(ValueError, match="scores: wanted finite numbers"):
        calibrate_maps([(found, np.full(20, np.nan))], 20, rate=0.1, pixel_rate=0.1, source="", weights="")


def test_maps_of_two_sizes_or_too_few():
    batch, wide = (maps(10), np.ones(10)), (np.ones((10, 8, 9), np.float32), np.ones(10))
    found = calibrate_maps([batch, wide], 20, rate=0.1, pixel_rate=0.1, source="", weights="")
    assert found.count == 20 and found.pixel_threshold is None and not found.pixel_guarantee
    with pytest.raises(ValueError, match="wanted those of 20 images, got 10"):
        calibrate_maps([batch], 20, rate=0.1, pixel_rate=0.1, source="", weights="")


def test_statement_names_the_promise_and_the_spread():
    text = " ".join(describe_promise(made(range(99), 0.01)))
    low, high = false_alarm_interval(99, 0.01)
    assert "1/100" in text and "on average over calibration sets" in text and "Beta(1, 99)" in text
    assert f"{low:.4g}" in text and f"{high:.4g}" in text
    assert (low, high) == pytest.approx((1 - 0.95 ** (1 / 99), 1 - 0.05 ** (1 / 99)))


def test_plain_values_there_and_back():
    found = made(np.random.default_rng(0).random(30))
    assert Calibration.from_dict(found.to_dict()) == found
    for wrong in ({}, {**found.to_dict(), "more": 1}, [1], {**found.to_dict(), "threshold": 0.0}):
        with pytest.raises(ValueError, match="calibration: "):
            Calibration.from_dict(wrong)
    with pytest.raises(ValueError, match="ascending"):
        Calibration.from_dict({**found.to_dict(), "scores": [2.0, 1.0] * 10})


def save(path, model, calibration=None):
    about = {"size": [64, 64], "crop": None, "mean": list(model.mean), "std": list(model.std)}
    images = {"count": 1, "digest": ""}
    content = checkpoints.Checkpoint(1, "tile", RECIPE, model.config, about, images, model.state_dict())
    checkpoints.save(path, content)
    return path if calibration is None else checkpoints.write_calibration(path, calibration)


def test_checkpoint_keeps_it(model, images, tmp_path):
    found = calibrate(model, RECIPE, images, rate=0.1, source="noise", batch=5)
    assert found.count == 12 and found.weights == digest(model.state_dict(), RECIPE)
    path = save(tmp_path / "checkpoint.pt", model, found)
    assert checkpoints.load(path).calibration == found
    assert checkpoints.load_model(path, "cpu")[2].calibration == found


def test_calibration_of_other_weights_is_refused(model, images, tmp_path):
    found = calibrate(model, RECIPE, images, rate=0.1)
    path = save(tmp_path / "checkpoint.pt", model)
    other = dict(model.state_dict())
    name = next(key for key, value in other.items() if value.dtype == torch.float32)
    other[name] = other[name] + 1e-6
    for wrong in (digest(other, RECIPE), digest(model.state_dict(), RECIPE.replace(views="trained"))):
        with pytest.raises(ValueError, match="wanted a calibration of these weights and this recipe"):
            checkpoints.write_calibration(path, Calibration(**{**found.__dict__, "weights": wrong}))
    assert checkpoints.load(path).calibration is None


def test_old_checkpoints_load(model, tmp_path):
    path = save(tmp_path / "checkpoint.pt", model)
    content = torch.load(path, weights_only=True)
    del content["calibration"]
    torch.save(content, path)
    assert checkpoints.load_model(path, "cpu")[2].calibration is None
    torch.save({**content, "calibration": {"scores": 1}}, path)
    with pytest.raises(ValueError, match=r"checkpoint\.pt: calibration: wanted the fields"):
        checkpoints.load(path)


def test_warning_fires_on_a_shift_and_rests_without_one():
    random = np.random.default_rng(0)
    rests = [
        measure_score_drift(made(random.normal(size=50)), random.normal(size=40)).is_significant for _ in range(300)
    ]
    assert np.mean(rests) <= 0.02
    fires = [
        measure_score_drift(made(random.normal(size=50)), random.normal(1.5, 1, 40)).is_significant for _ in range(50)
    ]
    wider = [
        measure_score_drift(made(random.normal(size=90)), random.normal(0, 4, 90)).is_significant for _ in range(50)
    ]
    assert all(fires) and np.mean(wider) > 0.9
    # Six of sixty above all of 96: by chance in C(150, 54) / C(156, 60) of cases, and the middle is as it was.
    bulk = np.linspace(0.5, 94.5, 54)
    tail = measure_score_drift(made(range(96)).with_rate(1 / 97), np.concatenate([bulk, np.full(6, 96.0)]))
    exact = math.comb(150, 54) / math.comb(156, 60)
    assert tail.is_significant and tail.alarms == 6 and tail.p_value == pytest.approx(3 * exact)
    assert not measure_score_drift(made(range(96)).with_rate(1 / 97), bulk).is_significant
    shifted = measure_score_drift(made(range(50)), np.arange(50, 90))
    assert "far from uniform" in shifted.describe() and shifted.distance == 1 and shifted.alarms == 40
    for wrong in ([], [math.nan]):
        with pytest.raises(ValueError, match="check: scores: wanted finite scores"):
            measure_score_drift(made(range(50)), wrong)
