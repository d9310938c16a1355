"""Read the tags of TIFF and BigTIFF files: the layout of a page, and the number of pages."""

import io
import struct
from dataclasses import dataclass
from typing import IO, NamedTuple

from recontrast.data.encoded_image import EncodedImage
from recontrast.data.exact_read import read_exactly
from recontrast.data.formats import HEAD_BYTES, detect_format
from recontrast.data.listing import PathLike
from recontrast.data.regular_file import open_regular

PHOTOMETRICS = {0: "white is zero", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK"}
COMPRESSIONS = {1: "none", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits", 34925: "LZMA", 50000: "ZSTD"}
_TYPES = {
    1: "B",
    3: "H",
    4: "L",
    6: "b",
    8: "h",
    9: "l",
    13: "L",
    16: "Q",
    17: "q",
    18: "Q",
}  # integer types, by number
_MAX_VALUES = 1 << 24  # values of one tag: twice the strips of an image of 1 pixel per strip and 8 megapixels
_MAX_ENTRIES = 4096
_MAX_PAGES = 4096


class _Layout(NamedTuple):
    """How the numbers of a file are stored."""

    order: str
    big: bool
    word: str  # code of an offset
    entry_size: int  # bytes of a tag
    inline: int  # bytes of a value that a tag itself holds, and of an offset


@dataclass(frozen=True)
class TiffPage:
    """Layout of a page of a TIFF file.

    Attributes:
        order: Byte order, "<" or ">".
        big: Whether the file is a BigTIFF.
        tags: Values of the integer tags by number.
        pages: 2 if another page follows, else 1: the chain is not followed further.
    """

    order: str
    big: bool
    tags: dict[int, tuple[int, ...]]
    pages: int

    def get(self, tag: int, default: int) -> int:
        """Return the first value of a tag, or ``default``."""
        return self.tags.get(tag, (default,))[0]

    @property
    def height(self) -> int:
        """Height of the stored image, in pixels."""
        return self.get(257, 0)

    @property
    def width(self) -> int:
        """Width of the stored image, in pixels."""
        return self.get(256, 0)

    @property
    def samples(self) -> int:
        """Number of samples of a pixel."""
        return self.get(277, 1)

    @property
    def bits(self) -> tuple[int, ...]:
        """Bits of each sample."""
        bits = self.tags.get(258, (1,))
        return bits * self.samples if len(bits) == 1 else bits

    @property
    def sample_format(self) -> int:
        """Format of all samples: 1 for unsigned integers; 0 if the samples differ."""
        formats = set(self.tags.get(339, (1,))[: self.samples])
        return formats.pop() if len(formats) == 1 else 0

    @property
    def planar(self) -> bool:
        """Whether each sample has a plane of its own."""
        return self.samples > 1 and self.get(284, 1) == 2

    @property
    def orientation(self) -> int:
        """Orientation of the image, from 1 to 8."""
        return self.get(274, 1)

    @property
    def needs_own_reader(self) -> bool:
        """Whether Pillow misreads or refuses the page, and `read_page` can read it or name the reason."""
        if self.sample_format != 1:
            return self.sample_format != 4 or max(self.bits) > 8
        if self.get(259, 1) not in COMPRESSIONS or self.get(262, 1) not in PHOTOMETRICS:
            return self.big and self.order == ">"
        widest = max(self.bits)
        return (
            len(set(self.bits)) > 1
            or (widest != 8 and (widest not in (1, 2, 4) or self.samples > 1))
            or (self.planar or (self.big and self.order == ">") or self.get(266, 1) == 2)
        )


def read_tags(file: IO[bytes], page: int = 0) -> TiffPage:
    """Read the tags of a page.

    Args:
        file: TIFF file, at its start.
        page: Number of the page, counted from 0.

    Returns:
        The layout.

    Raises:
        ValueError: If the file has no such page, or a tag lies outside the file.
    """
    layout, start, size = _read_head(file)
    for number in range(page):
        start = _find_following(file, layout, start, size)
        if not start:
            raise ValueError(f"page {page + 1} of {number + 1}")
    order, big, word, entry_size, inline = layout
    count = _count_entries(file, layout, start)
    first = start + (8 if big else 2)
    entries = read_exactly(file, count * entry_size, first)
    tags: dict[int, tuple[int, ...]] = {}
    for at in range(0, len(entries), entry_size):
        tag, kind, number = struct.unpack_from(order + "HH" + word, entries, at)
        code = _TYPES.get(kind)
        if code is None or not 0 < number <= _MAX_VALUES:
            continue
        length = number * struct.calcsize(order + code)
        where = at + entry_size - inline
        if length > inline:
            offset = struct.unpack_from(order + word, entries, where)[0]
            if offset + length > size:
                raise ValueError(f"tag {tag} lies outside the file")
            data = read_exactly(file, length, offset)
        else:
            data = entries[where : where + length]
        tags.setdefault(tag, struct.unpack(f"{order}{number}{code}", data))
    return TiffPage(order, big, tags, 2 if _find_following(file, layout, start, size) else 1)


def count_pages(file: IO[bytes]) -> int:
    """Count the pages of a TIFF file.

    Args:
        file: TIFF file, at its start.

    Returns:
        Number of pages.

    Raises:
        ValueError: If the chain of pages is damaged, or longer than 4096.
    """
    layout, start, size = _read_head(file)
    seen: dict[int, None] = {}
    while start:
        if start in seen or len(seen) == _MAX_PAGES:
            raise ValueError("a chain of pages without an end")
        seen[start] = None
        start = _find_following(file, layout, start, size)
    return len(seen)


def count_file_pages(path: PathLike | EncodedImage) -> int:
    """Count the pages of an image file.

    Args:
        path: Path of a TIFF file, or its content.

    Returns:
        Number of pages; 1 for a file of another format.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the chain of pages is damaged.
    """
    opened = io.BytesIO(path.content) if isinstance(path, EncodedImage) else open_regular(path, "an image")
    with opened as file:
        if detect_format(file.read(HEAD_BYTES)) != "TIFF":
            return 1
        file.seek(0)
        try:
            return count_pages(file)
        except (ValueError, struct.error) as error:
            raise ValueError(f"{path}: wanted a complete TIFF file, got a damaged one ({error})") from error


def _read_head(file: IO[bytes]) -> tuple[_Layout, int, int]:
    """Return the layout of a file, the offset of its first page and its size."""
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = head[2:4] in (b"+\0", b"\0+")
    layout = _Layout(order, big, *(("Q", 20, 8) if big else ("L", 12, 4)))
    start = struct.unpack_from(order + layout.word, head, 8 if big else 4)[0]
    return layout, start, file.seek(0, io.SEEK_END)


def _count_entries(file: IO[bytes], layout: _Layout, start: int) -> int:
    """Return the number of tags of the page at ``start``."""
    count = _unpack(file, start, layout.order + ("Q" if layout.big else "H"))[0]
    if not 0 < count <= _MAX_ENTRIES:
        raise ValueError(f"{count} tags")
    return count


def _find_following(file: IO[bytes], layout: _Layout, start: int, size: int) -> int:
    """Return the offset of the page after the one at ``start``; 0 after the last one."""
    after = start + (8 if layout.big else 2) + _count_entries(file, layout, start) * layout.entry_size
    return _unpack(file, after, layout.order + layout.word)[0] if after <= size - layout.inline else 0


def _unpack(file: IO[bytes], offset: int, code: str) -> tuple[int, ...]:
    """Read integers at ``offset``."""
    return struct.unpack(code, read_exactly(file, struct.calcsize(code), offset))
