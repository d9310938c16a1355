from dataclasses import astuple

import numpy as np
import pytest
import sklearn.metrics as sk
import upstream
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from metric_cases import small_cases, some_maps
from scipy import ndimage

from recontrast import metrics
from recontrast.metrics import inputs, reference

EIGHT_CONNECTED = np.ones((3, 3), int)
quick = settings(deadline=None, max_examples=100)


def check_against_sklearn(scores, labels, tolerance=1e-12):
    result = metrics.image_metrics(scores, labels)
    scores, labels = np.asarray(scores).ravel(), np.asarray(labels).ravel()
    precision, recall, threshold = sk.precision_recall_curve(labels, scores)
    f1 = 2 * precision[:-1] * recall[:-1] / np.maximum(precision[:-1] + recall[:-1], 1e-300)
    assert result.auroc == pytest.approx(sk.roc_auc_score(labels, scores), abs=tolerance)
    assert result.ap == pytest.approx(sk.average_precision_score(labels, scores), abs=tolerance)
    assert result.f1_max == pytest.approx(f1.max(), abs=tolerance)
    assert result.f1_threshold == threshold[f1 >= f1.max() - tolerance].max()
    called = scores >= result.f1_threshold
    assert result.f1_max == pytest.approx(sk.f1_score(labels, called), abs=tolerance)
    assert result.accuracy == pytest.approx(sk.accuracy_score(labels, called), abs=tolerance)


def test_image_metrics_by_hand():
    scores, labels = [4, 3, 3, 2, 1], [1, 1, 0, 0, 1]
    # 2 (for score 4) + 0.5 + 1 (for score 3) + 0 (for score 1) of the 6 pairs are ordered correctly. At thresholds 4, 3
    # and 1, recall is 1/3, 2/3 and 3/3, precision 1, 2/3 and 3/5, and F1 2/4, 4/6 and 6/8.
    assert metrics.auroc(scores, labels) == 3.5 / 6
    assert metrics.ap(scores, labels) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3, abs=1e-15)
    assert metrics.f1_max(scores, labels) == 0.75
    assert metrics.image_metrics(scores, labels).f1_threshold == 1
    assert metrics.accuracy(scores, labels) == 3 / 5  # all scores are called anomalous


def test_threshold_is_the_highest_with_the_best_f1():
    # F1 is 2 * 1 / (1 + 2) at threshold 5 and 2 * 2 / (4 + 2) at threshold 2.
    result = metrics.image_metrics([5, 4, 3, 2, 1], [1, 0, 0, 1, 0])
    assert (result.f1_max, result.f1_threshold) == (2 / 3, 5)


@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=60))
@quick
def test_ties_equal_sklearn(pairs):
    scores, labels = zip(*pairs, strict=True)
    assume(0 < sum(labels) < len(labels))
    check_against_sklearn(np.array(scores, float), np.array(labels))


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(FLOATS, st.booleans()), min_size=2, max_size=60))
@quick
def test_any_float32_equals_sklearn(pairs):
    scores, labels = zip(*pairs, strict=True)
    assume(0 < sum(labels) < len(labels))
    check_against_sklearn(np.array(scores, np.float32), np.array(labels))


@pytest.mark.parametrize("levels", [20, 5000, 2**24])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_scores_equal_sklearn(levels, dtype):
    """Many ties and none, with enough scores for several sorting threads and the table of thresholds."""
    rng = np.random.default_rng(levels)
    labels = rng.random(1_000_000 if levels == 5000 else 300_000) < (0.5 if levels == 20 else 0.03)
    scores = (np.floor(levels * rng.beta(2 + labels, 3)) / levels).astype(dtype)
    check_against_sklearn(scores, labels, 1e-12 if len(labels) < 1_000_000 else 1e-9)


def make_crowded_scores(rng, count):
    """Make scores of which nearly all share a few cells of a table over the whole range."""
    crowded = np.nextafter(np.float32(1), np.float32(2)) + rng.integers(0, 900, count) * np.float32(2**-23)
    return np.where(rng.random(count) < 1e-4, rng.choice([-1e30, 1e-40, 1e30], count), crowded).astype(np.float32)


def test_crowded_scores_equal_sklearn():
    rng = np.random.default_rng(0)
    check_against_sklearn(make_crowded_scores(rng, 100_000), rng.random(100_000) < 0.2)


