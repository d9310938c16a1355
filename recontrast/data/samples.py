"""Scale samples of more or fewer than 8 bits to 8 bits."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

FULL_SCALE_KEY = "full_scale"  # in Image.info: largest value of a grey sample, if it is not that of the mode
_BLOCK_SAMPLES = 1 << 22  # samples that are scaled at a time


class SampleError(ValueError):
    """Samples that cannot be converted to 8 bits without guessing.

    Args:
        got: The samples, for the error message.
        wanted: What can be converted.
    """

    def __init__(self, got: str, wanted: str = "unsigned integer samples of 1 to 16 bits") -> None:
        super().__init__(got)
        self.wanted = wanted


def check_range(planes: list[NDArray[Any]], full: int) -> None:
    """Raise an error if a sample exceeds the full scale.

    Args:
        planes: Samples.
        full: Value of the brightest sample.

    Raises:
        SampleError: If a sample is larger.
    """
    largest = max(int(plane.max()) for plane in planes)
    if largest > full:
        raise SampleError(f"a sample of {largest}", f"samples from 0 to {full} ({full.bit_length()} bits)")


def scale_to_eight_bits(values: NDArray[Any], full: int) -> NDArray[np.uint8]:
    """Scale samples from [0, full] to [0, 255], rounded to nearest; values above ``full`` become 255.

    Args:
        values: Samples of any integer dtype, not negative.
        full: Value of the brightest sample.

    Returns:
        Array of the same shape, uint8.
    """
    if full == 255 and values.dtype == np.uint8:
        return values
    result = np.empty(values.shape, np.uint8)
    step = max(_BLOCK_SAMPLES // max(int(np.prod(values.shape[1:])), 1), 1)
    for top in range(0, len(values), step):
        block = np.minimum(values[top : top + step], full).astype(np.int32)
        block *= 255
        block += full // 2
        block //= full
        result[top : top + step] = block
    return result
