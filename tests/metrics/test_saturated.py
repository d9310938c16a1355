"""recontrast.metrics.saturated, f1_at and merge_views against their definitions, one threshold at a time."""

from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_cases import spro_by_definition
from sklearn.metrics import f1_score

from recontrast import metrics
from recontrast.metrics import saturated
from recontrast.metrics.saturated import SaturatedOverlap, aupro_saturated, saturation_area


@st.composite
def cases(draw):
    """Draw small maps of several sizes, with ties or without, and overlapping defects with saturation areas."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    levels, whole = draw(st.sampled_from([2, 6, 10**6])), draw(st.booleans())
    maps, defects, saturations = [], [], []
    for number in range(draw(st.integers(1, 4))):
        shape = tuple(rng.integers(2, 8, 2))
        maps.append((rng.integers(0, levels, shape) / 7).astype(draw(st.sampled_from([np.float32, np.float64]))))
        count = 0 if number == 1 else draw(st.integers(1, 3))
        masks = rng.random((count, *shape)) < 0.3
        masks[:, 0, 0], masks[:, -1, -1] = True, False  # each has a pixel, and there is a good pixel
        defects.append(masks)
        saturations.append([rng.integers(1, n + 1) if whole else n * (0.05 + 0.95 * rng.random())
                            for n in masks.sum(axis=(1, 2))])  # fmt: skip
    return maps, defects, saturations


@given(cases(), st.sampled_from([0.05, 0.3, 1.0]))
@settings(deadline=None, max_examples=100)
def test_spro_equals_its_definition(case, limit):
    expected = spro_by_definition(*case, limit)
    assert aupro_saturated(*case, limit) == pytest.approx(expected, abs=1e-12)
    maps, defects, saturations = case
    pixels = sum(anomaly.size for anomaly in maps)
    halves = [SaturatedOverlap(pixels, limit) for _ in range(2)]
    with mock.patch.object(saturated, "SLACK", 0):  # drops scores of small images too
        for number, image in enumerate(zip(maps, defects, saturations, strict=True)):
            halves[number % 2].update(*image)
        halves[0].merge(halves[1])
    assert halves[0].compute() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("levels", [50, 2**24])
def test_large_images_keep_few_scores(levels):
    """Many more good pixels than are kept, with ties at the smallest kept score."""
    rng = np.random.default_rng(levels)
    maps = np.floor(rng.random((12, 200, 200)) ** 2 * levels).astype(np.float32)
    masks = rng.random((12, 1, 200, 200)) < 0.01
    areas = [[0.3 * mask.sum()] for mask in masks]
    overlap = SaturatedOverlap(maps.size, 0.05)
    for image in zip(maps, masks, areas, strict=True):
        overlap.update(*image)
    assert overlap.good.size < 0.2 * overlap.good.total
    kept_all = SaturatedOverlap(20 * maps.size, 0.05)
    for image in zip(maps, masks, areas, strict=True):
        kept_all.update(*image)
    assert kept_all.good.size == kept_all.good.total  # nothing was dropped
    assert overlap.compute() == kept_all.compute()


def test_spro_of_whole_regions_is_aupro():
    """If each region is a defect that saturates at its whole area, both are the same."""
    rng = np.random.default_rng(3)
    maps, masks = rng.random((4, 20, 20)), rng.random((4, 20, 20)) < 0.1
    labels, _ = metrics.regions(masks)
    defects = [np.stack([image == n for n in np.unique(image) if n]) for image in labels]
    areas = [masks.sum(axis=(1, 2)) for masks in defects]
    assert aupro_saturated(maps, defects, areas, 0.3) == pytest.approx(metrics.aupro(maps, masks, 0.3), abs=1e-12)


def test_saturation_areas_are_those_of_the_benchmark():
    assert saturation_area(1000, 120, False) == 120 and saturation_area(100, 120, False) == 100
    assert saturation_area(999, 0.5, True) == 499 and saturation_area(1, 0.5, True) == 1
    for area, threshold, relative in ((0, 1, True), (5, 0, False), (5, 1.5, True), (5, float("nan"), False)):
        with pytest.raises(ValueError, match="saturation: wanted a"):
            saturation_area(area, threshold, relative)


@pytest.mark.parametrize(
    "maps, defects, areas, message",
    [
        (np.ones((2, 3)), np.ones((1, 3, 2)), [1], r"wanted \(D, H, W\) for a map"),
        (np.ones((2, 3)), np.ones((1, 2, 3)), [], "and 0"),
        (np.full((2, 3), np.nan), np.ones((1, 2, 3)), [1], "wanted finite numbers"),
        (np.ones((2, 3)), np.ones((1, 2, 3)), [7], "wanted from 0 to 6 pixels, got 7"),
        (np.ones((2, 3)), np.full((1, 2, 3), 3), [1], "wanted bool, 0/1 or 0/255"),
    ],
)
def test_invalid_images(maps, defects, areas, message):
    overlap = SaturatedOverlap(6)
    with pytest.raises(ValueError, match=message):
        overlap.update(maps, defects, areas)
    with pytest.raises(ValueError, match="wanted at least one defect and one good pixel, got 0 and 0"):
        overlap.compute()


def test_invalid_accumulators():
    with pytest.raises(ValueError, match="wanted those of 1 maps, got 0 and 1"):
        aupro_saturated([np.ones((2, 2))], [], [[1]])
    with pytest.raises(ValueError, match=r"merge: wanted pixels and limit 4 and 0\.05"):
        SaturatedOverlap(4).merge(SaturatedOverlap(5))
    overlap = SaturatedOverlap(2)
    overlap.update(np.arange(9.0).reshape(3, 3), np.eye(3, dtype=bool)[None], [1])
    with pytest.raises(ValueError, match="wanted at most 2, as announced, got 6"):
        overlap.compute()


def test_f1_at_a_threshold_equals_sklearn():
    rng = np.random.default_rng(5)
    maps, masks = rng.integers(0, 9, (3, 7, 8)).astype(np.float32), rng.random((3, 7, 8)) < 0.3
    inside = rng.random((3, 7, 8)) < 0.7
    for threshold in (0, 3, 4.5, 8, 20):
        expected = f1_score(masks.ravel(), maps.ravel() >= threshold, zero_division=0)
        assert metrics.f1_at(maps, masks, threshold) == pytest.approx(expected, abs=1e-12)
        expected = f1_score(masks[inside], maps[inside] >= threshold, zero_division=0)
        assert metrics.f1_at(maps, masks, threshold, inside=inside) == pytest.approx(expected, abs=1e-12)
    best = metrics.pixel_metrics(maps, masks)
    assert metrics.f1_at(maps, masks, best.f1_threshold) == pytest.approx(best.f1_max, abs=1e-12)
    with pytest.raises(ValueError, match="wanted at least one positive"):
        metrics.f1_at(maps, np.zeros_like(masks), 3)
    with pytest.raises(ValueError, match="finite threshold"):
        metrics.f1_at(maps, masks, np.inf)


def test_views_of_a_sample_count_as_one():
    rng = np.random.default_rng(6)
    samples = [f"part{number}" for number in rng.integers(0, 12, 60)]
    scores, labels = rng.integers(0, 20, 60).astype(np.float32), rng.random(60) < 0.1
    labels[:2] = True, False
    merged, positive = metrics.merge_views(scores, labels, samples)
    expected = {}
    for sample, score, label in zip(samples, scores, labels, strict=True):
        best, any_label = expected.get(sample, (-1, False))
        expected[sample] = (max(best, score), any_label or label)
    assert list(zip(merged.tolist(), positive.tolist(), strict=True)) == list(expected.values())
    assert merged.dtype == np.float32
    with pytest.raises(ValueError, match="wanted one for each of the scores"):
        metrics.merge_views(scores, labels, samples[1:])
