"""recontrast.data.fundus: regions equal those of scikit-image, pixels those of OpenCV."""

import zlib

import numpy as np
import pytest
from PIL import Image
from skimage.measure import label, regionprops

from recontrast.data import fundus


def make_noise(rng, shape, share):
    """Return noise on a share of the pixels and black elsewhere: regions of all sizes, some touching at corners."""
    is_lit = rng.random((*shape, 1)) < share
    return (rng.integers(0, 256, (*shape, 3)) * is_lit * rng.uniform(0.1, 1)).astype(np.uint8)


@pytest.mark.parametrize("seed", range(40))
def test_square_equals_the_reference(seed):
    """The square of the reference's ``fundus_crop``, computed with the regions of scikit-image."""
    rng = np.random.default_rng(seed)
    image = make_noise(rng, rng.integers(1, 60, 2), rng.uniform(0.02, 0.9))
    bright = image.sum(-1) > 30
    if not bright.any():
        assert fundus.find_eye_square(image) is None
        return
    labels = label(bright)
    region = max(regionprops(labels), key=lambda region: region.area)
    region_mask = np.zeros_like(bright)
    for row, start, end in zip(*fundus.find_largest_region(bright), strict=True):
        region_mask[row, start:end] = True
    np.testing.assert_array_equal(region_mask, labels == region.label)
    side = max(region.bbox[2] - region.bbox[0], region.bbox[3] - region.bbox[1])
    low, high = ((np.array(region.centroid) + sign * side / 2).astype(int) for sign in (-1, 1))
    assert fundus.find_eye_square(image) == (*(low - 5), *(high + 5))


def test_spiral_is_one_region():
    spiral = np.zeros((61, 61), bool)
    for i in range(0, 30, 2):
        spiral[i, i : 61 - i] = spiral[60 - i, i : 61 - i] = spiral[i : 61 - i, 60 - i] = True
        spiral[i + 2 : 61 - i, i] = True
        spiral[i + 2, i : i + 3] = True
    _, starts, ends = fundus.find_largest_region(spiral)
    assert (ends - starts).sum() == spiral.sum()


def test_crop_is_black_outside_the_image():
    image = np.arange(1, 61, dtype=np.uint8).reshape(4, 5, 3)
    np.testing.assert_array_equal(fundus.crop_with_padding(image, 1, 2, 3, 5), image[1:3, 2:5])
    crop = fundus.crop_with_padding(image, -2, -1, 6, 7)
    np.testing.assert_array_equal(crop[2:6, 1:6], image)
    crop[2:6, 1:6] = 0
    assert crop.shape == (8, 8, 3) and not crop.any()
    assert (
        not fundus.crop_with_padding(image, 9, 9, 12, 12).any()
        and not fundus.crop_with_padding(image, -9, -9, -2, -2).any()
    )


def make_pattern(height, width):
    """Return a deterministic image, (height, width, 3) uint8."""
    y, x, c = np.ogrid[:height, :width, :3]
    return ((y * 31 + x * 17 + c * 101 + (y * x) % 97 * 3) % 256).astype(np.uint8)


# zlib.crc32 of cv2.resize(make_pattern(H, W), (512, 512), interpolation=cv2.INTER_LINEAR) of OpenCV 5.0
OPENCV = {
    (512, 512): 0x1D1EF08F,
    (1024, 1024): 0xADFBAE42,
    (1023, 1025): 0x35CAF935,
    (600, 411): 0x899591A4,
    (2400, 2399): 0xC2165C79,
    (40, 33): 0x7F06C190,
}


@pytest.mark.parametrize("shape, expected", OPENCV.items())
def test_pixels_equal_recorded_opencv(shape, expected):
    assert zlib.crc32(fundus.resize_linear(make_pattern(*shape), 512)) == expected


def test_pixels_equal_installed_opencv():
    """Skipped without OpenCV, which is not a dependency of the tests."""
    cv2 = pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for _ in range(20):
        image = rng.integers(0, 256, (*rng.integers(1, 1500, 2), 3), np.uint8)
        expected = cv2.resize(image, (512, 512), interpolation=cv2.INTER_LINEAR)
        np.testing.assert_array_equal(fundus.resize_linear(image, 512), expected)


def test_resize_is_bilinear():
    """Half-pixel centres without antialiasing; at most one level from the unrounded result."""
    exact = make_pattern(700, 30)
    for length, axis in ((700, 0), (30, 1)):
        centre = ((np.arange(512) + 0.5) * length / 512 - 0.5).clip(0, length - 1)
        first = np.minimum(centre.astype(int), length - 2)
        weight = (centre - first).reshape(-1, *(1,) * (2 - axis))
        exact = np.take(exact, first, axis) * (1 - weight) + np.take(exact, first + 1, axis) * weight
    assert np.abs(fundus.resize_linear(make_pattern(700, 30), 512) - exact).max() <= 1


def test_read_fundus(tmp_path):
    """An eye that exceeds the photograph at the top and bottom is centred, with black margins, in RGB."""
    y, x = np.ogrid[:300, :420]
    is_eye = (y - 140) ** 2 + (x - 200) ** 2 < 160**2
    image = np.where(is_eye[..., None], np.uint8([200, 90, 20]), np.uint8([5, 6, 7]))
    Image.fromarray(image).save(tmp_path / "eye.png")
    eye = fundus.read_fundus(tmp_path / "eye.png")
    assert eye.shape == (512, 512, 3) and eye.dtype == np.uint8
    np.testing.assert_array_equal(eye[256, 256], [200, 90, 20])
    top, left, bottom, right = fundus.find_eye_square(image)
    assert top < -10 and bottom > 305  # the square is as high as the eye is wide, plus margins
    for axis, low, high, start, length in ((0, left, right, 41, 319), (1, top, bottom, 0, 300)):
        bright = np.nonzero((eye[:, :, 0] > 100).any(axis))[0]
        assert np.abs(bright[[0, -1]] - (np.array([start, start + length]) - low) * 512 / (high - low)).max() < 3
    assert not eye[:20].any() and not eye[-5:].any()
    Image.new("RGB", (20, 20), (10, 10, 10)).save(tmp_path / "dark.png")
    with pytest.raises(ValueError, match=r"dark\.png: wanted a fundus photograph, got one without a pixel brighter"):
        fundus.read_fundus(tmp_path / "dark.png")
