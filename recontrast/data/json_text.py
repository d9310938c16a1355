"""JSON in files that may be damaged or of others."""

import json
from typing import Any


def parse_json(text: bytes | str) -> Any:
    """Parse JSON.

    Args:
        text: Text, or its bytes in UTF-8, UTF-16 or UTF-32.

    Returns:
        The value.

    Raises:
        ValueError: If the text is not JSON, or if it is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("the brackets are nested too deeply") from error


def describe_json_error(error: Exception) -> str:
    """Describe an error of reading JSON, or values in it, after the words "wanted ..., got".

    Args:
        error: What `parse_json` or the access to a value raised.

    Returns:
        Part of a sentence.
    """
    if isinstance(error, KeyError):
        return f"none with the name {error.args[0]}"
    return "a value of another type" if isinstance(error, TypeError) else str(error)
