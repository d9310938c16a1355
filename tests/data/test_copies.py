"""recontrast.data.copies: equal files, and pictures that were saved again, among images of one kind."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from recontrast.data.copies import (
    describe_copies,
    describe_near_copies,
    find_near_copies,
    group_equal_files,
    sketch_image,
)


def draw(rng, *, scene=0.0, noise=6.0):
    """Draw a picture of stripes with a texture of its own; ``scene`` is the contrast of what all pictures share."""
    shared = scene * np.random.default_rng(0).normal(0, 1, (128, 128))
    smooth = Image.fromarray(rng.normal(0, 40, (40, 40)).astype(np.float32)).resize(
        (128, 128), Image.Resampling.BICUBIC
    )
    pixels = 128 + shared + np.asarray(smooth) + rng.normal(0, noise, (128, 128))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGB")


def test_equal_files(tmp_path):
    rng = np.random.default_rng(1)
    for index in range(4):
        draw(rng).save(tmp_path / f"{index}.bmp")  # files of equal size
    shutil.copy(tmp_path / "1.bmp", tmp_path / "4.bmp")
    os.link(tmp_path / "2.bmp", tmp_path / "5.bmp")
    (tmp_path / "6.bmp").symlink_to(tmp_path / "4.bmp")
    content = bytearray((tmp_path / "0.bmp").read_bytes())
    content[len(content) // 3] ^= 1  # differs between the pieces that are read first
    (tmp_path / "7.bmp").write_bytes(content)
    paths = [*(tmp_path / f"{index}.bmp" for index in range(8)), tmp_path / "missing.bmp"]
    assert group_equal_files(paths) == [0, 1, 2, 3, 1, 2, 1, 7, 8]
    assert describe_copies(paths, group_equal_files(paths)).startswith("9 images are 6 different images, for example ")
    assert describe_copies(paths[:4], [0, 1, 2, 3]) is None and group_equal_files([]) == []


@pytest.mark.parametrize("scene", [0.0, 30.0])
def test_pictures_saved_again_are_found(tmp_path, scene):
    rng = np.random.default_rng(2)
    pictures = [draw(rng, scene=scene) for _ in range(12)]
    assert find_near_copies(np.stack([sketch_image(np.asarray(picture)) for picture in pictures])) == []
    pictures[3].save(tmp_path / "a.jpg", quality=80)
    pictures += [Image.open(tmp_path / "a.jpg"), pictures[5].resize((115, 115)).resize((128, 128))]
    pairs = find_near_copies(np.stack([sketch_image(np.asarray(picture)) for picture in pictures]))
    assert pairs == [(3, 12), (5, 13)]
    names = [f"{index}.png" for index in range(14)]
    assert describe_near_copies(names, pairs).startswith(
        "2 of 14 images seem to be another one of them, saved again or rescaled (for example 12.png and 3.png)"
    )
    assert describe_near_copies(names, []) is None


def test_one_picture_saved_many_times(tmp_path):
    picture = draw(np.random.default_rng(3), noise=2)
    sketches = []
    for quality in range(76, 95):
        picture.save(tmp_path / "a.jpg", quality=quality)
        sketches.append(sketch_image(np.asarray(Image.open(tmp_path / "a.jpg"))))
    assert len(find_near_copies(np.stack(sketches))) == 18
    assert find_near_copies(np.stack(sketches[:1])) == []


def test_flat_images_are_not_compared():
    assert find_near_copies(np.stack([sketch_image(np.full((32, 40, 3), level, np.uint8)) for level in range(9)])) == []
