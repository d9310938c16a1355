"""Memory of large images: arrays that return it row by row while the rest is in use, and the allocator's reserve."""

import ctypes
import math
import mmap
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

MIN_BYTES = 1 << 25  # a separate memory map does not pay off for smaller images


def allocate_pixels(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Allocate an uninitialised uint8 array.

    Arrays of `MIN_BYTES` or more get their own memory map, so that `release_rows` can return parts of it.

    Args:
        shape: Shape of the array.

    Returns:
        The array, uint8 of ``shape``.
    """
    size = math.prod(shape)
    if size < MIN_BYTES or not hasattr(mmap, "MADV_DONTNEED"):
        return np.empty(shape, np.uint8)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # MADV_DONTNEED keeps shared pages
    return np.frombuffer(pages, np.uint8).reshape(shape)


def release_rows(pixels: NDArray[np.uint8], rows: int) -> None:
    """Return the memory of the first rows of an array from `allocate_pixels` to the system; their content is lost.

    Args:
        pixels: (H, W, C) uint8. Arrays that `allocate_pixels` did not map are left as they are.
        rows: Number of rows.
    """
    base = pixels.base
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    if not isinstance(base, mmap.mmap) or len(base) != pixels.nbytes:
        return
    size = rows * pixels.strides[0] // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0:
        base.madvise(mmap.MADV_DONTNEED, 0, size)


def trim_memory() -> None:
    """Return the memory that the allocator of glibc keeps for later to the system; elsewhere, do nothing.

    Each thread has an arena of its own, which would keep the memory of the largest image that the thread has decoded.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
