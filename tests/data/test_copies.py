"""recontrast.data.copies: equal files among images of one kind."""

import os
import shutil

import numpy as np
from near_copies import draw

from recontrast.data.copies import describe_copies, group_equal_files


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
