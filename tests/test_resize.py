import numpy as np
import pytest
import torch
from PIL import Image

from recontrast.data.pictures import tall_first
from recontrast.engine.resize import MOST, Resize, coefficients, fits, tall


def pillow(images, out):
    resized = [Image.fromarray(image).resize(out[::-1], Image.Resampling.BILINEAR) for image in images]
    return np.stack([np.asarray(image) for image in resized]).transpose(0, 3, 1, 2)


def ours(images, out):
    found = (Resize(out, tall_first(), branch)(torch.from_numpy(images)).numpy() for branch in (True, False))
    one, other = found
    np.testing.assert_array_equal(one, other)
    return one


def some(random):
    """Sizes up, down and across, one pixel and the largest scale among them."""
    for _ in range(100):
        out = tuple(random.integers(1, 80, 2).tolist())
        yield tuple(min(int(2 ** random.uniform(0, 9)), MOST * o) for o in out), out


def test_to_the_bit_on_many_sizes():
    random = np.random.default_rng()
    for (height, width), out in some(random):
        images = random.integers(0, 256, (1, height, width, 3), np.uint8)
        if random.integers(2):
            images = np.where(images < 128, np.uint8(0), np.uint8(255))  # the largest sums
        np.testing.assert_array_equal(ours(images, out), pillow(images, out), err_msg=f"{images.shape} to {out}")


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 700), (256, 256), (257, 255), (255, 257), (1080, 1920), (15360, 3), (3, 15360), (700, 2)]
)
def test_to_the_bit_at_real_sizes(shape):
    images = np.random.default_rng().integers(0, 256, (2, *shape, 3), np.uint8)
    np.testing.assert_array_equal(ours(images, (256, 256)), pillow(images, (256, 256)))


def test_order_of_the_passes_is_this_pillows():
    images = np.random.default_rng(0).integers(0, 256, (1, 90, 20, 3), np.uint8)
    out, tensor = (16, 24), torch.from_numpy(images)
    assert tall(90, 20, out)
    first, second = (Resize(out, order)(tensor).numpy() for order in (True, False))
    assert 0.02 < (first != second).mean() < 0.5 and np.abs(first - second).max() == 1
    np.testing.assert_array_equal(first if tall_first() else second, pillow(images, out))
    # The same pixels where nothing is tall.
    wide = torch.from_numpy(images.transpose(0, 2, 1, 3).copy())
    assert torch.equal(Resize(out, True)(wide), Resize(out, False)(wide))


@pytest.mark.parametrize(("length", "out"), [(1, 1), (1, 7), (7, 7), (8, 7), (6, 7), (1000, 17), (15360, 256)])
def test_coefficients_are_those_of_float64(length, out):
    digits, _ = coefficients(length, out)
    weights = digits[:out].double() * 2048 + digits[out:].double()
    centre = (torch.arange(out, dtype=torch.float64) + 0.5) * length / out
    distance = (torch.arange(length) + 0.5 - centre.unsqueeze(1)).abs() / max(length / out, 1)
    triangle = (1 - distance).clamp(min=0)
    exact = triangle / triangle.sum(1, keepdim=True) * 2**22
    assert (weights - exact).abs().max() <= 0.5 + 1e-6
    assert digits[out:].abs().max() <= 1024


def test_fits():
    assert fits(15360, 256) and not fits(15361, 256) and fits(1, 256) and not fits(61, 1)
