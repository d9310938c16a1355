import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: runs its kernels on the CPU

torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it brings, on a busy machine far more
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def pytest_report_header():
    from recontrast import ops

    return f"recontrast kernels: {ops.BACKEND} {ops.WHY or ''}"


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def download(tmp_path):
    """Makes the miniature of an original download in a folder of its own and gives that folder."""
    from downloads import DOWNLOADS

    def make(name):
        root = tmp_path / "downloads" / name
        DOWNLOADS[name](root)
        return root

    return make


@pytest.fixture(scope="session")
def tiny_set():
    """Writes a category in MVTec AD layout and gives its samples, see `write_tiny_set`."""
    return write_tiny_set


def write_tiny_set(root, category="nut", *, train=7, good=3, defects=3, seed=0):
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
    from recontrast.data.datasets import mvtec  # not before triton's interpreter is chosen

    return mvtec(root, category)
