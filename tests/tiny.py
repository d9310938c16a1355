"""A data set small enough to train on in a few seconds."""

from pathlib import Path

import numpy as np
from PIL import Image

from recontrast.data.datasets import mvtec


def tiny_set(root, category="nut", *, train=7, good=3, defects=3, seed=0):
    """Write images of noisy stripes, 64 x 64 pixels, in MVTec AD layout; defects are bright squares with a mask.

    Returns:
        The samples of the category.
    """
    rng = np.random.default_rng(seed)

    def draw(path, mask_path=None):
        pixels = 110 + 60 * np.sin(np.arange(64) / 3)[:, None, None] + rng.normal(0, 12, (64, 64, 3))
        mask = np.zeros((64, 64), np.uint8)
        if mask_path is not None:
            y, x = rng.integers(4, 44, 2)
            mask[y : y + 14, x : x + 14] = 255
            pixels[mask > 0] += 90
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        if mask_path is not None:
            mask_path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(mask_path)

    folder = Path(root) / category
    for i in range(train):
        draw(folder / "train/good" / f"{i:03}.png")
    for i in range(good):
        draw(folder / "test/good" / f"{i:03}.png")
    for i in range(defects):
        draw(folder / "test/square" / f"{i:03}.png", folder / "ground_truth/square" / f"{i:03}_mask.png")
    return mvtec(root, category)
