"""The longest axis that `recontrast.data.pillow_resize` resizes exactly as Pillow."""

import math

MAX_REDUCTION = 60  # largest exact reduction factor; beyond it, the sum of lo * p can exceed 2**24


def max_exact_length(out: int) -> int:
    """Return the longest axis that is resized to ``out`` pixels exactly as by Pillow, in pixels: 15,360 for 256."""
    return min(MAX_REDUCTION * out, math.isqrt(2**22 * out))
