"""The memory of images that are decoded at the same time is bounded."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from recontrast.data import decode_budget, images
from recontrast.data.cache import ImageCache
from recontrast.data.decode_budget import BUDGET, ByteBudget
from recontrast.data.image_files import ImageFiles
from recontrast.data.in_memory import InMemoryImages


@pytest.fixture
def usage(monkeypatch):
    """Return the bytes that were held after each reservation from the budget, whose limit is set by the test."""
    held = []
    reserve = ByteBudget.reserve

    def observe(self, size):
        context = reserve(self, size)
        enter = context.__enter__

        class Observed:
            def __enter__(self_):
                enter()
                held.append(self._used)

            def __exit__(self_, *error):
                return context.__exit__(*error)

        return Observed()

    monkeypatch.setattr(ByteBudget, "reserve", observe)
    return held


def save_images(folder, count=8, shape=(100, 200)):
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{index}.png" for index in range(count)]
    for path in paths:
        Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(path)
    return paths


@pytest.mark.parametrize("reader", ["cache", "files", "many", "memory"])
def test_every_reader_stays_within_the_budget(tmp_path, monkeypatch, usage, reader):
    paths = save_images(tmp_path)
    each = 100 * 200 * 8
    monkeypatch.setattr(BUDGET, "limit", 2 * each)
    with ThreadPoolExecutor(8) as pool:
        {
            "cache": lambda: ImageCache(paths, 32, workers=8),
            "files": lambda: ImageFiles(paths, pool).resized(32)[range(8)],
            "many": lambda: ImageFiles(paths, pool).read_many(range(8)),
            "memory": lambda: InMemoryImages(paths, 32)[range(8)],
        }[reader]()
    assert len(usage) == 8 and max(usage) <= 2 * each and BUDGET._used == 0


def test_a_larger_image_is_decoded_alone(tmp_path, monkeypatch, usage):
    paths = save_images(tmp_path)
    monkeypatch.setattr(BUDGET, "limit", 1000)
    ImageCache(paths, 32, workers=8)
    assert usage == [100 * 200 * 8] * 8


def test_an_error_frees_the_bytes(tmp_path):
    path = save_images(tmp_path, 1)[0]
    path.write_bytes(path.read_bytes()[:-40])
    for _ in range(3):
        with pytest.raises(ValueError, match="wanted a complete image"):
            images.read_image(path)
    assert BUDGET._used == 0


def test_blocks_of_one_thread_hold_the_bytes_once():
    budget = ByteBudget(10)
    with budget.reserve(10):
        with budget.reserve(10):  # would wait for itself
            assert budget._used == 10
        assert budget._used == 10
    assert budget._used == 0


def test_large_images_are_not_overtaken_for_ever():
    budget, order = ByteBudget(10), []
    started = threading.Event()

    def work(name, size):
        with budget.reserve(size):
            order.append(name)

    with budget.reserve(6):
        large = threading.Thread(target=lambda: (started.set(), work("large", 10)))
        large.start()
        started.wait()
        while budget._turn.locked() is False:
            pass  # until the large image has its turn
        small = threading.Thread(target=work, args=("small", 1))  # would fit now
        small.start()
        small.join(0.1)
        assert order == []
    large.join()
    small.join()
    assert order == ["large", "small"]


def test_a_child_process_starts_with_nothing_held():
    with BUDGET.reserve(decode_budget.BYTES_IN_FLIGHT):
        child = os.fork()
        if child == 0:
            os._exit(int(BUDGET._used != 0))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_groups_of_images_fit_into_memory(tmp_path, monkeypatch):
    paths = [*save_images(tmp_path, 3), tmp_path / "missing.png", *save_images(tmp_path / "more", 2)]
    files = ImageFiles(paths)
    assert list(files.group(4)) == [range(4), range(4, 6)]
    monkeypatch.setattr("recontrast.data.image_files.BYTES_IN_FLIGHT", 2 * 100 * 200 * 3)
    assert list(files.group(4)) == [range(2), range(2, 5), range(5, 6)]
    monkeypatch.setattr("recontrast.data.image_files.BYTES_IN_FLIGHT", 1)
    assert list(files.group(4)) == [range(index, index + 1) for index in range(6)]
