"""Protocols for sources of decoded images."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


class Images(Protocol):
    """Decoded images, indexed by position: a `recontrast.data.cache.ImageCache` or an array (n, H, W, 3) uint8."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any, /) -> NDArray[np.uint8]: ...


@runtime_checkable
class FileImages(Images, Protocol):
    """Images that were read from files, where one file can give several images (tiles).

    Attributes:
        offsets: Position of the first image of each file, followed by the number of images.
    """

    offsets: Sequence[int]


class SelectedImages:
    """Some images of a source, by position, without a copy of them.

    Args:
        images: Source of images.
        positions: Positions of the images, (n,).
    """

    def __init__(self, images: Images, positions: NDArray[np.int64]) -> None:
        self.images, self.positions = images, positions

    def __len__(self) -> int:
        """Number of images."""
        return len(self.positions)

    def __getitem__(self, index: Any) -> NDArray[np.uint8]:
        """Return the images at the positions ``index`` of the selection, (n, H, W, 3) uint8."""
        return self.images[self.positions[index]]


class ConcatImages:
    """Several sources of images as one, in their order.

    Args:
        sources: Sources with images of the same size.
    """

    def __init__(self, sources: Sequence[Images]) -> None:
        self.sources = sources
        self.ends = list(accumulate((len(source) for source in sources), initial=0))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: Any) -> NDArray[np.uint8]:
        """Read images by position.

        Args:
            index: Array of positions in ascending order, (n,).

        Returns:
            The images, (n, H, W, 3) uint8.
        """
        parts = []
        for source, (begin, end) in zip(self.sources, pairwise(self.ends), strict=True):
            inside = index[(index >= begin) & (index < end)]  # keeps the order, because positions ascend
            if inside.size:
                parts.append(source[inside - begin])
        return np.concatenate(parts)
