"""Fuzz test of recontrast._metrics, run by tests/csrc/test_sanitizers.py as `fuzz_metrics.py MODULE SEED SECONDS`.

Valid arguments must give the results of the oracle, invalid ones must raise, and the sanitizers check the memory. torch
is not imported, because its import would take longer than the test.
"""

import importlib.util
import sys
import threading
import time

import numpy as np

from recontrast.metrics import reference as oracle

SIZES = [0, 1, 2, 3, 7, 8, 9, 16, 17, 40, 65]
DTYPES = ["?", "u1", "i1", "u2", "i4", "i8", "f2", "f4", "f8", ">f4", ">f8", "g", "c8", "O", "U3", "M8[s]", "V5"]
WRONG = [None, 3, "masks", [[[0, 1]]], {}, b"abc", object()]
ERRORS = (ValueError, TypeError)


def load(path):
    spec = importlib.util.spec_from_file_location("_metrics", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_scores(rng, shape, dtype):
    """Make numbers of any magnitude, with and without ties, sometimes not finite."""
    kind = rng.integers(6)
    if kind == 0:
        values = rng.integers(0, 4, shape).astype(float)
    elif kind == 1:
        bits = rng.integers(0, 1 << 32, shape, dtype=np.uint32)
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.nan_to_num(bits.view(np.float32).astype(float), posinf=0, neginf=0)
    elif kind == 2:
        values = rng.integers(-3, 300, shape) * 1e-45
    else:
        values = rng.random(shape) * 10.0 ** rng.integers(-3, 30)
    if rng.random() < 0.1 and values.size:
        values.flat[rng.integers(values.size)] = rng.choice([np.nan, np.inf, -np.inf])
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def make_masks(rng, shape):
    positive = rng.random(shape) < rng.choice([0, 0.02, 0.3, 0.5, 0.7, 1])
    return positive if rng.random() < 0.5 else (positive * rng.integers(1, 256)).astype(np.uint8)


def change_layout(rng, array):
    """Return the same numbers in another memory layout: strided, reversed, broadcast, unaligned or read-only."""
    kind = rng.integers(8)
    if kind == 0:
        wide = np.zeros([2 * n for n in array.shape], array.dtype)
        inner = tuple(slice(None, None, 2) for _ in array.shape)
        wide[inner] = array
        array = wide[inner]
    elif kind == 1:
        array = np.asfortranarray(array)
    elif kind == 2:
        array = array[..., ::-1] if array.ndim else array
    elif kind == 3:
        array = np.broadcast_to(array[..., :1], array.shape) if array.ndim and array.size else array
    elif kind == 4 and array.dtype.kind not in "O":
        raw = np.zeros(array.nbytes + 1, np.uint8)
        shifted = raw[1:].view(array.dtype).reshape(array.shape) if array.size else array
        if array.size:
            shifted[...] = array
        array = shifted
    elif kind == 5:
        array = array.copy()
        array.flags.writeable = False
    return array


def make_invalid_argument(rng):
    """Make an argument that is nearly always invalid."""
    if rng.random() < 0.2:
        return WRONG[rng.integers(len(WRONG))]
    shape = tuple(rng.choice(SIZES[:8], rng.integers(0, 5)))
    return change_layout(rng, np.zeros(shape, DTYPES[rng.integers(len(DTYPES))]))


def assert_same(results, expected):
    if expected is None or results is None:
        assert results is expected, (results, expected)
        return
    for a, b in zip(results, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def add_histogram(maps, positive, counts, shift, base):
    """Add to ``counts`` what the compiled function adds."""
    bits = maps.view(np.int32).astype(np.int64)
    bins = np.clip(np.where(maps > 0, (bits >> shift) - base, 0), 0, counts.shape[1] - 1)
    labels, regions = oracle.regions(positive)
    np.add.at(counts[0], bins[~positive], 1)
    np.add.at(counts[1], bins[positive], 1)
    label = labels[positive]
    area = np.bincount(label, minlength=1)[label]  # int64
    np.add.at(counts[2], bins[positive], ((2 << 40) // area + 1) // 2)
    return int(regions.sum())


def check_valid(native, rng):
    """Compare the results for valid arguments with the oracle."""
    shape = tuple(int(n) for n in rng.choice(SIZES, 3))
    maps, labels = make_scores(rng, shape, rng.choice(["f4", "f8"])), make_masks(rng, shape)
    positive, threads = labels != 0, int(rng.choice([0, 1, 2, 5]))
    limits = [float(x) for x in 1 - rng.random(rng.integers(0, 4))]
    assert_same(native.regions(labels, threads), oracle.regions(positive))
    with np.errstate(all="ignore"):
        assert_same(native.rates(maps.ravel(), labels.ravel(), threads), oracle.rates(maps.ravel(), positive.ravel()))
        assert_same(native.pixels(maps, labels, limits, threads), oracle.pixels(maps, positive, limits))
        if maps.size:
            assert_same(native.per_image(maps, labels, 0.3, threads), oracle.per_image(maps, positive, 0.3))
        else:
            native.per_image(maps, labels, 0.3, threads)
    if maps.dtype == np.float32:
        counts, expected = (np.zeros((3, int(n)), np.int64) for n in [rng.choice(SIZES[1:])] * 2)
        shift, base = int(rng.integers(0, 31)), int(rng.choice([0, 5, 1000, 2**31 - 1]))
        assert native.histogram(maps, labels, counts, shift, base, threads) == add_histogram(
            maps, positive, expected, shift, base
        )
        np.testing.assert_array_equal(counts, expected)


def check_invalid(native, rng):
    """Call with mostly invalid arguments: each call must return or raise one of `ERRORS`."""
    shape = tuple(int(n) for n in rng.choice(SIZES, 3))
    arguments = {
        "maps": make_scores(rng, shape, "f4"),
        "masks": make_masks(rng, shape),
        "counts": np.zeros((3, int(rng.choice(SIZES))), np.int64),
        "threads": 2,
        "limits": [0.3],
        "limit": 0.3,
        "shift": 7,
        "base": 100,
    }
    invalid = {
        "threads": [-1, 2**70, 1.5, None, 1000],
        "limits": [[0.0], [2.0], [float("nan")], 3, None, ["x"], [-1e300], [1e-300, 1.0]],
        "limit": [0.0, 2.0, float("nan"), None, 1e-300],
        "shift": [-1, 31, 2**40, 0, 30],
        "base": [-1, 2**40, 2**31 - 1],
    }
    for name in arguments:
        if isinstance(arguments[name], np.ndarray):
            arguments[name] = change_layout(rng, arguments[name]) if rng.random() < 0.3 else arguments[name]
            arguments[name] = make_invalid_argument(rng) if rng.random() < 0.2 else arguments[name]
        elif rng.random() < 0.3:
            arguments[name] = invalid[name][rng.integers(len(invalid[name]))]
    flat = [
        x.ravel() if isinstance(x, np.ndarray) and rng.random() < 0.9 else x
        for x in (arguments["maps"], arguments["masks"])
    ]
    for call in [
        lambda: native.regions(arguments["masks"], arguments["threads"]),
        lambda: native.rates(*flat, arguments["threads"]),
        lambda: native.pixels(arguments["maps"], arguments["masks"], arguments["limits"], arguments["threads"]),
        lambda: native.per_image(arguments["maps"], arguments["masks"], arguments["limit"], arguments["threads"]),
        lambda: native.histogram(*(arguments[k] for k in ("maps", "masks", "counts", "shift", "base", "threads"))),
    ]:
        try:
            call()
        except ERRORS:
            pass


def check_concurrent_writes(native, rng):
    """Call while another thread writes to the arrays: results are arbitrary, but memory accesses stay in bounds."""
    maps, labels = make_scores(rng, (7, 150, 151), "f4"), make_masks(rng, (7, 150, 151)).astype(np.uint8)
    others, stop = [make_scores(rng, maps.shape, "f4"), rng.random(maps.shape) < 0.5], threading.Event()

    def write():
        while not stop.is_set():
            maps[...] = others[0]
            labels[...] = others[1]
            labels[...] = 0

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(3):
            native.pixels(maps, labels, [0.3], 2)
            native.per_image(maps, labels, 0.3, 2)
            native.histogram(maps, labels, np.zeros((3, 99), np.int64), 20, 900, 2)
            native.regions(labels, 2)
    finally:
        stop.set()
        thread.join()


def main(path, seed, seconds):
    native, rng, end, rounds = load(path), np.random.default_rng(seed), time.monotonic() + seconds, 0
    while time.monotonic() < end or rounds < 50:
        check_valid(native, rng)
        check_invalid(native, rng)
        if rounds % 200 == 0:
            check_concurrent_writes(native, rng)
        rounds += 1
    print(f"{rounds} rounds")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