@pytest.mark.parametrize(
    "scores, labels",
    {
        "all equal": (np.full(7, 0.3), np.arange(7) < 2),
        "one positive": (np.arange(100.0), np.arange(100) == 37),
        "one negative": (np.arange(100.0), np.arange(100) != 37),
        "denormals": (np.arange(6) * 5e-324, np.arange(6) % 2),
        "two zeros": (np.array([-0.0, 0.0, -1.0]), [1, 0, 0]),
    }.values(),
)
def test_edge_cases_equal_sklearn(scores, labels):
    check_against_sklearn(scores, labels)


def compute_aupro_by_definition(maps, masks, limit):
    """Compute the mean overlap of all regions and the rate over all good pixels at each threshold."""
    x, y = [0.0], [0.0]
    labelled = [(n, ndimage.label(mask, EIGHT_CONNECTED)) for n, mask in enumerate(masks)]
    areas = [(n, labels == i) for n, (labels, count) in labelled for i in range(1, count + 1)]
    for threshold in np.unique(maps)[::-1]:
        called = maps >= threshold
        x.append(called[~masks].sum() / (~masks).sum())
        y.append(np.mean([called[n][area].mean() for n, area in areas]))
    area = 0
    for x0, x1, y0, y1 in zip(x, x[1:], y, y[1:], strict=False):
        end = min(x1, limit)
        if end > x0:
            area += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return area / limit


def test_aupro_by_hand():
    masks = np.array([[[1, 1, 0, 1, 0, 0]], [[0, 0, 0, 0, 0, 0]]])
    maps = np.array([[[9, 5, 7, 5, 5, 0]], [[6, 1, 1, 1, 1, 1]]])
    # Regions of two pixels and of one pixel, and nine good pixels in both images. At thresholds 9, 7 and 6 the overlap
    # is 1/4 and the rate 0, 1/9 and 2/9. At threshold 5 the overlap is 1 and the rate 3/9.
    assert metrics.aupro(maps, masks, 2 / 9) == pytest.approx(0.25)
    at_limit = 0.25 + 0.75 * 0.7  # 0.3 = (2 + 0.7) / 9
    assert metrics.aupro(maps, masks) == pytest.approx((0.25 * 2 + 0.7 * (0.25 + at_limit) / 2) / 2.7)
    assert metrics.aupro(maps, masks, 1.0) == pytest.approx((0.25 * 2 + (0.25 + 1) / 2 + 6) / 9)


@given(small_cases(), st.sampled_from([0.05, 0.3, 0.5, 1.0]))
@settings(deadline=None, max_examples=300)
def test_aupro_equals_its_definition(case, limit):
    maps, masks = case
    assert metrics.aupro(maps, masks, limit) == pytest.approx(
        compute_aupro_by_definition(maps, masks, limit), abs=1e-12
    )


def compute_upstream_per_image(maps, masks):
    """Return the value of upstream, or None if upstream raises or returns NaN."""
    values = []
    for amap, mask in zip(maps, masks, strict=True):
        if mask.any():
            try:
                with np.errstate(invalid="ignore", divide="ignore"):
                    values.append(upstream.compute_pro(mask.astype(int), amap))
            except (ValueError, ZeroDivisionError):  # a constant map, or fewer than two thresholds
                return None
    return None if np.isnan(values).any() else np.mean(values)


@given(small_cases())
@settings(deadline=None, max_examples=60)
def test_per_image_aupro_equals_upstream(case):
    maps, masks = case
    expected = compute_upstream_per_image(maps, masks)
    if expected is None:
        with pytest.raises(ValueError, match=r"maps: per-image AUPRO is undefined, because image \d+"):
            metrics.aupro(maps, masks, mode="per-image")
        assert np.isnan(metrics.pixel_metrics(maps, masks).aupro_per_image)
    else:
        assert metrics.aupro(maps, masks, mode="per-image") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_per_image_aupro_equals_upstream_on_smooth_maps(dtype):
    maps, masks = some_maps(n=4, size=64, dtype=dtype)
    result = metrics.aupro(maps, masks, mode="per-image")
    assert result == pytest.approx(compute_upstream_per_image(maps, masks), abs=1e-12)
    assert 0.3 < result < 0.95  # not a trivial case
    assert abs(result - metrics.aupro(maps, masks)) > 1e-3  # the two definitions differ


def test_pixel_metrics_equal_the_single_metrics():
    maps, masks = some_maps()
    result = metrics.pixel_metrics(maps, masks, limit=0.2)
    check_against_sklearn(maps, masks)
    assert astuple(result)[:4] == astuple(metrics.image_metrics(maps, masks))[:4]
    assert result.aupro == metrics.aupro(maps, masks, 0.2)
    assert result.aupro_per_image == metrics.aupro(maps, masks, 0.2, mode="per-image")


