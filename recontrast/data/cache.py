"""Cache of decoded images: without augmentation, each file is decoded and resized once instead of once per epoch.

A cache file holds the images of a list of files at one size: a header of `_HEADER_BYTES` bytes (JSON, padded with
blanks), then (N, H, W, 3) uint8, or float32 with a window. Its name is a hash of the format, the Pillow version, the
sizes or tiles, and the path, length and modification time of every file, so a change of any of these selects another
cache file. Cache files are written atomically, so several processes can build the same one. Length and checksum are
checked on opening, and a damaged file is built again. Outdated cache files are not deleted.
"""

import hashlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch

from recontrast.data.atomic import replace_file
from recontrast.data.encoded_image import ImagePage
from recontrast.data.images import Size, image_size, parse_size, read_image
from recontrast.data.listing import PathLike
from recontrast.data.regular_file import is_regular, open_regular
from recontrast.data.system import count_cpus
from recontrast.data.tiles import Tiles, count_tiles, join_tiles
from recontrast.data.views import Views, list_views, show_view
from recontrast.data.window import Window, parse_window, pixel_dtype

FORMAT = 3  # increase when the pixels or the layout change; 3 reads unusual TIFF files by our own reader
_PREFIX = "images-"
_HEADER_BYTES = 4096  # one page, so that the images are page-aligned in the memory map
_position_lock = threading.Lock()  # where the system cannot write at a given offset


