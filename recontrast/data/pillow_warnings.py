"""Keep the warnings of Pillow and pydicom from the screen while a file is decoded: they do not name the file.

What they say is covered otherwise: the pixel limit is `recontrast.data.images.MAX_PIXELS`, transparency is dropped, and
damaged EXIF data is reported with the name of its file.
"""

import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_LOCK = threading.Lock()
_active = 0  # decoders at work
_FILTER = ("ignore", None, Warning, re.compile(r"(PIL|pydicom)\."), 0)  # as `warnings.filterwarnings` builds it


@contextmanager
def ignore_pillow_warnings() -> Iterator[None]:
    """Ignore warnings from modules of Pillow and pydicom until the last thread leaves the block.

    `warnings.catch_warnings` is not made for threads: of two that overlap, the later one restores the filter of the
    earlier one.
    """
    global _active
    with _LOCK:
        if not any(entry is _FILTER for entry in warnings.filters):  # a test may have replaced the filters
            # Inserted directly: `warnings.filterwarnings` makes every other warning of the process appear again.
            warnings.filters.insert(0, _FILTER)  # type: ignore[attr-defined]
        _active += 1
    try:
        yield
    finally:
        with _LOCK:
            _active -= 1
            if _active == 0:
                with suppress(ValueError):
                    warnings.filters.remove(_FILTER)  # type: ignore[attr-defined]
