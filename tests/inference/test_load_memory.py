"""Memory needed to load a detector: its weights and, for a moment, those in the file, whatever else is in the file."""

import mmap
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from recontrast import checkpoint as checkpoints
from recontrast.data import memory
from recontrast.data.tiles import Tiles
from recontrast.recipes.recipe import Recipe
from recontrast.training.train import build_model

RECIPE = Recipe(backbone="resnet18", weights="random", size=64, encoder_bn="eval")
CHILD = """
import sys
from pathlib import Path
import torch
from recontrast.app.prediction import predict
from recontrast.checkpoint import load_model  # modules are imported when they are used, and count as memory
from recontrast.inference import infer, tiling
from recontrast.inference.detector import open_detector

torch.set_num_threads(1)
status = lambda name: int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) / 1024
before = status("VmRSS")
detector = open_detector(Path(sys.argv[1]), "cpu")
print(before, status("VmHWM"), status("VmRSS"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_detector_is_loaded_once_and_without_the_optimisers(tmp_path):
    torch.manual_seed(0)
    model = build_model(RECIPE, "nut")
    preprocessing = {"size": [64, 64], "crop": None, "mean": list(model.mean), "std": list(model.std)}
    weights = model.state_dict()
    states = [{name: torch.zeros_like(value) for name, value in weights.items()} for _ in range(2)]
    path = checkpoints.save(tmp_path / "checkpoint.pt", checkpoints.Checkpoint(
        1, "nut", RECIPE, model.config, preprocessing, {"count": 1, "digest": ""}, weights, states
    ))  # fmt: skip
    megabytes = sum(value.numel() * value.element_size() for value in weights.values()) / 2**20
    process = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, timeout=600)
    assert process.returncode == 0, process.stderr
    before, peak, now = map(float, process.stdout.split())
    assert peak - before < 2 * megabytes + 60, f"{peak - before:.0f} MB for {megabytes:.0f} MB of weights"
    assert now - before < megabytes + 50, f"{now - before:.0f} MB stay for {megabytes:.0f} MB of weights"


def count_bytes_in_memory(pixels):
    """Bytes of the pages of an array that are in memory or swapped, whatever the rest of the process holds.

    The memory of the whole process also grows by what the allocator keeps of freed blocks: once a large one was freed,
    glibc keeps blocks of up to its size.
    """
    first, end = pixels.ctypes.data // mmap.PAGESIZE, -(-(pixels.ctypes.data + pixels.nbytes) // mmap.PAGESIZE)
    with open("/proc/self/pagemap", "rb") as file:  # 64 bits for each page; the highest two: present, swapped
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * (end - first)), np.uint64)
    return int(np.count_nonzero(entries >> np.uint64(62))) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="reads /proc/self/pagemap")
def test_rows_of_a_large_image_are_released(monkeypatch):
    """The tiles are unchanged, and the rows above the last tiles are no longer in memory."""
    monkeypatch.setattr(memory, "MIN_BYTES", 1 << 20)
    pixels, kept = memory.allocate_pixels((4000, 3000, 3)), memory.allocate_pixels((4000, 3000, 3))
    kept[:] = pixels[:] = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
    kept_tiles, released_tiles = Tiles(kept, 256, 192), Tiles(pixels, 256, 192, release=True)
    assert count_bytes_in_memory(pixels) >= pixels.nbytes
    for start in range(0, len(kept_tiles), 4):
        index = np.arange(start, min(start + 4, len(kept_tiles)))
        np.testing.assert_array_equal(released_tiles[index], kept_tiles[index])
    above = (4000 - 256) * 3000 * 3 // mmap.PAGESIZE * mmap.PAGESIZE
    assert count_bytes_in_memory(pixels) <= pixels.nbytes - above + mmap.PAGESIZE
    assert count_bytes_in_memory(kept) >= kept.nbytes
    assert not pixels[:3000].any() and pixels[-1].any()
    pixels_of_caller = np.ones((64, 64, 3), np.uint8)
    Tiles(pixels_of_caller, 32, 32, release=True)[[2]]
    assert pixels_of_caller.all(), "arrays of the caller must not change"
