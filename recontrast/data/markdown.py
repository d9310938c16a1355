"""Names of files and folders as plain text in Markdown."""

import re
from collections.abc import Iterable

# Everything that Markdown or HTML gives a meaning. An underscore inside a word has none, as in metal_nut.
_SPECIAL = re.compile(r"[\\\\`*\[\]<>|~]|^[#+-]|(?<![^\W_])_|_(?![^\W_])")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape_markdown(text: str) -> str:
    r"""Escape a text so that Markdown and HTML show it as it is.

    Args:
        text: Text that may contain the names of files or folders.

    Returns:
        The text on one line. Control characters, and bytes that are not UTF-8, are written as ``\x0a``.
    """
    text = _CONTROLS.sub(lambda match: f"\\x{ord(match[0]) & 0xFF:02x}", text.replace("&", "&amp;"))
    return _SPECIAL.sub(lambda match: "\\" + match[0], text)


def format_row(cells: Iterable[str]) -> str:
    """Return one row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
