from dataclasses import astuple

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
import upstream
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import ndimage

from recontrast import metrics

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
    assert ours.f1_max == pytest.approx(sk.f1_score(labels, scores >= ours.f1_threshold), abs=tolerance)


def test_by_hand():
    scores, labels = [4, 3, 3, 2, 1], [1, 1, 0, 0, 1]
    # Of six pairs 2 (from 4) + 0.5 + 1 (from 3) + 0 (from 1) are in order. Thresholds 4, 3, 1 find 1, 2, 3 positives
    # at precisions 1, 2/3, 3/5, hence F1 2/4, 4/6, 6/8.
    assert metrics.auroc(scores, labels) == 3.5 / 6
    assert metrics.ap(scores, labels) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3, abs=1e-15)
    assert metrics.f1_max(scores, labels) == 0.75
    assert metrics.image_metrics(scores, labels).f1_threshold == 1


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
def test_many_scores_as_sklearn(levels):
    rng = np.random.default_rng(levels)
    labels = rng.random(300_000) < 0.03
    scores = (np.floor(levels * rng.beta(2 + labels, 3)) / levels).astype(np.float32)
    check_against_sklearn(scores, labels)


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


def some_maps(n=6, size=32, seed=0, dtype=np.float32):
    """Smooth maps that see their masks a little; the first image is good."""
    rng = np.random.default_rng(seed)
    maps = ndimage.gaussian_filter(rng.random((n, size, size)), (0, 2, 2))
    masks = ndimage.gaussian_filter(rng.random((n, size, size)), (0, 2, 2)) > 0.58
    masks[0] = False
    return (maps + 0.1 * masks).astype(dtype), masks


@pytest.mark.parametrize("shape", [(6, 32, 32), (6, 1, 32, 32), (2, 3, 1, 32, 32), (192, 32)])
@pytest.mark.parametrize("mask", [np.bool_, np.uint8, np.int64, np.float32])
@pytest.mark.parametrize("high", [1, 255])
def test_shapes_and_mask_types(shape, mask, high):
    maps, masks = some_maps()
    expected = metrics.pixel_metrics(maps, masks)
    masks = (masks * high).astype(mask)
    ours = metrics.pixel_metrics(maps.reshape(shape), masks.reshape(shape))
    joined = len(shape) == 2  # one tall image: only what does not know of regions stays
    assert astuple(ours)[: 4 if joined else 6] == astuple(expected)[: 4 if joined else 6]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors(dtype, device):
    maps, masks = (torch.from_numpy(x).to(device) for x in some_maps())
    maps = maps.to(dtype).requires_grad_()
    expected = metrics.pixel_metrics(maps.detach().float().cpu().numpy(), masks.cpu().numpy())
    ours = metrics.pixel_metrics(maps[:, None], masks[:, None].byte())
    assert astuple(ours)[:5] == astuple(expected)[:5]
    # In float64 the 200 thresholds of an image are other ones.
    assert ours.aupro_per_image == pytest.approx(expected.aupro_per_image, abs=1e-3)


def test_strides_byte_order_and_integers():
    maps, masks = some_maps()
    expected = metrics.pixel_metrics(maps, masks)
    assert metrics.pixel_metrics(maps.astype(">f4"), np.asfortranarray(masks)) == expected
    wide = np.zeros((6, 64, 64), np.float32)
    wide[:, ::2, ::2] = maps
    assert metrics.pixel_metrics(wide[:, ::2, ::2], masks[:, ::-1][:, ::-1]) == expected
    assert metrics.auroc([3, 1, 2], [True, False, False]) == 1.0
    maps.flags.writeable = masks.flags.writeable = False
    assert metrics.pixel_metrics(maps, masks) == expected


