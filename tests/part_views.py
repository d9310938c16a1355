"""Drawn parts with two views, for tests."""

import numpy as np
from PIL import Image

PATTERN = r"_(left|right)\."
SMALL = ["--backbone", "test_resnet", "--weights", "random", "--size", 64, "--batch", 4, "--device", "cpu"]
PATCHCORE = ["--architecture", "patchcore", *SMALL]


def draw_part(rng, defect_in=None):
    """Two views (64, 64) of stripes under different lights, and the mask of a defect that one of them shows."""
    base = 110 + 40 * np.sin(np.arange(64) / 3)[:, None] + rng.normal(0, 8, (64, 64))
    views = [base, 0.6 * base + 20]
    mask = np.zeros((64, 64), np.uint8)
    if defect_in is not None:
        y, x = rng.integers(4, 44, 2)
        mask[y : y + 14, x : x + 14] = 255
        views[defect_in] = views[defect_in] + (mask > 0) * 90
    return [view.clip(0, 255).astype(np.uint8) for view in views], mask


def write_set(root, pages, train=12, tests=3, seed=0):
    """Write parts with two views in MVTec AD layout, as two PNG files or as pages of one TIFF file."""
    rng = np.random.default_rng(seed)

    def save(folder, number, defect_in=None):
        views, mask = draw_part(rng, defect_in)
        (root / folder).mkdir(parents=True, exist_ok=True)
        masks = root / "ground_truth/square"
        masks.mkdir(parents=True, exist_ok=True)
        if pages:
            first, second = map(Image.fromarray, views)
            first.save(root / folder / f"{number:03}.tif", save_all=True, append_images=[second])
        for name, view in () if pages else zip(("left", "right"), views, strict=True):
            Image.fromarray(view).save(root / folder / f"{number:03}_{name}.png")
            if defect_in is not None:
                Image.fromarray(mask).save(masks / f"{number:03}_{name}_mask.png")
        if pages and defect_in is not None:
            Image.fromarray(mask).save(masks / f"{number:03}_mask.png")

    for number in range(train):
        save("train/good", number)
    for number in range(tests):
        save("test/good", number)
        save("test/square", number, defect_in=number % 2)
    return root
