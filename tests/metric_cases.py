"""Maps and masks for the tests of the metrics."""

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st
from scipy import ndimage


def some_maps(n=6, size=32, seed=0, dtype=np.float32):
    """Smooth maps with slightly higher scores inside the masks; the first image is good."""
    rng = np.random.default_rng(seed)
    maps = ndimage.gaussian_filter(rng.random((n, size, size)), (0, 2, 2))
    masks = ndimage.gaussian_filter(rng.random((n, size, size)), (0, 2, 2)) > 0.58
    masks[0] = False
    return (maps + 0.1 * masks).astype(dtype), masks


@st.composite
def small_cases(draw):
    """Small maps and masks, with and without ties."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    maps = rng.integers(0, draw(st.sampled_from([2, 5, 1000])), shape) / 7
    masks = rng.random(shape) < draw(st.sampled_from([0.1, 0.4, 0.8]))
    assume(masks.any() and not masks.all())
    return maps.astype(draw(st.sampled_from([np.float32, np.float64]))), masks


def spro_by_definition(maps, defects, saturations, limit):
    """Compute the mean saturated overlap and the rate at each threshold, and the area up to ``limit`` by trapezoids."""
    good = [np.ones(anomaly.shape, bool) if not len(masks) else ~np.any(masks, axis=0)
            for anomaly, masks in zip(maps, defects, strict=True)]  # fmt: skip
    negatives = sum(mask.sum() for mask in good)
    x, y = [0.0], [0.0]
    for threshold in np.unique(np.concatenate([anomaly.ravel() for anomaly in maps]))[::-1]:
        called = [anomaly >= threshold for anomaly in maps]
        x.append(sum((c & g).sum() for c, g in zip(called, good, strict=True)) / negatives)
        overlaps = [
            min((c & mask).sum() / area, 1.0)
            for c, masks, areas in zip(called, defects, saturations, strict=True)
            for mask, area in zip(masks, areas, strict=True)
        ]
        y.append(np.mean(overlaps))
    total = 0.0
    for x0, x1, y0, y1 in zip(x, x[1:], y, y[1:], strict=False):
        end = min(x1, limit)
        if end > x0:
            total += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return total / limit