class ImageCache:
    """Images of a list of files, decoded once, in memory or in a memory-mapped file.

    Args:
        samples: Paths, or samples (`recontrast.data.datasets.Sample`).
        size: Size after resizing, in pixels: (height, width), or one number for a square.
        crop: Size of the centre crop after resizing, in pixels. None keeps the whole image.
        directory: Folder for cache files, created if missing. None keeps the images in memory.
        tile: Side of a tile, in pixels. If given, ``size`` and ``crop`` are ignored: images keep their original scale
            and are cut into tiles, the tiles of one file in sequence. See `recontrast.data.tiles`.
        stride: Distance from one tile to the next, in pixels. None uses ``tile``, without overlap.
        bits: Bits that the camera uses of 16-bit samples, as in `recontrast.data.images.read_image`.
        window: Values that become 0 and 1, as in `recontrast.data.images.read_image`.
        views: Views of each part, whose path is that of a file here; they are images in sequence, or the tiles of one
            after those of another. None: single images.
        workers: Number of decoding threads. None uses one per available CPU.
        on_progress: Called with (files done, all files) while decoding; not called if the cache file exists.

    Attributes:
        shape: (N, H, W, 3).
        path: Path of the cache file; None in memory.
        offsets: Position of the first image (or tile) of each file, followed by the number of images.

    Raises:
        ValueError: If a file is not an image, a size, crop, tile or stride is invalid, or ``workers`` is below 1.
        OSError: If a file cannot be read or the cache file cannot be written. For a full disk, the message states the
            bytes needed and free.
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
        bits: int | None = None,
        window: Window = None,
        views: Views | None = None,
        workers: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._files = [Path(sample if isinstance(sample, (str, os.PathLike)) else sample.path) for sample in samples]
        self._size = parse_size(size, "size")
        self._crop = None if crop is None else parse_size(crop, "crop")
        if workers is not None and workers < 1:
            raise ValueError(f"ImageCache: workers: wanted at least 1, got {workers}")
        self._workers = workers or count_cpus()
        self._on_progress = on_progress or (lambda done, total: None)
        self._tile = None if tile is None else (tile, stride or tile)
        self._views = views
        self._bits, self._window, self._dtype = bits, parse_window(window), pixel_dtype(window)
        self.offsets = [*accumulate((self._count_images(path) for path in self._files), initial=0)]
        side = (self._crop or self._size) if tile is None else (tile, tile)
        self.shape = (self.offsets[-1], *side, 3)
        self.path: Path | None = None
        if directory is None or not self._files:
            self._images = np.empty(self.shape, self._dtype)
            self._decode(self._images.__setitem__)
            return
        self.path = Path(directory) / f"{_PREFIX}{self._compute_key()}.{'u8' if window is None else 'f32'}"
        images = self._map(self.path)
        if images is None:
            self._build(self.path)
            images = self._map(self.path)
        if images is None:
            raise OSError(f"{self.path}: wanted the decoded images just written, got a file with other content")
        self._images = images

    def __len__(self) -> int:
        """Number of images."""
        return self.shape[0]

    def __getitem__(self, indices: Any) -> np.ndarray:
        """Copy images.

        Args:
            indices: List, array or CPU tensor of integers or bools, (n,), or a slice.

        Returns:
            The images, (n, H, W, 3), uint8, or float32 with a window.
        """
        if isinstance(indices, slice):
            return self._images[indices].copy()
        index = np.atleast_1d(np.asarray(indices))
        return self._images[index if index.size else index.astype(np.intp)]  # NumPy turns an empty list into floats

    def read_views(self, position: int) -> Iterator[np.ndarray]:
        """Copy the whole image of one file, or the views of a part one by one: with tiles, put together from them.

        Args:
            position: Position of the file in ``samples``.

        Yields:
            (H, W, 3), uint8, or float32 with a window; with tiles, at its original size.

        Raises:
            OSError: With tiles, if the size of the file can no longer be read.
            ValueError: With tiles, if the file is no longer an image.
        """
        start, stop = self.offsets[position : position + 2]
        count = (stop - start) // (1 if self._views is None else len(self._views))
        size = None if self._tile is None else image_size(show_view(self._files[position], self._views))
        for first in range(start, stop, count):
            images = self[first : first + count]
            yield images[0] if self._tile is None or size is None else join_tiles(images, size, self._tile[1])

    def tensor(self, device: torch.device | str | None = None) -> torch.Tensor:
        """Copy all images to a tensor, in pieces of 64 MB.

        Args:
            device: Device of the tensor. None uses PyTorch's default.

        Returns:
            All images, (N, H, W, 3), uint8, or float32 with a window.
        """
        dtype = torch.uint8 if self._window is None else torch.float32
        result = torch.empty(self.shape, dtype=dtype, device=device)
        step = max(1, 2**26 // max(1, self._image_bytes))
        for start in range(0, len(self), step):
            result[start : start + step].copy_(torch.from_numpy(self[start : start + step]))
        return result

    @property
    def _image_bytes(self) -> int:
        """Size of one image, in bytes."""
        return self.shape[1] * self.shape[2] * self.shape[3] * self._dtype.itemsize

    def _compute_key(self) -> str:
        """Return the hash that names the cache file: everything that determines its content."""
        files = []
        for path in self._files:
            for source in list_views(path, self._views):
                file = Path(str(source.path if isinstance(source, ImagePage) else source))
                try:
                    stat = file.stat()
                except FileNotFoundError:
                    raise FileNotFoundError(f"{file}: wanted an image, got no such file") from None
                files.append((os.path.abspath(file), stat.st_size, stat.st_mtime_ns))
        layout = ["bilinear", self._size, self._crop] if self._tile is None else ["tiles", *self._tile]
        scale = [self._bits] if self._window is None else ["window", *self._window]
        own = [] if self._views is None else [["views", self._views.source, *self._views.names]]
        content = [FORMAT, PIL.__version__, *layout, *scale, *own, files]
        return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def _decode(self, store: Callable[[int, np.ndarray], Any]) -> None:
        """Decode all files on threads, and call ``store`` with the position and pixels of each image.

        If files fail, the error of the first one in list order is raised.
        """

        def decode_file(i: int) -> None:
            for position, pixels in enumerate(self._read(self._files[i]), self.offsets[i]):
                store(position, pixels)

        pool = ThreadPoolExecutor(self._workers)  # PIL releases the interpreter lock to decode and resize
        try:
            for done, _ in enumerate(pool.map(decode_file, range(len(self._files))), 1):
                self._on_progress(done, len(self._files))
        finally:  # wait for the threads, so that none writes after an error or Ctrl-C
            pool.shutdown(wait=True, cancel_futures=True)

    def _count_images(self, path: Path) -> int:
        """Return the number of images (tiles, views of a part, or tiles of these) of a file."""
        count = 1 if self._views is None else len(self._views)
        if self._tile is None:
            return count
        return count * count_tiles(image_size(show_view(path, self._views)), *self._tile)

    def _read(self, path: Path) -> Iterator[np.ndarray]:
        """Yield the image, the views or the tiles of a file; of the views of a part, tiles of one after the other."""
        scale: dict[str, Any] = {"bits": self._bits, "window": self._window}
        scale |= {"size": self._size, "crop": self._crop} if self._tile is None else {}
        images = [read_image(path, **scale)] if self._views is None else self._views.read(path, **scale)
        if self._tile is None:
            yield from images
            return
        for image in images:
            tiles = Tiles(image, *self._tile)
            yield from (tiles[[i]][0] for i in range(len(tiles)))

    def _build(self, path: Path) -> None:
        """Write the cache file atomically."""
        total = _HEADER_BYTES + len(self) * self._image_bytes
        checksums = np.zeros(len(self), "<u4")
        with replace_file(path, size=total, describe_error=_describe_write_error) as file:

            def store(i: int, pixels: np.ndarray) -> None:
                checksums[i] = zlib.crc32(pixels.data)
                _write_at(file.fileno(), pixels.tobytes(), _HEADER_BYTES + i * self._image_bytes)

            self._decode(store)
            _write_at(file.fileno(), self._make_header(checksums), 0)

    def _map(self, path: Path) -> np.ndarray | None:
        """Map the images of the cache file, read-only; None if it is missing, of the wrong length or damaged."""
        if not is_regular(path) or path.stat().st_size != _HEADER_BYTES + len(self) * self._image_bytes:
            return None
        with open_regular(path, "decoded images") as file:
            header = file.read(_HEADER_BYTES)
            images = np.asarray(np.memmap(file, self._dtype, "r", _HEADER_BYTES, self.shape))
        with ThreadPoolExecutor(self._workers) as pool:
            checksums = np.fromiter(pool.map(lambda image: zlib.crc32(image.data), images), "<u4", len(self))
        return images if header == self._make_header(checksums) else None

    def _make_header(self, checksums: np.ndarray) -> bytes:
        """Return the header of the cache file, which contains a checksum of all images."""
        content = {"format": FORMAT, "shape": self.shape, "crc32": zlib.crc32(checksums.tobytes())}
        return json.dumps(content).encode().ljust(_HEADER_BYTES)


def _write_at(file: int, data: bytes, offset: int) -> None:
    """Write all of ``data`` at ``offset``. The system can write only a part; the next call then raises the error."""
    while data:
        if hasattr(os, "pwrite"):
            written = os.pwrite(file, data, offset)
        else:  # Windows
            with _position_lock:
                os.lseek(file, offset, os.SEEK_SET)
                written = os.write(file, data)
        data, offset = data[written:], offset + written


def _describe_write_error(path: Path, reason: str, size: int | None, free: int | None) -> str:
    """Return the error message for a cache file that could not be written."""
    if size is None:
        return f"{path}: wanted to write decoded images, got {reason!r}"
    return f"{path}: wanted to write {size} bytes of decoded images, got {reason!r}, {free} bytes free"
