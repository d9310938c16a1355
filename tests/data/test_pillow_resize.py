"""recontrast.data.pillow_resize: bit-identical to Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image

from recontrast.data.exact_length import MAX_REDUCTION, max_exact_length
from recontrast.data.images import fit_picture
from recontrast.data.pillow_resize import PillowResize, compute_coefficients


def resize_with_pillow(images, out):
    return np.stack([fit_picture(Image.fromarray(image), size=out) for image in images]).transpose(0, 3, 1, 2)


def resize(images, out):
    return PillowResize(out)(torch.from_numpy(images)).numpy()


def random_sizes(rng):
    """Yield 100 pairs of input and output sizes, from one pixel to the largest reduction."""
    for _ in range(100):
        out = tuple(rng.integers(1, 80, 2).tolist())
        yield tuple(min(int(2 ** rng.uniform(0, 9)), MAX_REDUCTION * o) for o in out), out


def test_equals_pillow_for_random_sizes():
    rng = np.random.default_rng()
    for (height, width), out in random_sizes(rng):
        images = rng.integers(0, 256, (1, height, width, 3), np.uint8)
        if rng.integers(2):
            images = np.where(images < 128, np.uint8(0), np.uint8(255))  # gives the largest sums
        expected = resize_with_pillow(images, out)
        np.testing.assert_array_equal(resize(images, out), expected, err_msg=f"{images.shape} to {out}")


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 700), (256, 256), (257, 255), (255, 257), (1080, 1920), (15360, 3), (3, 15360), (700, 2)]
)
def test_equals_pillow_for_common_sizes(shape):
    images = np.random.default_rng().integers(0, 256, (2, *shape, 3), np.uint8)
    np.testing.assert_array_equal(resize(images, (256, 256)), resize_with_pillow(images, (256, 256)))


@pytest.mark.parametrize(("length", "out"), [(1, 1), (1, 7), (7, 7), (8, 7), (6, 7), (1000, 17), (15360, 256)])
def test_coefficients_equal_float64(length, out):
    digits, _ = compute_coefficients(length, out)
    weights = digits[:out].double() * 2048 + digits[out:].double()
    centre = (torch.arange(out, dtype=torch.float64) + 0.5) * length / out
    distance = (torch.arange(length) + 0.5 - centre.unsqueeze(1)).abs() / max(length / out, 1)
    triangle = (1 - distance).clamp(min=0)
    exact = triangle / triangle.sum(1, keepdim=True) * 2**22
    assert (weights - exact).abs().max() <= 0.5 + 1e-6
    assert digits[out:].abs().max() <= 1024


def test_max_exact_length():
    assert max_exact_length(256) == 15360 and max_exact_length(1) == 60 and max_exact_length(2048) == 92681
    assert 92681**2 <= 2**22 * 2048 < 92682**2
