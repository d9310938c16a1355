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

EIGHT = np.ones((3, 3), int)
quick = settings(deadline=None, max_examples=100)


def check_against_sklearn(scores, labels, tolerance=1e-12):
    ours = metrics.image_metrics(scores, labels)
    scores, labels = np.asarray(scores).ravel(), np.asarray(labels).ravel()
    precision, recall, threshold = sk.precision_recall_curve(labels, scores)
    f1 = 2 * precision[:-1] * recall[:-1] / np.maximum(precision[:-1] + recall[:-1], 1e-300)
    assert ours.auroc == pytest.approx(sk.roc_auc_score(labels, scores), abs=tolerance)
    assert ours.ap == pytest.approx(sk.average_precision_score(labels, scores), abs=tolerance)
    assert ours.f1_max == pytest.approx(f1.max(), abs=tolerance)
    assert ours.f1_threshold == threshold[f1 >= f1.max() - tolerance].max()
    called = scores >= ours.f1_threshold
    assert ours.f1_max == pytest.approx(sk.f1_score(labels, called), abs=tolerance)
    assert ours.accuracy == pytest.approx(sk.accuracy_score(labels, called), abs=tolerance)


def test_by_hand():
    scores, labels = [4, 3, 3, 2, 1], [1, 1, 0, 0, 1]
    # Of six pairs 2 (from 4) + 0.5 + 1 (from 3) + 0 (from 1) are in order. Thresholds 4, 3, 1 find 1, 2, 3 positives
    # at precisions 1, 2/3, 3/5, hence F1 2/4, 4/6, 6/8.
    assert metrics.auroc(scores, labels) == 3.5 / 6
    assert metrics.ap(scores, labels) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3, abs=1e-15)
    assert metrics.f1_max(scores, labels) == 0.75
    assert metrics.image_metrics(scores, labels).f1_threshold == 1
    assert metrics.accuracy(scores, labels) == 3 / 5  # all are called anomalous


def test_best_threshold_is_the_highest():
    # F1 is 2 * 1 / (1 + 2) at threshold 5 and 2 * 2 / (4 + 2) at threshold 2.
    ours = metrics.image_metrics([5, 4, 3, 2, 1], [1, 0, 0, 1, 0])
    assert (ours.f1_max, ours.f1_threshold) == (2 / 3, 5)


@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=60))
@quick
def test_ties_as_sklearn(pairs):
    scores, labels = zip(*pairs, strict=True)
    assume(0 < sum(labels) < len(labels))
    check_against_sklearn(np.array(scores, float), np.array(labels))


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.tuples(FLOATS, st.booleans()), min_size=2, max_size=60))
@quick
def test_any_float32_as_sklearn(pairs):
    scores, labels = zip(*pairs, strict=True)
    assume(0 < sum(labels) < len(labels))
    check_against_sklearn(np.array(scores, np.float32), np.array(labels))


@pytest.mark.parametrize("levels", [20, 5000, 2**24])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_scores_as_sklearn(levels, dtype):
    """Heavy ties, and none; enough of them that several threads sort, and that the table of thresholds is used."""
    rng = np.random.default_rng(levels)
    labels = rng.random(1_000_000 if levels == 5000 else 300_000) < (0.5 if levels == 20 else 0.03)
    scores = (np.floor(levels * rng.beta(2 + labels, 3)) / levels).astype(dtype)
    check_against_sklearn(scores, labels, 1e-12 if len(labels) < 1_000_000 else 1e-9)


def crowded(rng, count):
    """Scores of which nearly all share a few cells of a table over the whole range."""
    near = np.nextafter(np.float32(1), np.float32(2)) + rng.integers(0, 900, count) * np.float32(2**-23)
    return np.where(rng.random(count) < 1e-4, rng.choice([-1e30, 1e-40, 1e30], count), near).astype(np.float32)


def test_crowded_scores_as_sklearn():
    rng = np.random.default_rng(0)
    check_against_sklearn(crowded(rng, 100_000), rng.random(100_000) < 0.2)


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
def test_corners_as_sklearn(scores, labels):
    check_against_sklearn(scores, labels)


