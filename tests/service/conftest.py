import shutil
import sys
from pathlib import Path

import pytest
from command_line import works
from saved_model import RECIPE, draw, save

sys.path.insert(0, str(Path(__file__).parent))  # client.py


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """PNG files: six good images, and one whose left half is black, which scores higher."""
    import numpy as np
    from PIL import Image

    folder = draw(tmp_path_factory.mktemp("service") / "images", 6, seed=1)
    pixels = np.asarray(Image.open(folder / "000.png")).copy()
    pixels[:, :32] = 0
    Image.fromarray(pixels).save(folder / "defect.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """Checkpoint without a calibration."""
    return save(tmp_path_factory.mktemp("plain") / "plain.pt", RECIPE)


@pytest.fixture(scope="session")
def calibrated(plain, tmp_path_factory):
    """Checkpoint with a calibration of 39 images."""
    folder = tmp_path_factory.mktemp("calibrated")
    path = Path(shutil.copy(plain, folder / "checkpoint.pt"))
    good = draw(folder / "good", 39, seed=3)
    works("calibrate", path, "--good", good, "--false-alarm-rate", "0.05", "--pixel-rate", "0.05", "--device", "cpu")
    return path
