"""A data set small enough to train on in a moment."""

from pathlib import Path

import numpy as np
from PIL import Image

from recontrast.data.datasets import mvtec


def tiny_set(root, category="nut", *, train=7, good=3, defects=3, seed=0):
    """Noisy stripes of 64 px in MVTec AD layout; a defect is a bright square, and has a mask."""
    random = np.random.default_rng(seed)

    def draw(path, square=None):
        pixels = 110 + 60 * np.sin(np.arange(64) / 3)[:, None, None] + random.normal(0, 12, (64, 64, 3))
        mask = np.zeros((64, 64), np.uint8)
        if square is not None:
            y, x = random.integers(4, 44, 2)
            mask[y : y + 14, x : x + 14] = 255
            pixels[mask > 0] += 90
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
        if square is not None:
            square.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(square)

    top = Path(root) / category
    for i in range(train):
        draw(top / "train/good" / f"{i:03}.png")
    for i in range(good):
        draw(top / "test/good" / f"{i:03}.png")
    for i in range(defects):
        draw(top / "test/square" / f"{i:03}.png", top / "ground_truth/square" / f"{i:03}_mask.png")
    return mvtec(root, category)
