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
