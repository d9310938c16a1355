"""Maps and scores of a region of interest equal an independent float64 restatement."""

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F

from recontrast import AnomalyMap
from recontrast.inside import pool_inside
from recontrast.recipes.paper import RECIPES

SQUARE = [(16, 16), (8, 8), (4, 4)], (64, 64)
ODD = [(9, 13), (5, 7), (2, 3)], (57, 91)


def restate_map(distances, inside, sizes, out, blur, align_corners=True):
    """Mean of the distances of the points inside, weighted by interpolation and blur, summed over the levels."""

    def spread(values):  # (N, h, w) -> (N, H, W)
        values = F.interpolate(values[:, None], size=out, mode="bilinear", align_corners=align_corners)[:, 0]
        if blur == "reflect":
            return torch.from_numpy(np.stack([scipy.ndimage.gaussian_filter(v, 4) for v in values.numpy()]))
        if blur == "zero5":
            x = torch.arange(5.0, dtype=torch.float64) - 2
            kernel = torch.exp(-(x[:, None] ** 2 + x**2) / 32)
            return F.conv2d(values[:, None], (kernel / kernel.sum())[None, None], padding=2)[:, 0]
        return values

    total = torch.zeros(len(distances[0]), *out, dtype=torch.float64)
    for i, d in enumerate(distances):
        points = pool_inside(inside, sizes[i % len(sizes)]).double().expand(d.shape)
        weights = spread(points)
        total += torch.where(inside, spread(d.double() * points) / weights * spread(torch.ones_like(points)), 0)
    return total


def make_distances(sizes, images=2, groups=2):
    return [torch.rand(images, *size) for size in sizes * groups]


def make_region(out, images=2):
    inside = torch.zeros(images, *out, dtype=torch.bool)
    inside[0, 5 : out[0] // 2, 3 : out[1] // 3] = True
    inside[-1, out[0] // 3 :, out[1] // 2 :] = True
    inside[-1, 0, 0] = True  # a single pixel
    return inside


@pytest.mark.parametrize("method", ["fused", "matmul"])
@pytest.mark.parametrize("blur", ["reflect", "zero5", None])
@pytest.mark.parametrize("sizes, out", [SQUARE, ODD, ([(3, 3)], (5, 7))], ids=["square", "odd", "tiny"])
def test_maps(sizes, out, blur, method):
    distances = make_distances(sizes)
    region = make_region(out) if out[0] > 10 else torch.rand(2, *out) < 0.5
    region[:, 2, 3] = True
    for inside in (region, region[:1]):
        for align_corners in (True, False):
            amap = AnomalyMap(sizes, out, blur, method=method, align_corners=align_corners)
            maps, maximum = amap.from_distances(distances, inside)
            expected = restate_map(distances, inside, sizes, out, blur, align_corners)
            torch.testing.assert_close(maps.double(), expected, rtol=2e-5, atol=2e-6)
            assert not maps[~inside.expand_as(maps)].any()
            mask = inside.expand_as(maps)
            assert all(m == values[i].max() for m, values, i in zip(maximum, maps, mask, strict=True))


@pytest.mark.parametrize("method", ["fused", "matmul"])
def test_region_of_all_pixels_changes_nothing(method):
    sizes, out = ODD
    distances = make_distances(sizes)
    for blur in ("reflect", "zero5", None):
        amap = AnomalyMap(sizes, out, blur, "mean", method)
        for ours, theirs in zip(
            amap.from_distances(distances, torch.ones(1, *out, dtype=torch.bool)),
            amap.from_distances(distances),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_border_neither_glows_nor_fades():
    """Equal distances inside give an even map, whatever lies outside."""
    sizes, out = SQUARE
    inside = make_region(out)
    for blur in ("reflect", None):
        amap = AnomalyMap(sizes, out, blur)
        distances = [torch.where(pool_inside(inside, size), 0.3, torch.nan) for size in sizes]
        maps, maximum = amap.from_distances(distances, inside)
        torch.testing.assert_close(maps[inside], torch.full_like(maps[inside], 0.9), rtol=1e-5, atol=1e-6)
        assert maximum.isfinite().all()


def test_scores_count_pixels_inside_alone():
    maps = torch.rand(3, 20, 30) - 0.5  # rounding can make values negative
    inside = torch.rand(3, 20, 30) < 0.4
    inside[2] = False
    inside[2, 4, 5] = True
    amap = AnomalyMap([4], (20, 30))
    for mask in (inside, inside[:1]):
        pixels = [m[i].sort(descending=True).values for m, i in zip(maps, mask.expand_as(maps), strict=True)]
        expected = {
            "max": [p[0] for p in pixels],
            "mean": [p.mean() for p in pixels],
            0.1: [p[: max(int(len(p) * 0.1), 1)].mean() for p in pixels],
            1.0: [p.mean() for p in pixels],
        }
        for how, scores in expected.items():
            torch.testing.assert_close(amap.score(maps, how, mask), torch.stack(scores))
    maps[0][~inside[0]] = torch.nan
    maps[1][inside[1]] = torch.inf
    scores = amap.score(maps, "max", inside)
    assert scores[0].isfinite()
    assert scores[1].isnan()


def test_each_pixel_inside_has_points_near_it():
    """At every size of the recipes, so that no weight is zero."""
    for recipe in RECIPES.values():
        out = recipe.map_out
        through = None if recipe.map_size is None else recipe.out
        for strides in ((4, 8, 16), (14,), (8,)):
            if any(side % strides[-1] for side in recipe.out):
                continue
            sizes = [(recipe.out[0] // s, recipe.out[1] // s) for s in strides]
            for align_corners in (True, False):
                amap = AnomalyMap(sizes, out, recipe.blur, align_corners=align_corners, through=through)
                inside = torch.zeros(8, *out, dtype=torch.bool)
                for n in range(8):
                    inside[n, torch.randint(out[0], ()), torch.randint(out[1], ())] = True
                maps, maximum = amap.from_distances([torch.full((8, *size), 0.5) for size in sizes], inside)
                wanted = maps.new_full((8,), 0.5 * len(sizes))
                if recipe.blur != "zero5":
                    torch.testing.assert_close(maximum, wanted, rtol=1e-4, atol=0)
                else:
                    assert (maximum > 0.2).all()


def test_gradient_and_errors():
    sizes, out = SQUARE
    distances = [d.requires_grad_() for d in make_distances(sizes, groups=1)]
    inside = make_region(out)
    amap = AnomalyMap(sizes, out)
    amap.from_distances(distances, inside)[0].sum().backward()
    for d, size in zip(distances, sizes, strict=True):
        assert (d.grad[~pool_inside(inside, size)] == 0).all()
        assert d.grad.any()
    with pytest.raises(
        ValueError, match=r"AnomalyMap: inside: wanted bool \(2, 64, 64\) or \(1, 64, 64\), got torch.float32"
    ):
        amap.from_distances([d.detach() for d in distances], inside.float())