@pytest.mark.parametrize("metric", [metrics.auroc, metrics.ap, metrics.f1_max, metrics.image_metrics])
@pytest.mark.parametrize(
    "scores, labels, message",
    [
        ([1.0, 2.0], [1, 1], "labels: wanted at least one positive and one negative, got 2 positive and 0 negative"),
        ([1.0, 2.0], [0, 0], "labels: .* got 0 positive and 2 negative"),
        ([], [], "labels: .* got 0 positive and 0 negative"),
        ([1.0, float("nan"), 2.0], [0, 1, 1], "scores: wanted finite numbers, got 1 NaN and 0 infinite of 3"),
        ([1.0, float("inf"), -float("inf")], [0, 1, 1], "scores: .* got 0 NaN and 2 infinite of 3"),
        ([1.0, 2.0, 3.0], [0, 1], r"labels: wanted the shape of scores, \(3,\), got \(2,\)"),
        ([1.0, 2.0, 3.0], [0, 1, 2], r"labels: wanted bool, 0/1 or 0/255, got others among \[1 2\]"),
        ([1.0, 2.0, 3.0], [0, 1, 255], "labels: wanted bool, 0/1 or 0/255"),
        ([1.0, 2.0], [-1, 1], "labels: wanted bool, 0/1 or 0/255"),
        ([1.0, 2.0], [0.0, float("nan")], "labels: wanted bool, 0/1 or 0/255"),
        ([1.0, 2.0], ["good", "bad"], "labels: wanted bool, 0/1 or 0/255, got dtype <U4"),
        ([1j, 2.0], [0, 1], "scores: wanted real numbers, got dtype complex128"),
    ],
)
def test_refused(metric, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(np.array(scores), np.array(labels))


@pytest.mark.parametrize("metric", [metrics.aupro, metrics.pixel_metrics])
def test_maps_refused(metric):
    maps, masks = some_maps()
    with pytest.raises(ValueError, match=r"maps: wanted \(\.\.\., H, W\), got shape \(32,\)"):
        metric(maps[1, 10], np.arange(32) > 3)
    with pytest.raises(ValueError, match=r"masks: wanted the shape of maps, \(6, 32, 32\), got \(6, 1, 32, 32\)"):
        metric(maps, masks[:, None])
    with pytest.raises(ValueError, match="masks: wanted at least one positive and one negative, got 0 positive"):
        metric(maps, np.zeros_like(masks))
    with pytest.raises(ValueError, match="maps: wanted finite numbers, got 1 NaN"):
        metric(np.where(np.arange(32 * 32 * 6).reshape(maps.shape) == 7, np.nan, maps), masks)
    for limit in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"limit: wanted a false positive rate in \(0, 1\]"):
            metric(maps, masks, limit)
    with pytest.raises(ValueError, match='mode: wanted "dataset" or "per-image", got \'images\''):
        metrics.aupro(maps, masks, mode="images")


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


@st.composite
def small_cases(draw):
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    maps = rng.integers(0, draw(st.sampled_from([2, 5, 1000])), shape) / 7
    masks = rng.random(shape) < draw(st.sampled_from([0.1, 0.4, 0.8]))
    assume(masks.any() and not masks.all())
    return maps.astype(draw(st.sampled_from([np.float32, np.float64]))), masks


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


def test_undefined_image_is_named():
    maps, masks = some_maps()
    masks[2] = False
    maps[3], masks[3, :2] = 1, True
    with pytest.raises(ValueError, match=r"image 3 \(counted from 0\) has a constant map"):
        metrics.aupro(maps, masks, mode="per-image")
    assert np.isnan(metrics.pixel_metrics(maps, masks).aupro_per_image)
    maps[3, 0, 0], masks[3] = 2, True
    with pytest.raises(ValueError, match=r"image 3 \(counted from 0\) has no good pixel"):
        metrics.aupro(maps, masks, mode="per-image")


def test_all_together_are_the_ones():
    maps, masks = some_maps()
    ours = metrics.pixel_metrics(maps, masks, limit=0.2)
    check_against_sklearn(maps, masks)
    assert astuple(ours)[:4] == astuple(metrics.image_metrics(maps, masks))
    assert ours.aupro == metrics.aupro(maps, masks, 0.2)
    assert ours.aupro_per_image == metrics.aupro(maps, masks, 0.2, mode="per-image")


@pytest.fixture(params=["scipy", "native"])
def backend(request, monkeypatch):
    native = pytest.importorskip("recontrast._metrics") if request.param == "native" else None
    monkeypatch.setattr(metrics, "_native", native)


def numbered(masks):
    """SciPy's 8-connected regions of each image, renumbered by their first pixel."""
    labels, total = np.zeros(masks.shape, np.int32), 0
    for n, mask in enumerate(masks):
        found, _ = ndimage.label(mask, EIGHT)
        for i in dict.fromkeys(found[found > 0].tolist()):
            total += 1
            labels[n][found == i] = total
    return labels, total


