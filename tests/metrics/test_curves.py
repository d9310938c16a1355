import numpy as np
import pytest
from sklearn.metrics import roc_curve

from recontrast import metrics
from recontrast.metrics import curves


@pytest.mark.parametrize("seed", range(4))
def test_roc_equals_scikit_learn(seed):
    random = np.random.default_rng(seed)
    scores = random.normal(size=200).round(1 + seed)  # ties, fewer with each seed
    labels = random.random(200) < 0.3
    x, y = curves.roc(scores, labels)
    expected = roc_curve(labels, scores, drop_intermediate=False)
    np.testing.assert_array_equal(x, expected[0])
    np.testing.assert_array_equal(y, expected[1])
    assert np.trapezoid(y, x) == pytest.approx(metrics.auroc(scores, labels), abs=1e-12)


def make_maps(seed, decimals):
    random = np.random.default_rng(seed)
    masks = np.zeros((5, 30, 40), bool)
    masks[1, 3:9, 4:20] = masks[1, 20:25, 30:33] = masks[3, 10:28, 2:5] = True
    return (random.normal(size=masks.shape) + 1.5 * masks).round(decimals).astype(np.float32), masks


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("decimals", [1, 6])
def test_area_below_the_overlap_curve_is_aupro(decimals, limit):
    maps, masks = make_maps(decimals, decimals)
    x, y = curves.pro(maps, masks, limit)
    assert (x[0], y[0], x[-1]) == (0, 0, limit)
    assert np.trapezoid(y, x) / limit == pytest.approx(metrics.aupro(maps, masks, limit), abs=1e-9)


def test_thin_curve_stays_near_the_curve():
    x, y = curves.pro(*make_maps(0, 6))
    thin_x, thin_y = curves.thin((x, y), 50)
    assert len(thin_x) <= 102 < len(x)
    assert set(zip(thin_x, thin_y, strict=True)) <= set(zip(x, y, strict=True))
    assert (thin_x[0], thin_x[-1], thin_y[-1]) == (x[0], x[-1], y[-1])
    edges = np.linspace(0, 0.3, 51)
    rise = np.diff(np.interp(edges, x, y)).max() + np.diff(y).max()  # within a column, and to the next corner
    assert np.abs(np.interp(x, thin_x, thin_y) - y).max() <= rise < 0.2


def test_invalid_input_raises():
    maps, masks = make_maps(0, 3)
    with pytest.raises(ValueError, match="at least one positive and one negative"):
        curves.roc([1.0, 2.0], [0, 0])
    with pytest.raises(ValueError, match="1 NaN"):
        curves.roc([1.0, np.nan], [0, 1])
    with pytest.raises(ValueError, match="at least one positive and one negative"):
        curves.pro(maps, np.zeros_like(masks))
    with pytest.raises(ValueError, match="1 NaN"):
        curves.pro(np.where(np.arange(maps.size).reshape(maps.shape) == 5, np.nan, maps), masks)
    with pytest.raises(ValueError, match="shape of maps"):
        curves.pro(maps, masks[:2])
    with pytest.raises(ValueError, match="false positive rate"):
        curves.pro(maps, masks, 0)
    with pytest.raises(ValueError, match="columns"):
        curves.thin(curves.roc([1.0, 2.0], [0, 1]), 0)


@pytest.mark.parametrize("seed", range(40))
def test_area_is_aupro_where_the_curve_jumps_at_the_limit(seed):
    """With few good pixels and few values, the curve jumps at multiples of 1 / (number of good pixels)."""
    random = np.random.default_rng(seed)
    masks = random.random((2, 4, 5)) < 0.5
    masks[0, 0, 0], masks[0, 0, 1] = True, False
    maps = random.integers(0, 4, masks.shape).astype(np.float32)
    good = np.count_nonzero(~masks)
    streaming = metrics.Streaming(4.0)
    streaming.update(maps, masks)
    for limit in {*(np.arange(1, good + 1) / good).tolist(), 0.3}:
        exact, streamed = metrics.aupro(maps, masks, limit), streaming.compute(limit).aupro.value
        for (x, y), area in ((curves.pro(maps, masks, limit), exact), (streaming.overlap_curve(limit), streamed)):
            assert (x[0], y[0], x[-1]) == (0, 0, limit)
            assert np.trapezoid(y, x) / limit == pytest.approx(area, abs=1e-9)
