"""recontrast.data.augment: views of images, against restatements and as images of their own."""

import math

import numpy as np
import pytest

from recontrast.data.augment import GREY, VIEWS, View, augment_images, change_view, count_views


def draw(n=3, height=17, width=17):
    return np.random.default_rng(height + width).integers(0, 256, (n, height, width, 3), np.uint8)


def restate(image, view):
    """A rotation and translation in float64, pixel by pixel, with borders that mirror the image."""
    height, width = image.shape[:2]

    def reflect(position, size):  # about the outer edges of the first and last pixel
        position = (position + 0.5) % (2 * size)
        return min(max(min(position, 2 * size - position) - 0.5, 0), size - 1)

    result = np.empty(image.shape)
    cos, sin = math.cos(math.radians(view.angle)), math.sin(math.radians(view.angle))
    for row in range(height):
        for column in range(width):
            dx, dy = column + 0.5 - width / 2, row + 0.5 - height / 2
            x = cos * dx - sin * dy + width / 2 - view.shift[0] * width - 0.5
            y = sin * dx + cos * dy + height / 2 - view.shift[1] * height - 0.5
            x, y = reflect(x, width), reflect(y, height)
            left, top = min(int(x), width - 2), min(int(y), height - 2)
            a, b = x - left, y - top
            result[row, column] = (1 - b) * (
                (1 - a) * image[top, left] + a * image[top, left + 1].astype(float)
            ) + b * ((1 - a) * image[top + 1, left] + a * image[top + 1, left + 1].astype(float))
    return result


@pytest.mark.parametrize("size", [(17, 17), (12, 23), (24, 9)])
@pytest.mark.parametrize("view", [View(45), View(-33.75), View(90), View(shift=(0.1, -0.05)), View(225)])
def test_rotations_and_translations(size, view):
    images = draw(2, *size)
    moved = change_view(images, view)
    assert moved.dtype == np.uint8 and moved.shape == images.shape
    for image, result in zip(images, moved, strict=True):
        assert np.abs(restate(image, view) - result).max() <= 0.51  # rounding to whole values


def test_quarter_turns_only_move_pixels():
    images = draw()
    assert np.array_equal(change_view(images, View(90)), np.rot90(images, 1, (1, 2)))
    assert np.array_equal(change_view(change_view(images, View(270)), View(90)), images)


def test_mirrors_and_grey():
    images = draw(2, 5, 8)
    assert np.array_equal(change_view(images, View(mirror=(1,))), images[:, :, ::-1])
    assert np.array_equal(change_view(images, View(mirror=(0, 1))), images[:, ::-1, ::-1])
    grey = change_view(images, View(is_grey=True))
    assert np.abs(grey - (images.astype(float) @ GREY)[..., None]).max() <= 0.51
    assert sum(GREY) == pytest.approx(1)


@pytest.mark.parametrize("name, count", [("none", 1), ("rotations", 8), ("flips", 4), ("inp_former", 22)])
def test_views_of_a_source(name, count):
    images = draw(5)
    views = augment_images(images, name)
    assert len(views) == 5 * count == 5 * count_views(name)
    everything = views[np.arange(len(views))]
    assert np.array_equal(everything[:5], images)  # the images come first, unchanged
    assert len({image.tobytes() for image in everything}) == len(views)
    index = np.random.default_rng(0).permutation(len(views))[:7]
    assert np.array_equal(views[index], everything[index])
    for position in index.tolist():
        view = VIEWS[name][position // 5]
        assert np.array_equal(everything[position], change_view(images[[position % 5]], view)[0])
    assert np.array_equal(images, draw(5)), "the source is not changed"
