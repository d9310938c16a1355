"""Keep Pillow's warnings from the screen while a file is decoded: they do not name the file.

What they say is covered otherwise: the pixel limit is `recontrast.data.images.MAX_PIXELS`, transparency is dropped, and
damaged EXIF data is reported with the name of its file.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_LOCK = threading.Lock()
_active = 0  # decoders at work
_entry: Any = None  # their filter


@contextmanager
def ignore_pillow_warnings() -> Iterator[None]:
    """Ignore warnings from modules of Pillow until the last thread leaves the block.

    `warnings.catch_warnings` is not made for threads: of two that overlap, the later one restores the filter of the
    earlier one.
    """
    global _active, _entry
    with _LOCK:
        if _active == 0 or not any(entry is _entry for entry in warnings.filters):
            warnings.filterwarnings("ignore", module=r"PIL\.")
            _entry = warnings.filters[0]
        _active += 1
    try:
        yield
    finally:
        with _LOCK:
            _active -= 1
            if _active == 0:
                with suppress(ValueError, AttributeError):  # someone may have replaced the filters
                    warnings.filters.remove(_entry)  # type: ignore[attr-defined]
