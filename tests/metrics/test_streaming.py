"""Streaming metrics are within their bounds of the exact ones, merge exactly, and use constant memory."""

import gc
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_cases import small_cases, some_maps

from recontrast import metrics
from recontrast.metrics import bounds, curves, inputs

NAMES = ("auroc", "ap", "f1_max", "aupro")
ROUNDING = 1e-12  # of float64 sums, which the bounds do not include
DETAIL = 10  # small histograms, because most tests have few pixels
STEP = np.float32(2**-16)  # between 1 and 2, a bin is 64 steps wide


def accumulate(maps, masks, high=2.0, parts=1, device="cpu", detail=DETAIL):
    streaming = metrics.Streaming(high, device=device, detail=detail)
    size = -(-len(maps) // parts)
    for first in range(0, len(maps), size):
        streaming.update(maps[first : first + size], masks[first : first + size])
    return streaming


@st.composite
def crowded_cases(draw):
    """Maps whose scores share one, a few or many bins; some scores are at the ends of the range or slightly outside."""
    maps, masks = draw(small_cases())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    steps = rng.integers(0, draw(st.sampled_from([3, 64, 200, 5000])), maps.shape)
    maps = (1 + steps * STEP).astype(maps.dtype)
    if draw(st.booleans()):
        selected = rng.random(maps.shape) < 0.3
        maps[selected] = rng.choice([-1e-3, 0, 1e-30, 2e-6, 1.9999, 2, 2.001], selected.sum())
    return maps, masks


@given(crowded_cases(), st.sampled_from([0.05, 0.3, 1.0]), st.integers(1, 3))
@settings(deadline=None, max_examples=400)
def check_bounds(case, limit, parts):
    maps, masks = case
    exact = metrics.pixel_metrics(maps, masks, (0.3, limit))
    streaming = accumulate(maps, masks, parts=parts)
    result = streaming.compute((0.3, limit))
    for name in NAMES:
        value, bound = getattr(result, name)
        assert abs(value - getattr(exact, name)) <= bound + ROUNDING, name
    value, bound = result.aupro_at[limit]
    assert abs(value - exact.aupro_at[limit]) <= bound + ROUNDING
    assert result.aupro_per_image == pytest.approx(exact.aupro_per_image, abs=1e-15, nan_ok=True)
    called = maps >= result.f1_threshold
    f1 = 2 * (called & masks).sum() / (called.sum() + masks.sum())
    assert f1 == pytest.approx(result.f1_max.value - result.f1_max.bound, abs=ROUNDING)


@pytest.mark.parametrize("compiled", [True, False])
def test_exact_metrics_are_within_the_bounds(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(inputs, "native", None)
    check_bounds()


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_corners_of_the_overlap_curve_lie_on_the_exact_one(limit):
    maps, masks = some_maps()
    streaming = accumulate(maps, masks, high=float(maps.max()), parts=2)
    x, y = streaming.overlap_curve(limit)
    exact_x, exact_y = curves.pro(maps, masks, limit)
    assert (x[0], y[0], x[-1]) == (0, 0, limit) and len(x) > 100
    first, last = (np.searchsorted(exact_x, x[1:-1], side=side) for side in ("left", "right"))
    is_corner, between = exact_x[first] == x[1:-1], np.interp(x[1:-1], exact_x, exact_y)
    # The exact curve may rise vertically: it then has several y for one x.
    lowest, highest = (np.where(is_corner, exact_y[index], between) for index in (first, last - 1))
    assert (lowest - 1e-9 <= y[1:-1]).all() and (y[1:-1] <= highest + 1e-9).all()
    value, bound = streaming.compute(limit).aupro
    assert abs(np.trapezoid(y, x) / limit - value) <= bound + ROUNDING
    with pytest.raises(ValueError, match="at least one positive and one negative"):
        accumulate(maps, np.zeros_like(masks), high=float(maps.max())).overlap_curve()


@pytest.mark.parametrize("compiled", [True, False])
def test_bounds_are_tight(compiled, monkeypatch):
    """With all scores in one bin, the bounds of AUROC and AUPRO are reached with positives first or last."""
    if not compiled:
        monkeypatch.setattr(inputs, "native", None)
    masks = np.arange(40).reshape(1, 5, 8) < 8
    first, last = (np.where(masks, 1 + 2 * STEP, 1 + x * STEP).astype(np.float32) for x in (1, 3))
    assert torch.equal(accumulate(first, masks).counts, accumulate(last, masks).counts)
    result = accumulate(first, masks).compute()
    rounding = 2.0**-41 * 8
    assert result.auroc == (0.5, 0.5)
    assert result.aupro == pytest.approx((0.5, 0.5 + rounding))
    lowest_f1 = metrics.f1_max(last, masks)
    assert result.f1_max == pytest.approx(((1 + lowest_f1) / 2, (1 - lowest_f1) / 2))
    assert metrics.f1_max(first, masks) == metrics.ap(first, masks) == 1
    assert result.ap.value + result.ap.bound == pytest.approx(1)
    spread = (1 + np.arange(40, 0, -1) * STEP).reshape(1, 5, 8).astype(np.float32)[:, ::-1, ::-1]
    lowest = metrics.ap(spread, masks)  # positives last, all scores distinct
    assert result.ap.value - result.ap.bound == pytest.approx(lowest, abs=1e-3)
    assert result.ap.value - result.ap.bound <= lowest


def test_bins_with_one_class_are_exact():
    """If no bin holds both classes, only the rounding of areas remains."""
    maps, masks = some_maps(n=3, size=32)
    maps = (np.random.default_rng(0).permutation(maps.size).reshape(maps.shape) / maps.size + 0.5).astype(np.float32)
    exact, result = metrics.pixel_metrics(maps, masks), accumulate(maps, masks, detail=17).compute()
    assert result.auroc == pytest.approx((exact.auroc, 0), abs=1e-13)
    assert result.f1_max == pytest.approx((exact.f1_max, 0), abs=1e-13)
    assert result.aupro == pytest.approx((exact.aupro, 0), abs=1e-9)
    assert result.ap == pytest.approx((exact.ap, 0), abs=1e-4)  # the logarithm bounds the sum, but does not equal it


@pytest.mark.parametrize("scale", [1, 1e-2])
def test_bounds_of_smooth_maps_are_small(scale):
    """Values within a quarter of an octave, near the top of the range and far below it."""
    maps, masks = some_maps(n=40, size=64)
    result = accumulate(maps * np.float32(scale), masks, high=12.0, detail=17).compute()
    assert max(result.auroc.bound, result.aupro.bound) < 1e-4
    assert max(result.ap.bound, result.f1_max.bound) < 2e-3


@pytest.mark.parametrize("high", [1e-3, 1.0, 2.0, 3.999, 4.0, 12, 1e6])
def test_histograms_are_small(high):
    streaming = metrics.Streaming(high)
    assert streaming.counts.nbytes <= 64e6
    maps, masks = some_maps(n=2)
    streaming.update(maps * np.float32(high), masks)
    top = np.full((1, 2, 2), high, np.float32)
    streaming.update(top, np.array([[[1, 1], [0, 0]]]))
    assert streaming.counts[0, -1] == streaming.counts[1, -1] == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_implementation_counts_the_same(dtype, device, monkeypatch):
    maps, masks = some_maps(n=7, size=24)
    tensor = torch.from_numpy(maps).to(dtype)
    expected = accumulate(tensor.float().numpy(), masks).state()
    exact = metrics.aupro(tensor, masks, mode="per-image")
    for compiled in (inputs.native, None):
        monkeypatch.setattr(inputs, "native", compiled)
        streaming = metrics.Streaming(2.0, device=device, detail=DETAIL)
        streaming.update(tensor[:3].to(device), masks[:3])
        streaming.update(tensor[3:, None].to(device), torch.from_numpy(masks[3:, None]).to(device))
        assert torch.equal(streaming.counts.cpu(), expected["counts"])
        assert streaming.compute().aupro_per_image == pytest.approx(exact, abs=1e-15)
        assert streaming.totals[[0, 1, 4, 5]].tolist() == expected["totals"][[0, 1, 4, 5]].tolist()


@pytest.mark.parametrize("compiled", [True, False])
def test_strides_byte_order_and_read_only_arrays(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(inputs, "native", None)
    maps, masks = some_maps(n=6, size=24)
    expected = accumulate(maps, masks).counts
    wide = np.zeros((6, 48, 48), np.float32)
    wide[:, ::2, ::2] = maps
    for variant in (wide[:, ::2, ::2], maps.astype(">f4"), np.asfortranarray(maps), maps.copy()):
        mask_variant = masks.astype(np.uint8) * 255
        variant.flags.writeable = mask_variant.flags.writeable = False
        assert torch.equal(accumulate(variant, mask_variant).counts, expected)
        assert torch.equal(accumulate(variant, masks[:, ::-1][:, ::-1]).counts, expected)
    with_gradient = torch.from_numpy(maps).requires_grad_()
    assert torch.equal(accumulate(with_gradient, masks).counts, expected)
    for wrong in (maps * 1j, torch.from_numpy(maps * 1j)):
        with pytest.raises(ValueError, match=r"maps: wanted real numbers, got dtype (torch\.)?complex64"):
            metrics.Streaming(2.0, detail=DETAIL).update(wrong, masks)


def test_order_and_division_do_not_change_the_metrics():
    maps, masks = some_maps(n=12)
    whole = accumulate(maps, masks)
    order = np.random.default_rng(0).permutation(12)
    parts = [accumulate(maps[i], masks[i], parts=2) for i in np.array_split(order, 3)]
    merged = pickle.loads(pickle.dumps(parts[0]))
    merged.merge(parts[1])
    merged.merge(parts[2].state())
    added = {name: sum(part.state()[name] for part in parts) for name in whole.state()}  # as an all-reduce
    for name, tensor in whole.state().items():
        assert torch.equal(merged.state()[name], tensor)
        assert torch.equal(added[name], tensor)
    assert merged.compute() == whole.compute()
    for tensor, reduced in zip(parts[0].state().values(), added.values(), strict=True):
        tensor.copy_(reduced)  # in place, as a collective does
    assert parts[0].compute() == whole.compute()
    merged.reset()
    merged.update(maps, masks)
    assert merged.compute() == whole.compute()


def test_number_of_threads_does_not_change_the_histograms():
    native = pytest.importorskip("recontrast._metrics")
    maps, masks = some_maps(n=20, size=200)
    counts = [np.zeros((3, 5000), np.int64) for _ in range(4)]
    regions = [native.histogram(maps, masks, c, 12, 250000, t) for c, t in zip(counts, (1, 0, 2, 7), strict=True)]
    assert len(set(regions)) == 1
    assert counts[0][:2].sum() == maps.size
    for other in counts[1:]:
        np.testing.assert_array_equal(counts[0], other)


def test_invalid_batches_are_not_added():
    maps, masks = some_maps()
    streaming = accumulate(maps, masks)
    before = streaming.compute()
    for wrong, message in [
        (np.where(masks, np.nan, maps), f"maps: wanted finite numbers, got {masks.sum()} NaN and 0 infinite"),
        (maps + 2, r"maps: wanted values in \[0, 2\], got values from 2\.\d+ to 2\.\d+"),
        (maps - 1, r"maps: wanted values in \[0, 2\], got values from -0\.\d+ to"),
        (maps[:5], r"masks: wanted the shape of maps, \(5, 32, 32\), got \(6, 32, 32\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            streaming.update(wrong, masks)
    assert streaming.compute() == before
    assert streaming.totals[0] == 6


def test_invalid_arguments_raise():
    maps, masks = some_maps()
    with pytest.raises(ValueError, match=r"masks: wanted at least .* 0 positive and 0 negative in 0 images"):
        metrics.Streaming(2.0).compute()
    with pytest.raises(ValueError, match=r"masks: .* 0 positive and 6144 negative in 6 images"):
        accumulate(maps, masks & False).compute()
    for high in (0, -1, float("nan"), float("inf"), 1e30):
        with pytest.raises(ValueError, match="high: wanted the largest value of a map, from 1e-20 to 1e20, got"):
            metrics.Streaming(high)
    with pytest.raises(ValueError, match=r"limit: wanted a false positive rate in \(0, 1\], got 0"):
        metrics.Streaming(2.0, 0)
    with pytest.raises(ValueError, match=r"merge: other: wanted high and limit \(2.0, 0.3\), got \(12.0, 0.3\)"):
        accumulate(maps, masks).merge(metrics.Streaming(12.0, detail=DETAIL))
    with pytest.raises(ValueError, match="merge: counts: wanted int64"):
        accumulate(maps, masks).merge(metrics.Streaming(3.0, detail=DETAIL).state())
    for detail in (3, 18):
        with pytest.raises(ValueError, match=f"detail: wanted from 4 to 17, got {detail}"):
            metrics.Streaming(2.0, detail=detail)
    crowded = accumulate(maps, masks)
    crowded.totals[1] += 1 << 22
    with pytest.raises(ValueError, match="masks: wanted at most 4194304 regions in all"):
        crowded.compute()


def test_undefined_per_image_aupro_is_nan():
    maps, masks = some_maps()
    maps[3] = 1
    result = accumulate(maps, masks).compute()
    assert np.isnan(result.aupro_per_image)
    assert np.isnan(metrics.pixel_metrics(maps, masks).aupro_per_image)
    assert not np.isnan(result.aupro.value)


def test_memory_does_not_grow_with_the_number_of_images():
    maps, masks = some_maps(n=4, size=64)
    streaming = accumulate(maps, masks)
    tracemalloc.start()
    streaming.update(maps, masks)
    first = tracemalloc.get_traced_memory()[0]
    for _ in range(50):
        streaming.update(maps, masks)
    gc.collect()  # without the compiled metrics, NumPy leaves cycles
    assert tracemalloc.get_traced_memory()[0] - first < 20_000
    tracemalloc.stop()


def test_bounds_of_bins_by_hand():
    # From the top: 2 positive pixels, then 1 positive and 3 good ones, then 1 good one. The first two are one region.
    unit = 1 << bounds.UNIT
    counts = np.array([[1, 0, 3, 0], [0, 0, 1, 2], [0, 0, unit, unit]])
    bins, used = bounds.select_bins(counts, 2)
    assert used.tolist() == [3, 2, 0]
    assert bounds.auroc(bins) == pytest.approx(((2 * 4 + 1 + 1.5) / 12, 1.5 / 12))
    upper, lower = (2 + 3 / 3) / 3, (2 + 1 - 3 * np.log(1 + 1 / 5.5)) / 3
    assert bounds.ap(bins) == pytest.approx(((upper + lower) / 2, (upper - lower) / 2))
    f1, best = bounds.f1_max(bins)
    assert (f1.value + f1.bound, f1.value - f1.bound, best) == pytest.approx((2 * 3 / 6, 2 * 2 / 5, 0))
    rounding = 2.0**-41 * 3 / 2
    assert bounds.aupro(bins, 0.5) == pytest.approx((0.75, 0.25 + rounding))
    assert bounds.aupro(bins, 1.0) == pytest.approx(((3 * 0.75 + 1) / 4, 3 * 0.25 / 4 + rounding))


@pytest.mark.parametrize("on_device", [False, True])
def test_f1_threshold_of_float64_maps_reaches_the_promised_f1(on_device, monkeypatch):
    """Values within a float32 rounding of the lower edge of a bin, on both sides."""
    if on_device:
        monkeypatch.setattr(inputs, "native", None)
    random = np.random.default_rng(0)
    for _ in range(200):
        masks = random.random((1, 6, 7)) < 0.4
        masks[0, 0, :2] = True, False
        edges = (1 + random.integers(0, 3, masks.shape) * 2.0**-17).astype(np.float32)
        maps = edges.astype(np.float64) + random.integers(-2, 3, masks.shape) * 2.0**-27
        streaming = accumulate(maps, masks, high=4.0)
        result = streaming.compute()
        called = maps >= result.f1_threshold
        f1 = 2 * (called & masks).sum() / (called.sum() + masks.sum())
        assert f1 == pytest.approx(result.f1_max.value - result.f1_max.bound, abs=1e-12)


def test_clipped_values_count_as_the_largest():
    maps = np.random.default_rng(3).uniform(0, 3, (4, 16, 16)).astype(np.float32)
    masks = np.random.default_rng(4).random((4, 16, 16)) < 0.1
    clipped, plain = metrics.Streaming(2.0, clip=True), metrics.Streaming(2.0)
    clipped.update(maps, masks)
    plain.update(np.minimum(maps, 2.0), masks)
    assert torch.equal(clipped.counts, plain.counts) and torch.equal(clipped.totals, plain.totals)
    for value in (np.inf, np.nan):
        broken = maps.copy()
        broken[1, 2, 3] = value
        with pytest.raises(ValueError, match="maps"):
            clipped.update(broken, masks)


def test_arrays_with_negative_steps_and_foreign_byte_order(monkeypatch):
    """PyTorch takes neither, also not where NumPy calls the array contiguous since an axis has length 1."""
    monkeypatch.setattr(inputs, "native", None)
    maps = np.random.default_rng(3).uniform(0, 1, (4, 1, 16)).astype(">f4")[:, ::-1]
    masks = (np.random.default_rng(4).random((4, 1, 16)) < 0.3)[:, ::-1]
    for clip in (False, True):
        given, plain = metrics.Streaming(2.0, clip=clip), metrics.Streaming(2.0)
        given.update(maps, masks)
        plain.update(maps.astype(np.float32).copy(), masks.copy())
        assert torch.equal(given.counts, plain.counts) and torch.equal(given.totals, plain.totals)
