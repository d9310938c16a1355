"""Short descriptions of values for error messages, whatever a file holds."""

import reprlib
from collections.abc import Mapping
from typing import Any

_LARGEST = 200  # characters
_SHORT = reprlib.Repr()  # bounds depth and length, so that values that contain themselves have a description too
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 120, 120, 40


def describe_value(value: Any) -> str:
    """Describe a value in at most 200 characters: its ``repr``, shortened.

    Args:
        value: Any value, of any size, which may contain itself.

    Returns:
        Text without line breaks.
    """
    if isinstance(value, Mapping):
        value = dict(value)  # reprlib bounds dictionaries, and prints other mappings whole
    try:
        text = " ".join(_SHORT.repr(value).split())
    except (ValueError, RecursionError):  # an integer with more digits than Python prints
        text = f"a very large {type(value).__name__}"
    return text if len(text) <= _LARGEST else f"{text[:_LARGEST]}..."
