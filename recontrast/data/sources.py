"""The protocol of anything that yields decoded images."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Images(Protocol):
    """Decoded images: `recontrast.data.cache.ImageCache`, or an array (n, H, W, 3)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> NDArray[np.uint8]: ...


class ConcatImages:
    """Images of several sources as those of one, in their order.

    Args:
        sources: images of one size.
    """

    def __init__(self, sources: Sequence[Images]) -> None:
        self.sources = sources
        self.ends = list(accumulate((len(source) for source in sources), initial=0))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: Any) -> NDArray[np.uint8]:
        """The images of an array of rising whole numbers ``index``: (n, H, W, 3) uint8."""
        parts = []
        for source, (begin, end) in zip(self.sources, pairwise(self.ends), strict=True):
            inside = index[(index >= begin) & (index < end)]  # indices rise
            if inside.size:
                parts.append(source[inside - begin])
        return np.concatenate(parts)
