"""recontrast.data.cache: each file decoded once, the cache file whole or absent, rebuilt when it is not what it was."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from recontrast.data import cache as module
from recontrast.data import datasets, images
from recontrast.data.cache import ImageCache

N = 12


@pytest.fixture
def samples(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(N):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / f"images/{i}.png")
    return datasets.folder(tmp_path / "images")


@pytest.fixture
def decoded(monkeypatch):
    """Paths in the order in which they are decoded."""
    paths = []
    read = images.read_image
    monkeypatch.setattr(module, "read_image", lambda path, **how: (paths.append(path), read(path, **how))[1])
    return paths


def expected(samples, size=32, crop=24):
    return np.stack([images.read_image(s.path, size=size, crop=crop) for s in samples])


@pytest.mark.parametrize("workers", [None, 1, 5])
@pytest.mark.parametrize("where", [None, "cache/made"])
def test_images_are_those_of_read_image(tmp_path, samples, where, workers, decoded):
    directory = where and tmp_path / where
    seen = []
    cache = ImageCache(samples, 32, 24, directory, workers=workers, on_progress=lambda *now: seen.append(now))
    assert len(cache) == N and cache.shape == (N, 24, 24, 3)
    assert seen == [(i, N) for i in range(1, N + 1)]
    assert sorted(decoded) == sorted(s.path for s in samples), "each file once"
    wanted = expected(samples)
    assert np.array_equal(cache[:], wanted)
    assert torch.equal(cache.tensor(), torch.from_numpy(wanted))
    again = ImageCache([s.path for s in samples], 32, 24, directory)  # paths do as well
    assert len(decoded) == (2 * N if directory is None else N), "a cache file is used again"
    assert np.array_equal(again[:], wanted)
    if directory:
        assert [path.name for path in directory.iterdir()] == [cache.path.name]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-N, N - 1), max_size=20))
def test_indices(shared, indices):
    cache, wanted = shared
    for form in (indices, np.array(indices, np.int64), torch.tensor(indices, dtype=torch.int64)):
        got = cache[form]
        assert got.shape == (len(indices), 8, 8, 3) and got.dtype == np.uint8
        assert np.array_equal(got, wanted[np.array(indices, np.int64)])
        got[...] = 0  # a copy
    picked = np.isin(np.arange(N), indices)
    assert np.array_equal(cache[picked], wanted[picked])
    assert np.array_equal(cache[:], wanted)


@pytest.fixture(scope="module", params=["memory", "file"])
def shared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    for i in range(N):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8)).save(folder / f"{i}.png")
    samples = datasets.folder(folder)
    cache = ImageCache(samples, 8, directory=None if request.param == "memory" else folder / "cache")
    return cache, expected(samples, 8, None)


def test_out_of_range_and_one_number(shared):
    cache, wanted = shared
    assert np.array_equal(cache[3], wanted[3:4])
    with pytest.raises(IndexError):
        cache[[0, N]]


def test_tensor_in_pieces(tmp_path, samples, device):
    cache = ImageCache(samples, (1024, 2048), directory=tmp_path / "c")  # 6 MB each, 72 in all: more than one piece
    got = cache.tensor(device)
    assert got.device.type == device and np.array_equal(got[-1].cpu().numpy(), cache[-1][0])
    got.zero_()
    assert cache[:].any(), "a copy"


def test_the_mapping_is_read_only(tmp_path, samples):
    cache = ImageCache(samples, 32, directory=tmp_path / "c")
    with pytest.raises(ValueError, match="read-only"):
        cache._images[0] = 0


def test_whatever_changes_gets_another_file(tmp_path, samples, decoded):
    def path(samples, *sizes):
        return ImageCache(samples, *sizes, directory=tmp_path / "c").path

    paths = [
        path(samples, 32),
        path(samples, 33),
        path(samples, 32, 24),
        path(samples[:5], 32),
        path(samples[::-1], 32),
    ]
    assert path(samples, (32, 32)) == paths[0]
    array = np.asarray(Image.open(samples[3].path)).copy()
    array[0, 0] ^= 1
    before = samples[3].path.stat()
    Image.fromarray(array).save(samples[3].path)
    os.utime(samples[3].path, ns=(0, before.st_mtime_ns + 1))
    paths.append(path(samples, 32))
    assert len(set(paths)) == len(paths)
    assert np.array_equal(ImageCache(samples, 32, directory=tmp_path / "c")[:], expected(samples, 32, None))


@pytest.mark.parametrize("damage", ["short", "long", "header", "pixel", "empty", "blank"])
def test_a_damaged_file_is_built_again(tmp_path, samples, damage, decoded):
    path = ImageCache(samples, 32, 24, tmp_path / "c").path
    whole = path.read_bytes()
    broken = bytearray(whole)
    if damage == "header":
        broken[3] ^= 1
    elif damage == "pixel":
        broken[-1000] ^= 1
    elif damage == "blank":
        broken = bytes(len(whole))
    path.write_bytes({"short": whole[:-1], "long": whole + b"\0", "empty": b""}.get(damage, broken))
    again = ImageCache(samples, 32, 24, tmp_path / "c")
    assert len(decoded) == 2 * N and path.read_bytes() == whole
    assert np.array_equal(again[:], expected(samples))


def leftovers(directory):
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def test_first_unreadable_image_is_named_and_nothing_stays(tmp_path, samples, decoded):
    for i in (9, 4):
        samples[i].path.write_bytes(b"\x89PNG\r\n\x1a\n")
    for directory in (None, tmp_path / "c"):
        with pytest.raises(ValueError, match=rf"^{samples[4].path}: wanted a whole image, got "):
            ImageCache(samples, 32, directory=directory, workers=4)
    assert leftovers(tmp_path / "c") == []
    samples[2].path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"^{samples[2].path}: wanted an image, got no such file$"):
        ImageCache(samples, 32, directory=tmp_path / "c")


def test_interrupt_leaves_nothing_and_stops_decoding(tmp_path, samples, decoded):
    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ImageCache(samples * 50, 32, directory=tmp_path / "c", workers=1, on_progress=interrupt)
    assert leftovers(tmp_path / "c") == [] and len(decoded) < N * 50
    assert not [t for t in threading.enumerate() if "ThreadPool" in t.name]


def check_full(directory, samples, reason, code):
    total = module._HEADER_BYTES + N * 24 * 24 * 3
    with pytest.raises(
        OSError,
        match=rf"^{directory}/images-\w+\.u8: wanted to write {total} bytes of decoded images, "
        rf"got '{reason}', \d+ bytes free$",
    ) as caught:
        ImageCache(samples, 32, 24, directory)
    assert caught.value.errno == code and leftovers(directory) == []


def test_disk_full_known_before(tmp_path, samples, monkeypatch, decoded):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    check_full(tmp_path / "c", samples, "No space left on device", errno.ENOSPC)
    assert decoded == []


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_disk_full_while_writing(tmp_path, samples, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    check_full(tmp_path / "c", samples, "No space left on device", errno.ENOSPC)


def test_limit_of_the_system_while_writing(tmp_path, samples):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # a part is written, then EFBIG
        check_full(tmp_path / "c", samples, "File too large", errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_writes_in_parts(tmp_path, samples, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:1000], offset))
    assert np.array_equal(ImageCache(samples, 32, 24, tmp_path / "c")[:], expected(samples))


def test_what_a_killed_process_left_is_removed(tmp_path, samples):
    old, new, other = (tmp_path / "c" / name for name in (".images-0.u8.1.tmp", ".images-0.u8.2.tmp", "mine.tmp"))
    (tmp_path / "c").mkdir()
    for path in (old, new, other):
        path.write_bytes(b"x")
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    cache = ImageCache(samples, 32, directory=tmp_path / "c")
    assert leftovers(tmp_path / "c") == sorted([new.name, other.name, cache.path.name])


def test_two_processes_at_once(tmp_path, samples):
    code = (
        "import sys; from recontrast.data import cache, datasets\n"
        "c = cache.ImageCache(datasets.folder(sys.argv[1]) * 20, 32, 24, sys.argv[2])\n"
        "print(c[:].sum())"
    )
    run = [sys.executable, "-c", code, str(samples[0].path.parent), str(tmp_path / "c")]
    both = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = [int(process.communicate(timeout=120)[0]) for process in both]
    assert sums == [20 * int(expected(samples).sum())] * 2 and len(leftovers(tmp_path / "c")) == 1


def test_arguments(tmp_path, samples):
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        ImageCache(samples, 32, workers=0)
    with pytest.raises(ValueError, match="size must be a positive number of pixels"):
        ImageCache(samples, None)
    with pytest.raises(ValueError, match=r"0\.png: crop must fit into the image, wanted 33 x 33 of 32 x 32"):
        ImageCache(samples, 32, 33)
    none = ImageCache([], 32, directory=tmp_path / "c")
    assert len(none) == 0 and none[[]].shape == (0, 32, 32, 3) and none.tensor().shape == (0, 32, 32, 3)
