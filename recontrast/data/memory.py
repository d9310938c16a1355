"""Memory of large images that is given back row by row, while the rest is still in use."""

import math
import mmap

import numpy as np
from numpy.typing import NDArray

LEAST = 1 << 25  # bytes: smaller images are not worth pages of their own


def allocate_pixels(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """An array of ``shape``, uint8; a large one in pages of its own, which `release_rows` can give back."""
    size = math.prod(shape)
    if size < LEAST or not hasattr(mmap, "MADV_DONTNEED"):
        return np.empty(shape, np.uint8)
    own = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # what is shared would stay
    return np.frombuffer(own, np.uint8).reshape(shape)


def release_rows(pixels: NDArray[np.uint8], rows: int) -> None:
    """Return the memory of the first rows of an array from `allocate_pixels` to the system; their content is lost.

    Args:
        pixels: (H, W, C) uint8. Arrays with memory of any other kind are left as they are.
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
