"""Decoded images, kept: the method uses no augmentation, so a file is decoded and resized once, not once an epoch.

One cache file holds the images of one list of files at one size: a header of `_HEADER` bytes (JSON, then blanks), then
(N, H, W, 3) uint8. Its name is a hash of format, Pillow version, sizes or tiles, and path, length and modification
time of every file: whatever changes, another name is looked for. A file appears under its name whole (temporary file,
fsync, rename), so several processes may build the same one; it is checked by length and checksum when it is opened, and
built again where that fails. Files of former states stay until someone deletes the folder.
"""

import hashlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from recontrast.data.atomic import replace_file
from recontrast.data.images import Size, image_size, parse_size, read_image
from recontrast.data.listing import PathLike
from recontrast.data.tiles import Tiles, count_tiles

FORMAT = 2  # raised where pixels or file change: 2 is resized across, then down
_PREFIX = "images-"
_HEADER = 4096  # bytes: a page, so that the images are aligned as the memory map is
_STALE = 3600  # seconds: a temporary file to which nobody wrote for so long belongs to a process that was killed


class ImageCache:
    """Images of a list of files as uint8, decoded once, in memory or in a memory-mapped file.

    Args:
        samples: `datasets.Sample`s or paths.
        size: as in `images.read_image`, but wanted: all images have one size.
        crop: as in `images.read_image`.
        tile: pixels; instead of ``size`` and ``crop``: images keep their own scale and are cut into tiles of that side,
            those of one file one after the other, see `recontrast.data.tiles`.
        stride: pixels from one tile to the next; None: ``tile``, so that they do not overlap.
        directory: folder of cache files, made if it is missing. None keeps the images in memory.
        workers: threads that decode. None takes one per CPU that this process may use.
        on_progress: called with (images done, images in all) while decoding; not for a cache file that exists.

    Attributes:
        shape: (N, H, W, 3).
        path: the cache file, None in memory.
        first: place of each file's first image (there is one, or its tiles), and the end.

    Raises:
        ValueError: files that are no images, a size, crop, tile or stride that is none, or fewer than 1 worker.
        OSError: a file cannot be read, or the cache not be written: the bytes wanted and free are named.
    """

    def __init__(
        self,
        samples: Sequence[Any],
        size: Size,
        crop: Size | None = None,
        directory: PathLike | None = None,
        *,
        tile: int | None = None,
        stride: int | None = None,
        workers: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._files = [Path(getattr(sample, "path", sample)) for sample in samples]
        self._size = parse_size(size, "size")
        self._crop = None if crop is None else parse_size(crop, "crop")
        if workers is not None and workers < 1:
            raise ValueError(f"ImageCache: workers must be at least 1, got {workers}")
        self._workers = workers or len(os.sched_getaffinity(0))
        self._on_progress = on_progress or (lambda done, total: None)
        self._tile = None if tile is None else (tile, stride or tile)
        self.offsets = [*accumulate((self._count(path) for path in self._files), initial=0)]
        side = (self._crop or self._size) if tile is None else (tile, tile)
        self.shape = (self.offsets[-1], *side, 3)
        self.path: Path | None = None
        if directory is None or not self._files:
            self._images = np.empty(self.shape, np.uint8)
            self._decode(self._images.__setitem__)
            return
        self.path = Path(directory) / f"{_PREFIX}{self._key()}.u8"
        images = self._map(self.path)
        if images is None:
            self._build(self.path)
            images = self._map(self.path)
        if images is None:
            raise OSError(f"{self.path}: wanted the decoded images just written there, got others")
        self._images = images

    def __len__(self) -> int:
        """Number of images."""
        return self.shape[0]

    def __getitem__(self, indices: Any) -> np.ndarray:
        """Copies of images.

        Args:
            indices: a list, array or CPU tensor of integers or bools, (n,), or a slice.

        Returns:
            (n, H, W, 3) uint8.
        """
        if isinstance(indices, slice):
            return self._images[indices].copy()
        index = np.atleast_1d(np.asarray(indices))
        return self._images[index if index.size else index.astype(np.intp)]  # an empty list would be of floats

    def tensor(self, device: torch.device | str | None = None) -> torch.Tensor:
        """All images on ``device`` (None: torch's default), (N, H, W, 3) uint8; a copy, made piece by piece."""
        result = torch.empty(self.shape, dtype=torch.uint8, device=device)
        step = max(1, 2**26 // max(1, self._image_bytes))  # pieces of 64 MB
        for start in range(0, len(self), step):
            result[start : start + step].copy_(torch.from_numpy(self[start : start + step]))
        return result

    @property
    def _image_bytes(self) -> int:
        return self.shape[1] * self.shape[2] * self.shape[3]

    def _key(self) -> str:
        """Hash of all that decides the bytes."""
        files = []
        for path in self._files:
            try:
                stat = path.stat()
            except FileNotFoundError:
                raise FileNotFoundError(f"{path}: wanted an image, got no such file") from None
            files.append((os.path.abspath(path), stat.st_size, stat.st_mtime_ns))
        how = ["bilinear", self._size, self._crop] if self._tile is None else ["tiles", *self._tile]
        what = [FORMAT, PIL.__version__, *how, files]
        return hashlib.sha256(json.dumps(what).encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def _decode(self, keep: Callable[[int, np.ndarray], Any]) -> None:
        """Decode every file and hand it to ``keep`` on a thread; the first failure in list order is raised."""

        def work(i: int) -> None:
            for place, pixels in enumerate(self._images_of(self._files[i]), self.offsets[i]):
                keep(place, pixels)

        pool = ThreadPoolExecutor(self._workers)  # PIL decodes and resizes without holding the interpreter's lock
        try:
            for done, _ in enumerate(pool.map(work, range(len(self._files))), 1):
                self._on_progress(done, len(self._files))
        finally:  # no thread writes any more when an error, or Ctrl-C, goes on from here
            pool.shutdown(wait=True, cancel_futures=True)

    def _count(self, path: Path) -> int:
        return 1 if self._tile is None else count_tiles(image_size(path), *self._tile)

    def _images_of(self, path: Path) -> Iterator[np.ndarray]:
        if self._tile is None:
            yield read_image(path, size=self._size, crop=self._crop)
        else:
            tiles = Tiles(read_image(path), *self._tile)
            yield from (tiles[[i]][0] for i in range(len(tiles)))

    def _build(self, path: Path) -> None:
        """Write the cache file under its name, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{_PREFIX}*.tmp"):
            with suppress(FileNotFoundError):  # another process may be doing the same
                if time.time() - left.stat().st_mtime > _STALE:
                    left.unlink()
        total = _HEADER + len(self) * self._image_bytes
        checksums = np.zeros(len(self), "<u4")
        temporary = f".{path.name}.{uuid.uuid4().hex}.tmp"  # its own: several processes may build the same
        with replace_file(path, size=total, temporary_name=temporary, describe_error=_unwritable) as file:

            def keep(i: int, pixels: np.ndarray) -> None:
                checksums[i] = zlib.crc32(pixels.data)
                _write(file.fileno(), pixels.tobytes(), _HEADER + i * self._image_bytes)

            self._decode(keep)
            _write(file.fileno(), self._header(checksums), 0)

    def _map(self, path: Path) -> np.ndarray | None:
        """Read-only images of the cache file; None where there is none, or one that is short or damaged."""
        if not path.is_file() or path.stat().st_size != _HEADER + len(self) * self._image_bytes:
            return None
        with open(path, "rb") as file:
            head = file.read(_HEADER)
            images = np.asarray(np.memmap(file, np.uint8, "r", _HEADER, self.shape))
        with ThreadPoolExecutor(self._workers) as pool:
            checksums = np.fromiter(pool.map(lambda image: zlib.crc32(image.data), images), "<u4", len(self))
        return images if head == self._header(checksums) else None

    def _header(self, checksums: np.ndarray) -> bytes:
        """The first page of the cache file; two are equal only if all images are."""
        what = {"format": FORMAT, "shape": self.shape, "crc32": zlib.crc32(checksums.tobytes())}
        return json.dumps(what).encode().ljust(_HEADER)


def _write(file: int, data: bytes, offset: int) -> None:
    """Write all of ``data``: the system may take a part, and says why not all only on the next call."""
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _unwritable(path: Path, reason: str, size: int | None, free: int | None) -> str:
    if size is None:
        return f"{path}: wanted to write decoded images, got {reason!r}"
    return f"{path}: wanted to write {size} bytes of decoded images, got {reason!r}, {free} bytes free"
