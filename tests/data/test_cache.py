"""recontrast.data.cache: files are decoded once, cache files are atomic, and damaged ones are built again."""

import errno
import os
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
needs_pwrite = pytest.mark.skipif(not hasattr(os, "pwrite"), reason="Windows has no os.pwrite")


@pytest.fixture
def samples(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(N):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / f"images/{i}.png")
    return datasets.folder(tmp_path / "images")


@pytest.fixture
def decoded(monkeypatch):
    """Record the paths in the order in which they are decoded."""
    paths = []

    def read_image(path, **options):
        paths.append(path)
        return images.read_image(path, **options)

    monkeypatch.setattr(module, "read_image", read_image)
    return paths


def read_images(samples, size=32, crop=24):
    return np.stack([images.read_image(s.path, size=size, crop=crop) for s in samples])


@pytest.mark.parametrize("workers", [None, 1, 5])
@pytest.mark.parametrize("folder", [None, "parent/cache"])
def test_images_equal_read_image(tmp_path, samples, folder, workers, decoded):
    directory = folder and tmp_path / folder
    progress = []
    cache = ImageCache(samples, 32, 24, directory, workers=workers, on_progress=lambda *done: progress.append(done))
    assert len(cache) == N and cache.shape == (N, 24, 24, 3)
    assert progress == [(i, N) for i in range(1, N + 1)]
    assert sorted(decoded) == sorted(s.path for s in samples), "each file is decoded once"
    expected = read_images(samples)
    assert np.array_equal(cache[:], expected)
    assert torch.equal(cache.tensor(), torch.from_numpy(expected))
    again = ImageCache([s.path for s in samples], 32, 24, directory)  # paths are accepted too
    assert len(decoded) == (2 * N if directory is None else N), "an existing cache file is used"
    assert np.array_equal(again[:], expected)
    if directory:
        assert [path.name for path in directory.iterdir()] == [cache.path.name]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-N, N - 1), max_size=20))
def test_indices(shared, indices):
    cache, expected = shared
    for form in (indices, np.array(indices, np.int64), torch.tensor(indices, dtype=torch.int64)):
        result = cache[form]
        assert result.shape == (len(indices), 8, 8, 3) and result.dtype == np.uint8
        assert np.array_equal(result, expected[np.array(indices, np.int64)])
        result[...] = 0  # must not change the cache
    chosen = np.isin(np.arange(N), indices)
    assert np.array_equal(cache[chosen], expected[chosen])
    assert np.array_equal(cache[:], expected)


@pytest.fixture(scope="module", params=["memory", "file"])
def shared(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    for i in range(N):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8)).save(folder / f"{i}.png")
    samples = datasets.folder(folder)
    cache = ImageCache(samples, 8, directory=None if request.param == "memory" else folder / "cache")
    return cache, read_images(samples, 8, None)


def test_single_index_and_index_out_of_range(shared):
    cache, expected = shared
    assert np.array_equal(cache[3], expected[3:4])
    with pytest.raises(IndexError):
        cache[[0, N]]


def test_tensor_in_pieces(tmp_path, samples, device):
    cache = ImageCache(samples, (1024, 2048), directory=tmp_path / "c")  # 72 MB in all, so more than one piece
    result = cache.tensor(device)
    assert result.device.type == device and np.array_equal(result[-1].cpu().numpy(), cache[-1][0])
    result.zero_()
    assert cache[:].any(), "the tensor must be a copy"


def test_memory_map_is_read_only(tmp_path, samples):
    cache = ImageCache(samples, 32, directory=tmp_path / "c")
    with pytest.raises(ValueError, match="read-only"):
        cache._images[0] = 0


def test_any_change_selects_another_cache_file(tmp_path, samples, decoded):
    def build(samples, *sizes):
        return ImageCache(samples, *sizes, directory=tmp_path / "c").path

    paths = [
        build(samples, 32),
        build(samples, 33),
        build(samples, 32, 24),
        build(samples[:5], 32),
        build(samples[::-1], 32),
    ]
    assert build(samples, (32, 32)) == paths[0]
    array = np.asarray(Image.open(samples[3].path)).copy()
    array[0, 0] ^= 1
    before = samples[3].path.stat()
    Image.fromarray(array).save(samples[3].path)
    os.utime(samples[3].path, ns=(0, before.st_mtime_ns + 1))
    paths.append(build(samples, 32))
    assert len(set(paths)) == len(paths)
    assert np.array_equal(ImageCache(samples, 32, directory=tmp_path / "c")[:], read_images(samples, 32, None))


@pytest.mark.parametrize("damage", ["short", "long", "header", "pixel", "empty", "blank"])
def test_damaged_cache_file_is_built_again(tmp_path, samples, damage, decoded):
    path = ImageCache(samples, 32, 24, tmp_path / "c").path
    content = path.read_bytes()
    broken = bytearray(content)
    if damage == "header":
        broken[3] ^= 1
    elif damage == "pixel":
        broken[-1000] ^= 1
    elif damage == "blank":
        broken = bytes(len(content))
    path.write_bytes({"short": content[:-1], "long": content + b"\0", "empty": b""}.get(damage, broken))
    again = ImageCache(samples, 32, 24, tmp_path / "c")
    assert len(decoded) == 2 * N and path.read_bytes() == content
    assert np.array_equal(again[:], read_images(samples))


