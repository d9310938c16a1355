import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from recontrast import metrics
from recontrast.metrics import inputs, reference

EIGHT_CONNECTED = np.ones((3, 3), int)


@pytest.fixture(params=["scipy", "native"])
def backend(request, monkeypatch):
    native = pytest.importorskip("recontrast._metrics") if request.param == "native" else None
    monkeypatch.setattr(inputs, "native", native)


def label_with_scipy(masks):
    """Label the 8-connected regions of each image with SciPy and number them by their first pixel."""
    labels, total = np.zeros(masks.shape, np.int32), 0
    for n, mask in enumerate(masks):
        image_labels, _ = ndimage.label(mask, EIGHT_CONNECTED)
        for i in dict.fromkeys(image_labels[image_labels > 0].tolist()):
            total += 1
            labels[n][image_labels == i] = total
    return labels, total


def make_snake(size):
    """Make a single region that winds through all rows."""
    mask = np.zeros((size, size), bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True
    return mask


def make_spiral(size):
    """Make a single region whose arms meet in the middle."""
    mask, h, w, step = np.zeros((size, size), bool), 0, 0, (0, 1)
    for length in [size - 1, size - 1, *(x for k in range(size - 1, 1, -2) for x in (k, k - 2))]:
        for _ in range(length):
            mask[h, w] = True
            h, w = h + step[0], w + step[1]
        step = (step[1], -step[0])
    return mask


SHAPES = {
    "snake": make_snake(33),
    "spiral": make_spiral(33),
    "comb": (np.arange(40)[None] % 2 == 0) | (np.arange(9)[:, None] == 8),
    "v": abs(np.arange(21)[None] - 10) == np.arange(11)[:, None],
    "checkerboard": (np.arange(17)[:, None] + np.arange(19)[None]) % 2 == 0,
    "full": np.ones((5, 9), bool),
    "row": np.arange(70)[None] % 3 > 0,
}


@pytest.mark.parametrize("name", SHAPES)
def test_regions_of_known_shapes(name, backend):
    shape = SHAPES[name]
    for mask in (shape, shape[::-1], shape[:, ::-1], shape.T):
        labels, count = metrics.regions(mask)
        expected, total = label_with_scipy(mask[None])
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
    expected, total = label_with_scipy(masks)
    np.testing.assert_array_equal(labels, expected)
    assert count == total


def test_regions_of_random_masks(backend):
    check_regions()


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 4), (3, 4, 0), (0, 0), (2, 0, 1, 3, 3), (2, 8, 8)])
def test_empty_masks(shape, backend):
    labels, count = metrics.regions(np.zeros(shape))
    assert (labels.shape, labels.dtype, count) == (shape, np.int32, 0)


def test_batch_shapes_and_mask_types(backend):
    masks = np.random.default_rng(0).random((6, 9, 11)) < 0.4
    expected, total = label_with_scipy(masks)
    for variant in (masks, masks * 255, torch.from_numpy(masks), np.asfortranarray(masks)):
        labels, count = metrics.regions(variant.reshape(2, 3, 1, 9, 11))
        np.testing.assert_array_equal(labels, expected.reshape(2, 3, 1, 9, 11))
        assert count == total
    with pytest.raises(ValueError, match=r"masks: wanted \(\.\.\., H, W\), got shape \(9,\)"):
        metrics.regions(masks[0, :, 0])


@pytest.fixture
def native():
    return pytest.importorskip("recontrast._metrics")


def test_number_of_threads_does_not_change_the_regions(native):
    masks = np.random.default_rng(0).random((37, 128, 130)) < 0.45
    masks[3:5] = False
    labels, counts = native.regions(masks, 1)
    assert (counts.dtype, counts.shape, counts.sum()) == (np.int64, (37,), labels.max())
    for threads in (0, 2, 5, 64):
        threaded_labels, threaded_counts = native.regions(masks, threads)
        np.testing.assert_array_equal(labels, threaded_labels)
        np.testing.assert_array_equal(counts, threaded_counts)
    np.testing.assert_array_equal(labels, reference.regions(masks)[0])


def test_native_raises_on_invalid_arguments(native):
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
