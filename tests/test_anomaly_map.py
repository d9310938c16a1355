"""AnomalyMap equals interpolation followed by SciPy's blur, as upstream; image scores."""

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

from recontrast import AnomalyMap
from recontrast.loss import point_distance

SIZES, OUT = [(16, 16), (8, 8), (4, 4)], (64, 64)
ODD = [(9, 13), (5, 7), (2, 3)], (57, 91)


def make_pairs(sizes, groups=2, images=2, channels=6):
    return [tuple(torch.randn(images, channels, *size).relu() for _ in "ts") for size in sizes * groups]


def upsample_and_sum(pairs, out):
    """Compute the sum of the point distances at image size, float64."""
    maps = [point_distance(t.double(), s.double()).unsqueeze(1) for t, s in pairs]
    return sum(F.interpolate(m, size=out, mode="bilinear", align_corners=True) for m in maps)[:, 0]


@pytest.mark.parametrize("method", ["fused", "matmul"])
@pytest.mark.parametrize("sizes, out", [(SIZES, OUT), ODD, ([(3, 3)], (5, 7))], ids=["square", "odd", "tiny"])
class TestProtocols:
    def test_single_class(self, sizes, out, method):
        batch = make_pairs(sizes)
        maps = AnomalyMap(sizes, out, method=method)(batch)
        expected = np.stack([scipy.ndimage.gaussian_filter(m, 4) for m in upsample_and_sum(batch, out).numpy()])
        np.testing.assert_allclose(maps, expected, rtol=1e-5, atol=1e-6)

    def test_unified(self, sizes, out, method):
        batch = make_pairs(sizes)
        maps = AnomalyMap(sizes, out, blur="zero5", reduce="mean", method=method)(batch)
        x = torch.arange(5.0, dtype=torch.float64) - 2
        kernel = torch.exp(-(x.unsqueeze(1) ** 2 + x**2) / (2 * 4.0**2))
        kernel = (kernel / kernel.sum()).expand(1, 1, 5, 5)
        mean = upsample_and_sum(batch, out).unsqueeze(1) / len(batch)
        torch.testing.assert_close(maps.double(), F.conv2d(mean, kernel, padding=2)[:, 0], rtol=1e-5, atol=1e-6)

    def test_no_blur(self, sizes, out, method):
        batch = make_pairs(sizes)
        maps = AnomalyMap(sizes, out, blur=None, method=method)(batch)
        torch.testing.assert_close(maps.double(), upsample_and_sum(batch, out), rtol=1e-5, atol=1e-6)


def test_integer_sizes_are_squares():
    batch = make_pairs(SIZES)
    torch.testing.assert_close(AnomalyMap([16, 8, 4], 64)(batch), AnomalyMap(SIZES, OUT)(batch), rtol=0, atol=0)


def test_largest_values_of_sum_and_mean():
    batch = [(t + 1, -t - 1) for t, _ in make_pairs(SIZES)]  # the largest distance at every point
    torch.testing.assert_close(AnomalyMap(SIZES, OUT)(batch), torch.full((2, *OUT), 12.0))
    torch.testing.assert_close(AnomalyMap(SIZES, OUT, reduce="mean")(batch), torch.full((2, *OUT), 2.0))


@pytest.mark.parametrize("how", ["max", "mean", 0.01, 1.0])
@pytest.mark.parametrize("method", ["fused", "matmul"])
def test_image_scores(how, method):
    amap, batch = AnomalyMap(SIZES, OUT, method=method), make_pairs(SIZES)
    maps, scores = amap.maps_and_scores(batch, how)
    ranked = maps.flatten(1).sort(descending=True).values
    expected = {"max": ranked[:, 0], "mean": ranked.mean(1), 0.01: ranked[:, :40].mean(1), 1.0: ranked.mean(1)}[how]
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(amap.score(maps, how), expected)


def test_score_of_a_fraction_uses_655_pixels_at_256():
    maps = torch.rand(1, 256, 256)
    expected = maps.flatten().topk(655).values.mean()
    torch.testing.assert_close(AnomalyMap([4], 256).score(maps, 0.01)[0], expected)


def test_gradient_reaches_the_features():
    batch = [(t, s.requires_grad_()) for t, s in make_pairs(SIZES, images=1)]
    AnomalyMap(SIZES, OUT)(batch).sum().backward()
    assert all(s.grad.abs().sum() > 0 for _, s in batch)


def test_maps_of_bfloat16_features_and_in_autocast_are_float32():
    batch = [(t.bfloat16(), s) for t, s in make_pairs(SIZES)]
    expected = AnomalyMap(SIZES, OUT)([(t.float(), s) for t, s in batch])
    for method in ("fused", "matmul"):
        with torch.autocast("cpu", torch.bfloat16):
            maps = AnomalyMap(SIZES, OUT, method=method)(batch)
        assert maps.dtype == torch.float32
        torch.testing.assert_close(maps, expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"blur": "gauss"}, "blur: wanted one of .* got 'gauss'"),
        ({"reduce": "max"}, "reduce: wanted one of .* got 'max'"),
        ({"method": "fast"}, "method: wanted one of .* got 'fast'"),
        ({"sizes": []}, "at least 1 px"),
        ({"out": 0}, "at least 1 px"),
    ],
)
def test_invalid_arguments_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        AnomalyMap(**{"sizes": SIZES, "out": OUT, **arguments})


def test_invalid_pairs_and_scores_raise():
    amap = AnomalyMap(SIZES, OUT)
    with pytest.raises(ValueError, match="multiple of 3 pairs, one for each level, got 4"):
        amap(make_pairs(SIZES)[:4])
    with pytest.raises(ValueError, match=r"pair 0: wanted features of size \(16, 16\), got \(8, 8\)"):
        amap(make_pairs(SIZES)[1:4])
    for how in ("min", 0, 1.5):
        with pytest.raises(ValueError, match="how: wanted 'max', 'mean' or a fraction"):
            amap.score(torch.rand(1, 4, 4), how)