def list_names(directory):
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def test_first_unreadable_image_is_named_and_no_file_is_left(tmp_path, samples, decoded):
    for i in (9, 4):
        samples[i].path.write_bytes(b"\x89PNG\r\n\x1a\n")
    for directory in (None, tmp_path / "c"):
        with pytest.raises(ValueError, match=rf"^{samples[4].path}: wanted a complete image, got "):
            ImageCache(samples, 32, directory=directory, workers=4)
    assert list_names(tmp_path / "c") == []
    samples[2].path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"^{samples[2].path}: wanted an image, got no such file$"):
        ImageCache(samples, 32, directory=tmp_path / "c")


def test_interrupt_stops_decoding_and_leaves_no_file(tmp_path, samples, decoded):
    def interrupt(done, total):
        if done == 2:
            raise KeyboardInterrupt

    earlier = set(threading.enumerate())  # other tests of this process may have left threads
    with pytest.raises(KeyboardInterrupt):
        ImageCache(samples * 50, 32, directory=tmp_path / "c", workers=1, on_progress=interrupt)
    assert list_names(tmp_path / "c") == [] and len(decoded) < N * 50
    assert not [t for t in set(threading.enumerate()) - earlier if "ThreadPool" in t.name]


def check_write_error(directory, samples, reason, code):
    """Build a cache that cannot be written, and check the error."""
    total = module._HEADER_BYTES + N * 24 * 24 * 3
    with pytest.raises(
        OSError,
        match=rf"^{directory}/images-\w+\.u8: wanted to write {total} bytes of decoded images, "
        rf"got '{reason}', \d+ bytes free$",
    ) as caught:
        ImageCache(samples, 32, 24, directory)
    assert caught.value.errno == code and list_names(directory) == []


def test_disk_full_before_writing(tmp_path, samples, monkeypatch, decoded):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    check_write_error(tmp_path / "c", samples, "No space left on device", errno.ENOSPC)
    assert decoded == []


@needs_pwrite
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_disk_full_while_writing(tmp_path, samples, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    check_write_error(tmp_path / "c", samples, "No space left on device", errno.ENOSPC)


def test_file_size_limit_while_writing(tmp_path, samples):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (10_000, hard)
        )  # the first write is partial, the second fails with EFBIG
        check_write_error(tmp_path / "c", samples, "File too large", errno.EFBIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@needs_pwrite
def test_partial_writes(tmp_path, samples, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:1000], offset))
    assert np.array_equal(ImageCache(samples, 32, 24, tmp_path / "c")[:], read_images(samples))


def test_writes_without_pwrite(tmp_path, samples, monkeypatch):
    """Windows has no os.pwrite: several threads write, each at its position, and a write can be partial."""
    write = os.write
    monkeypatch.delattr(os, "pwrite", raising=False)
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:1000]))
    assert np.array_equal(ImageCache(samples, 32, 24, tmp_path / "c", workers=4)[:], read_images(samples))


def test_temporary_files_of_killed_processes_are_removed(tmp_path, samples):
    names = (f".images-{'0' * 32}.u8.{'1' * 32}.tmp", f".images-{'0' * 32}.u8.{'2' * 32}.tmp", "mine.tmp")
    old, new, other = (tmp_path / "c" / name for name in names)
    (tmp_path / "c").mkdir()
    for path in (old, new, other):
        path.write_bytes(b"x")
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    cache = ImageCache(samples, 32, directory=tmp_path / "c")
    assert list_names(tmp_path / "c") == sorted([new.name, other.name, cache.path.name])


def test_two_processes_can_build_one_cache(tmp_path, samples):
    code = (
        "import sys; from recontrast.data import cache, datasets\n"
        "c = cache.ImageCache(datasets.folder(sys.argv[1]) * 20, 32, 24, sys.argv[2])\n"
        "print(c[:].sum())"
    )
    run = [sys.executable, "-c", code, str(samples[0].path.parent), str(tmp_path / "c")]
    both = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = [int(process.communicate(timeout=600)[0]) for process in both]
    assert sums == [20 * int(read_images(samples).sum())] * 2 and len(list_names(tmp_path / "c")) == 1


def test_invalid_arguments(tmp_path, samples):
    with pytest.raises(ValueError, match="workers: wanted at least 1, got 0"):
        ImageCache(samples, 32, workers=0)
    with pytest.raises(ValueError, match="size: wanted a positive number of pixels"):
        ImageCache(samples, None)
    with pytest.raises(ValueError, match=r"0\.png: crop: wanted at most the size of the image, 32 x 32, got 33 x 33"):
        ImageCache(samples, 32, 33)


def test_no_images(tmp_path):
    cache = ImageCache([], 32, directory=tmp_path / "c")
    assert len(cache) == 0 and cache[[]].shape == (0, 32, 32, 3) and cache.tensor().shape == (0, 32, 32, 3)
