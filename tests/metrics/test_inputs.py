"""Valid and invalid inputs of the metrics."""

import subprocess
import sys
from dataclasses import astuple

import numpy as np
import pytest
import torch
from metric_cases import some_maps

from recontrast import metrics
from recontrast.metrics import inputs


@pytest.mark.parametrize("shape", [(6, 32, 32), (6, 1, 32, 32), (2, 3, 1, 32, 32), (192, 32)])
@pytest.mark.parametrize("mask", [np.bool_, np.uint8, np.int64, np.float32])
@pytest.mark.parametrize("high", [1, 255])
def test_shapes_and_mask_types(shape, mask, high):
    maps, masks = some_maps()
    expected = metrics.pixel_metrics(maps, masks)
    masks = (masks * high).astype(mask)
    result = metrics.pixel_metrics(maps.reshape(shape), masks.reshape(shape))
    # As one tall image, the maps have other regions: only the first four metrics stay equal.
    count = 4 if len(shape) == 2 else 6
    assert astuple(result)[:count] == astuple(expected)[:count]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_tensors(dtype, device):
    maps, masks = (torch.from_numpy(x).to(device) for x in some_maps())
    maps = maps.to(dtype).requires_grad_()
    expected = metrics.pixel_metrics(maps.detach().float().cpu().numpy(), masks.cpu().numpy())
    result = metrics.pixel_metrics(maps[:, None], masks[:, None].byte())
    assert astuple(result)[:5] == astuple(expected)[:5]
    # The 200 thresholds of an image differ in float64.
    assert result.aupro_per_image == pytest.approx(expected.aupro_per_image, abs=1e-3)


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


def test_memory_maps(tmp_path):
    maps, masks = some_maps()
    for name, array in {"maps": maps, "masks": masks}.items():
        np.save(tmp_path / f"{name}.npy", array)
    mapped = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("maps", "masks"))
    assert metrics.pixel_metrics(*mapped) == metrics.pixel_metrics(maps, masks)


