"""Images somebody wants scored: read when they are asked for; one that cannot be read is noted, not raised."""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from recontrast.data.images import Size, parse_size, read_image


class ImageFiles:
    """Image files by place; a file that is named twice is one.

    Attributes:
        paths: in the order given.
        unread: by place, one sentence that names the file; filled while they are read, from several threads.
    """

    def __init__(self, paths: Sequence[Path], pool: ThreadPoolExecutor | None = None) -> None:
        """``pool`` decodes; None: the thread that asks."""
        unique = {os.path.abspath(path): path for path in reversed(paths)}
        self.paths = list(reversed(unique.values()))
        self.errors: dict[int, str] = {}
        self._map: Any = map if pool is None else pool.map

    def __len__(self) -> int:
        return len(self.paths)

    def resized(self, size: Size, crop: Size | None = None) -> "ResizedImages":
        """All of them in one size, as `recontrast.inference.infer.infer` takes them."""
        return ResizedImages(self, size, crop)

    def read(self, place: int, size: Size | None = None, crop: Size | None = None) -> np.ndarray | None:
        """(H, W, 3) uint8, or None where the file cannot be read, with the reason in ``unread``."""
        try:
            return read_image(self.paths[place], size=size, crop=crop)
        except OSError as error:
            self.errors[place] = f"{self.paths[place]}: {error.strerror or error}"
        except ValueError as error:
            self.errors[place] = str(error)
        return None

    def read_many(self, places: Sequence[int]) -> list[np.ndarray | None]:
        """`read` of many places at once, each in its own size."""
        return list(self._map(self.read, places))


class ResizedImages:
    """`ImageFiles` in one size; black in place of what could not be read."""

    def __init__(self, inputs: ImageFiles, size: Size, crop: Size | None) -> None:
        self.inputs, self.size, self.crop = inputs, size, crop
        self.out = parse_size(size if crop is None else crop, "size")

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: Any) -> np.ndarray:
        """(n, H, W, 3) uint8 of the places ``index``."""
        return np.stack(list(self.inputs._map(self._read, index)))

    def _read(self, place: int) -> np.ndarray:
        found = self.inputs.read(place, self.size, self.crop)
        return np.zeros((*self.out, 3), np.uint8) if found is None else found


def assign_result_names(paths: Sequence[Path]) -> list[Path]:
    """Where results go below the output folder: no two in one place.

    Folders below the one that all files share are kept, and so is a file's suffix where the names differ in nothing
    else (``a.png``, ``a.jpg``).
    """
    full = [Path(os.path.abspath(path)) for path in paths]
    shared = os.path.commonpath([path.parent for path in full])
    relative = [path.relative_to(shared) for path in full]
    count = Counter(path.with_suffix("") for path in relative)
    names = [path if count[path.with_suffix("")] > 1 else path.with_suffix("") for path in relative]
    return names if len(set(names)) == len(names) else relative