@pytest.mark.parametrize("compiled", [True, False])
def test_several_limits_equal_each_limit_alone(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(inputs, "native", None)
    maps, masks = some_maps()
    limits = (0.3, 1.0, 0.01, 0.3, 1e-9)
    expected = [metrics.aupro(maps, masks, limit) for limit in limits]
    assert metrics.aupro(maps, masks, limits) == expected
    assert len(set(expected)) == 4
    result = metrics.pixel_metrics(maps, masks, limits)
    assert result.aupro == expected[0]
    assert result.aupro_at == dict(zip(limits, expected, strict=True))
    per_image = [metrics.aupro(maps, masks, limit, mode="per-image") for limit in (0.3, 0.1)]
    assert metrics.aupro(maps, masks, (0.3, 0.1), mode="per-image") == per_image


@pytest.fixture
def native():
    return pytest.importorskip("recontrast._metrics")


def assert_same_rates(rates, expected):
    if expected is None:
        assert rates is None
        return
    assert rates[:-1] == pytest.approx(expected[:-1], abs=1e-13)
    assert rates[-1] == pytest.approx(expected[-1], abs=1e-12)


@given(small_cases(), st.sampled_from([0.05, 0.3, 1.0]), st.sampled_from([1, -1, 1e-42, 1e30]))
@settings(deadline=None, max_examples=200)
def check_native_against_reference(native, case, limit, scale):
    maps, masks = case
    maps = (maps * scale).astype(maps.dtype)
    limits = [limit, 0.5]
    assert_same_rates(native.pixels(maps, masks, limits), reference.pixels(maps, masks, limits))
    assert_same_rates(native.rates(maps.ravel(), masks.ravel()), reference.rates(maps.ravel(), masks.ravel()))
    result, reasons = native.per_image(maps, masks, limit)
    expected, expected_reasons = reference.per_image(maps, masks, limit)
    np.testing.assert_array_equal(reasons, expected_reasons)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)


def test_native_equals_reference(native):
    check_native_against_reference(native)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_native_equals_reference_on_many_pixels(native, dtype):
    """Several threads, several cells of the table, and thresholds that differ by rounding."""
    maps, masks = some_maps(n=9, size=200, dtype=dtype)
    assert_same_rates(native.pixels(maps, masks, [0.3]), reference.pixels(maps, masks, [0.3]))
    result, expected = (m.per_image(maps, masks, 0.3)[0] for m in (native, reference))
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)
    maps[4, 3, 5] = np.nan
    assert native.pixels(maps, masks, [0.3]) is None
    assert native.per_image(maps, masks, 0.3)[1].tolist() == [1, 0, 0, 0, 5, 0, 0, 0, 0]


def test_number_of_threads_does_not_change_the_metrics(native):
    maps, masks = some_maps(n=23, size=150)
    expected = native.pixels(maps, masks, [0.3, 0.05], 1)
    areas = native.per_image(maps, masks, 0.3, 1)[0]
    for threads in (0, 2, 5, 64):
        assert native.pixels(maps, masks, [0.3, 0.05], threads) == expected
        assert native.rates(maps.ravel(), masks.ravel(), threads)[:5] == expected[:5]
        np.testing.assert_array_equal(native.per_image(maps, masks, 0.3, threads)[0], areas)


def test_backend_does_not_change_the_metrics(monkeypatch):
    assert metrics.REGIONS_BACKEND == ("native" if inputs.native else "scipy")
    result = metrics.pixel_metrics(*some_maps())
    monkeypatch.setattr(inputs, "native", None)
    assert astuple(metrics.pixel_metrics(*some_maps()))[:6] == pytest.approx(astuple(result)[:6], abs=1e-12)


def test_close_to_adeval(monkeypatch):
    """ADEval bins the scores and is close with fine bins; its AP uses the trapezoid rule and is not comparable."""
    adeval = pytest.importorskip("adeval")
    if not hasattr(np, "trapz"):  # ADEval 1.1.0 uses np.trapz, which NumPy 2.4 removed
        monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)
    maps, masks = some_maps(n=8, size=64)
    accumulator = adeval.EvalAccumulator(0.0, 1.0, float(maps.min()), float(maps.max()), nstrips=20000)
    accumulator.add_anomap_batch(maps, masks.astype(np.uint8))
    accumulator.add_image([0.0, 1.0], [0, 1])
    accumulator.add_sample([0.0, 1.0], [0, 1])
    expected = accumulator.summary()
    result = metrics.pixel_metrics(maps, masks)
    assert result.auroc == pytest.approx(expected["p_auroc"], abs=1e-3)
    assert result.aupro == pytest.approx(expected["p_aupro"], abs=1e-3)