def brute_aupro(maps, masks, limit):
    """The definition: at each threshold the mean overlap of all regions and the rate over all good pixels."""
    x, y = [0.0], [0.0]
    found = [(n, ndimage.label(mask, EIGHT)) for n, mask in enumerate(masks)]
    areas = [(n, labels == i) for n, (labels, count) in found for i in range(1, count + 1)]
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
    # Regions of two pixels and of one, nine good pixels, those of the good image too. Thresholds 9, 7, 6: overlap 1/4
    # at rates 0, 1/9, 2/9; threshold 5: overlap 1 at rate 3/9.
    assert metrics.aupro(maps, masks, 2 / 9) == pytest.approx(0.25)
    at_limit = 0.25 + 0.75 * 0.7  # 0.3 = (2 + 0.7) / 9
    assert metrics.aupro(maps, masks) == pytest.approx((0.25 * 2 + 0.7 * (0.25 + at_limit) / 2) / 2.7)
    assert metrics.aupro(maps, masks, 1.0) == pytest.approx((0.25 * 2 + (0.25 + 1) / 2 + 6) / 9)


@given(small_cases(), st.sampled_from([0.05, 0.3, 0.5, 1.0]))
@settings(deadline=None, max_examples=300)
def test_aupro_is_its_definition(case, limit):
    maps, masks = case
    assert metrics.aupro(maps, masks, limit) == pytest.approx(brute_aupro(maps, masks, limit), abs=1e-12)


def reference_per_image(maps, masks):
    """What the reference reports, or None where it fails or gives NaN."""
    values = []
    for amap, mask in zip(maps, masks, strict=True):
        if mask.any():
            try:
                with np.errstate(invalid="ignore", divide="ignore"):
                    values.append(upstream.compute_pro(mask.astype(int), amap))
            except (ValueError, ZeroDivisionError):  # a constant map; fewer than two rows
                return None
    return None if np.isnan(values).any() else np.mean(values)


@given(small_cases())
@settings(deadline=None, max_examples=60)
def test_per_image_is_the_reference(case):
    maps, masks = case
    expected = reference_per_image(maps, masks)
    if expected is None:
        with pytest.raises(ValueError, match=r"maps: per-image AUPRO is undefined, because image \d+"):
            metrics.aupro(maps, masks, mode="per-image")
        assert np.isnan(metrics.pixel_metrics(maps, masks).aupro_per_image)
    else:
        assert metrics.aupro(maps, masks, mode="per-image") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_per_image_is_the_reference_on_smooth_maps(dtype):
    maps, masks = some_maps(n=4, size=64, dtype=dtype)
    ours = metrics.aupro(maps, masks, mode="per-image")
    assert ours == pytest.approx(reference_per_image(maps, masks), abs=1e-12)
    assert 0.3 < ours < 0.95  # a case that says something
    assert abs(ours - metrics.aupro(maps, masks)) > 1e-3  # and the definitions differ


def test_all_together_are_the_ones():
    maps, masks = some_maps()
    ours = metrics.pixel_metrics(maps, masks, limit=0.2)
    check_against_sklearn(maps, masks)
    assert astuple(ours)[:4] == astuple(metrics.image_metrics(maps, masks))[:4]
    assert ours.aupro == metrics.aupro(maps, masks, 0.2)
    assert ours.aupro_per_image == metrics.aupro(maps, masks, 0.2, mode="per-image")