def snake(size):
    """One region that winds through all rows."""
    mask = np.zeros((size, size), bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True
    return mask


def spiral(size):
    """One region whose arms meet only in the middle."""
    mask, h, w, step = np.zeros((size, size), bool), 0, 0, (0, 1)
    for length in [size - 1, size - 1, *(x for k in range(size - 1, 1, -2) for x in (k, k - 2))]:
        for _ in range(length):
            mask[h, w] = True
            h, w = h + step[0], w + step[1]
        step = (step[1], -step[0])
    return mask


SHAPES = {
    "snake": snake(33),
    "spiral": spiral(33),
    "comb": (np.arange(40)[None] % 2 == 0) | (np.arange(9)[:, None] == 8),
    "v": abs(np.arange(21)[None] - 10) == np.arange(11)[:, None],
    "checkerboard": (np.arange(17)[:, None] + np.arange(19)[None]) % 2 == 0,
    "full": np.ones((5, 9), bool),
    "row": np.arange(70)[None] % 3 > 0,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, backend):
    shape = SHAPES[name]
    for mask in (shape, shape[::-1], shape[:, ::-1], shape.T):
        labels, count = metrics.regions(mask)
        expected, total = numbered(mask[None])
        np.testing.assert_array_equal(labels, expected[0])
        assert (labels.dtype, count) == (np.int32, total)
    assert total == (23 if name == "row" else 1)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 19), st.integers(1, 40)),
    density=st.sampled_from([0.02, 0.2, 0.4, 0.5, 0.6, 0.9]),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=200)
def check_regions(shape, density, seed):
    masks = np.random.default_rng(seed).random(shape) < density
    labels, count = metrics.regions(masks)
    expected, total = numbered(masks)
    np.testing.assert_array_equal(labels, expected)
    assert count == total


def test_regions_of_random_masks(backend):
    check_regions()


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 4), (3, 4, 0), (0, 0), (2, 0, 1, 3, 3), (2, 8, 8)])
def test_no_pixels(shape, backend):
    labels, count = metrics.regions(np.zeros(shape))
    assert (labels.shape, labels.dtype, count) == (shape, np.int32, 0)


def test_batch_shapes(backend):
    masks = np.random.default_rng(0).random((6, 9, 11)) < 0.4
    expected, total = numbered(masks)
    for given_masks in (masks, masks * 255, torch.from_numpy(masks), np.asfortranarray(masks)):
        labels, count = metrics.regions(given_masks.reshape(2, 3, 1, 9, 11))
        np.testing.assert_array_equal(labels, expected.reshape(2, 3, 1, 9, 11))
        assert count == total
    with pytest.raises(ValueError, match=r"masks: wanted \(\.\.\., H, W\), got shape \(9,\)"):
        metrics.regions(masks[0, :, 0])


def test_backend_does_not_matter(monkeypatch):
    assert metrics.REGIONS_BACKEND == ("native" if metrics._native else "scipy")
    ours = metrics.pixel_metrics(*some_maps())
    monkeypatch.setattr(metrics, "_native", None)
    assert metrics.pixel_metrics(*some_maps()) == ours


@pytest.fixture
def native():
    return pytest.importorskip("recontrast._metrics")


def test_threads_do_not_matter(native):
    masks = np.random.default_rng(0).random((37, 128, 130)) < 0.45
    masks[3:5] = False
    one, counts = native.regions(masks, 1)
    assert (counts.dtype, counts.shape, counts.sum()) == (np.int64, (37,), one.max())
    for threads in (0, 2, 5, 64):
        many, again = native.regions(masks, threads)
        np.testing.assert_array_equal(one, many)
        np.testing.assert_array_equal(counts, again)
    np.testing.assert_array_equal(one, metrics._regions_scipy(masks)[0])


def test_native_refuses(native):
    masks = np.zeros((2, 4, 6), np.uint8)
    masks.flags.writeable = False
    assert native.regions(masks)[1].tolist() == [0, 0]
    for wrong in (masks.astype(np.int8), masks.astype(np.float32), masks.astype(np.uint16), masks[0], masks[:, :, ::2]):
        with pytest.raises(ValueError, match=r"masks: wanted C-contiguous bool or uint8 \(N, H, W\), got "):
            native.regions(wrong)
    with pytest.raises(ValueError, match="threads: wanted 0 or more, got -1"):
        native.regions(masks, -1)
    with pytest.raises(TypeError):
        native.regions([[[0, 1]]])
