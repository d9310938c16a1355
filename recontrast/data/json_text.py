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