@pytest.mark.parametrize("compiled", [True, False])
def test_several_limits(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(inputs, "native", None)
    maps, masks = some_maps()
    limits = (0.3, 1.0, 0.01, 0.3, 1e-9)
    each = [metrics.aupro(maps, masks, limit) for limit in limits]
    assert metrics.aupro(maps, masks, limits) == each
    assert len(set(each)) == 4
    ours = metrics.pixel_metrics(maps, masks, limits)
    assert ours.aupro == each[0]
    assert ours.aupro_at == dict(zip(limits, each, strict=True))
    per_image = [metrics.aupro(maps, masks, limit, mode="per-image") for limit in (0.3, 0.1)]
    assert metrics.aupro(maps, masks, (0.3, 0.1), mode="per-image") == per_image


@pytest.fixture
def native():
    return pytest.importorskip("recontrast._metrics")


def same(ours, oracle):
    if oracle is None:
        return ours is None
    *ours, areas = ours
    *theirs, expected = oracle
    assert ours == pytest.approx(theirs, abs=1e-13)
    return areas == pytest.approx(expected, abs=1e-12)


@given(small_cases(), st.sampled_from([0.05, 0.3, 1.0]), st.sampled_from([1, -1, 1e-42, 1e30]))
@settings(deadline=None, max_examples=200)
def check_oracle(native, case, limit, scale):
    maps, masks = (maps_or_masks for maps_or_masks in case)
    maps = (maps * scale).astype(maps.dtype)
    limits = [limit, 0.5]
    assert same(native.pixels(maps, masks, limits), reference.pixels(maps, masks, limits))
    assert same(native.rates(maps.ravel(), masks.ravel()), reference.rates(maps.ravel(), masks.ravel()))
    ours, why = native.per_image(maps, masks, limit)
    expected, reasons = reference.per_image(maps, masks, limit)
    np.testing.assert_array_equal(why, reasons)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


def test_compiled_is_the_oracle(native):
    check_oracle(native)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_compiled_is_the_oracle_on_many_pixels(native, dtype):
    """More than one thread, more than one cell, and thresholds that differ by rounding."""
    maps, masks = some_maps(n=9, size=200, dtype=dtype)
    assert same(native.pixels(maps, masks, [0.3]), reference.pixels(maps, masks, [0.3]))
    ours, expected = (m.per_image(maps, masks, 0.3)[0] for m in (native, reference))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)
    maps[4, 3, 5] = np.nan
    assert native.pixels(maps, masks, [0.3]) is None
    assert native.per_image(maps, masks, 0.3)[1].tolist() == [1, 0, 0, 0, 5, 0, 0, 0, 0]


def test_threads_do_not_matter(native):
    maps, masks = some_maps(n=23, size=150)
    one = native.pixels(maps, masks, [0.3, 0.05], 1)
    areas = native.per_image(maps, masks, 0.3, 1)[0]
    for threads in (0, 2, 5, 64):
        assert native.pixels(maps, masks, [0.3, 0.05], threads) == one
        assert native.rates(maps.ravel(), masks.ravel(), threads)[:5] == one[:5]
        np.testing.assert_array_equal(native.per_image(maps, masks, 0.3, threads)[0], areas)


def test_backend_does_not_matter(monkeypatch):
    assert metrics.REGIONS_BACKEND == ("native" if inputs.native else "scipy")
    ours = metrics.pixel_metrics(*some_maps())
    monkeypatch.setattr(inputs, "native", None)
    assert astuple(metrics.pixel_metrics(*some_maps()))[:6] == pytest.approx(astuple(ours)[:6], abs=1e-12)


def test_as_adeval(monkeypatch):
    """A peer that bins: with fine bins it comes near. Its AP is another one, by the trapezoid rule."""
    adeval = pytest.importorskip("adeval")
    if not hasattr(np, "trapz"):  # ADEval 1.1.0 calls what NumPy 2.4 no longer has
        monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)
    maps, masks = some_maps(n=8, size=64)
    theirs = adeval.EvalAccumulator(0.0, 1.0, float(maps.min()), float(maps.max()), nstrips=20000)
    theirs.add_anomap_batch(maps, masks.astype(np.uint8))
    theirs.add_image([0.0, 1.0], [0, 1])
    theirs.add_sample([0.0, 1.0], [0, 1])
    expected = theirs.summary()
    ours = metrics.pixel_metrics(maps, masks)
    assert ours.auroc == pytest.approx(expected["p_auroc"], abs=1e-3)
    assert ours.aupro == pytest.approx(expected["p_aupro"], abs=1e-3)