def test_numpy_without_the_compiled_module():
    code = """
import sys
sys.modules["recontrast._metrics"] = None
from recontrast import metrics
print(metrics.REGIONS_BACKEND, metrics.auroc([1, 2, 3], [0, 1, 0]), metrics.regions([[1, 0], [0, 1]])[1])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["scipy", "0.5", "1"], result.stderr


@pytest.mark.parametrize("metric", [metrics.auroc, metrics.ap, metrics.f1_max, metrics.accuracy, metrics.image_metrics])
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
def test_invalid_scores_and_labels_raise(metric, scores, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(np.array(scores), np.array(labels))


def compute_streaming(maps, masks, limit=0.3, **options):
    streaming = metrics.Streaming(2.0, limit)
    streaming.update(maps, masks, **options)
    return streaming.compute()


METRICS = [metrics.aupro, metrics.pixel_metrics, compute_streaming]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("metric", METRICS)
def test_invalid_maps_and_masks_raise(metric, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(inputs, "native", None)
    maps, masks = some_maps()
    with pytest.raises(ValueError, match=r"maps: wanted \(\.\.\., H, W\), got shape \(32,\)"):
        metric(maps[1, 10], np.arange(32) > 3)
    with pytest.raises(ValueError, match=r"masks: wanted the shape of maps, \(6, 32, 32\), got \(6, 1, 32, 32\)"):
        metric(maps, masks[:, None])
    with pytest.raises(ValueError, match="masks: wanted at least one positive and one negative, got 0 positive"):
        metric(maps, np.zeros_like(masks))
    with pytest.raises(ValueError, match="maps: wanted finite numbers, got 1 NaN"):
        metric(np.where(np.arange(32 * 32 * 6).reshape(maps.shape) == 7, np.nan, maps), masks)
    infinite = maps.copy()
    infinite[:2, 3, 4] = np.inf, -np.inf
    with pytest.raises(ValueError, match="maps: wanted finite numbers, got 0 NaN and 2 infinite of 6144"):
        metric(infinite, masks)
    for shape in ((0, 4, 4), (3, 0, 4)):
        with pytest.raises(ValueError, match=r"maps: wanted at least one pixel of one image, got shape \("):
            metric(np.zeros(shape), np.zeros(shape, bool))
    grey = masks * np.uint8(255)
    grey[2, 3, 4:6] = 127, 1
    with pytest.raises(ValueError, match=r"masks: wanted bool, 0/1 or 0/255, got others among \[  1 127 255\]"):
        metric(maps, grey)
    for limit in (0, 1.5, float("nan"), (0.3, 2), -0.1):
        with pytest.raises(ValueError, match=r"limit: wanted a false positive rate in \(0, 1\]"):
            metric(maps, masks, limit)
    with pytest.raises(ValueError, match="limit: wanted at least one false positive rate, got none"):
        metric(maps, masks, ())


def test_unknown_mode_raises():
    with pytest.raises(ValueError, match='mode: wanted "dataset" or "per-image", got \'images\''):
        metrics.aupro(*some_maps(), mode="images")


@pytest.mark.parametrize("metric", METRICS)
def test_masks_that_contradict_labels_raise(metric):
    maps, masks = some_maps()
    labels = masks.any(axis=(1, 2))
    expected = metric(maps, masks)
    assert metric(maps, masks, labels=labels) == expected
    assert metric(maps, masks, labels=torch.from_numpy(labels * 1)) == expected
    labels[0] = True
    with pytest.raises(ValueError, match=r"masks: image 0 \(counted from 0\), which labels call anomalous, has an"):
        metric(maps, masks, labels=labels)
    labels[:4] = False
    message = rf"masks: image 1 \(counted from 0\), which labels call good, has {masks[1].sum()} positive pixels"
    with pytest.raises(ValueError, match=message):
        metric(maps, masks, labels=labels)
    with pytest.raises(ValueError, match=r"labels: wanted one for each of 6 images, got shape \(5,\)"):
        metric(maps, masks, labels=labels[1:])


def test_per_image_aupro_needs_both_classes():
    maps, masks = some_maps()
    with pytest.raises(ValueError, match="masks: wanted at least one positive and one negative, got 0 positive"):
        metrics.aupro(maps, np.zeros_like(masks), mode="per-image")


def test_error_names_the_image_without_a_per_image_aupro():
    maps, masks = some_maps()
    masks[2] = False
    maps[3], masks[3, :2] = 1, True
    with pytest.raises(ValueError, match=r"image 3 \(counted from 0\) has a constant map"):
        metrics.aupro(maps, masks, mode="per-image")
    assert np.isnan(metrics.pixel_metrics(maps, masks).aupro_per_image)
    maps[3, 0, 0], masks[3] = 2, True
    with pytest.raises(ValueError, match=r"image 3 \(counted from 0\) has no good pixel"):
        metrics.aupro(maps, masks, mode="per-image")
    masks[3, 9] = False
    maps[3, 0, :2] = -3e38, 3e38
    with pytest.raises(ValueError, match=r"image 3 \(counted from 0\) has a range of values beyond float32"):
        metrics.aupro(maps, masks, mode="per-image")


def make_unaligned(array):
    """The same numbers one byte beyond an aligned address, as a memory map of a file with a header of one byte."""
    memory = np.zeros(array.nbytes + 1, np.uint8)
    shifted = memory[1:].view(array.dtype).reshape(array.shape)
    shifted[...] = array
    assert not shifted.flags.aligned
    return shifted


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
def test_unaligned_arrays_give_the_same_metrics(dtype):
    random = np.random.default_rng(0)
    masks = np.zeros((2, 9, 8), bool)
    masks[0, 2:5, 3:6] = True
    maps = (random.random(masks.shape) + masks).astype(dtype)
    assert metrics.pixel_metrics(make_unaligned(maps), masks) == metrics.pixel_metrics(maps, masks)
    labels = masks.any((1, 2)).astype(np.int32)
    expected = metrics.image_metrics(maps.max((1, 2)), labels)
    assert metrics.image_metrics(make_unaligned(maps.max((1, 2))), make_unaligned(labels)) == expected
    ours, theirs = metrics.Streaming(4.0), metrics.Streaming(4.0)
    ours.update(make_unaligned(maps), masks)
    theirs.update(maps, masks)
    assert torch.equal(ours.counts, theirs.counts) and torch.equal(ours.totals, theirs.totals)


def test_memory_maps_at_any_offset(tmp_path):
    masks = np.zeros((2, 9, 8), bool)
    masks[0, 2:5, 3:6] = True
    maps = np.random.default_rng(0).random(masks.shape, np.float32)
    (tmp_path / "maps").write_bytes(b"h" + maps.tobytes())
    mapped = np.memmap(tmp_path / "maps", np.float32, "r", 1, maps.shape)
    assert metrics.pixel_metrics(mapped, masks) == metrics.pixel_metrics(maps, masks)
