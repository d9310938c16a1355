"""File names that are not UTF-8, in texts that must be."""

import re

_SURROGATES = re.compile("[\ud800-\udfff]")


def escape_bytes(text: str) -> str:
    r"""Replace the bytes of file names that are not UTF-8.

    Args:
        text: Text with file names as Python reads them: each byte that is not UTF-8 is a surrogate.

    Returns:
        The text, with each such byte written as ``\xff`` and other surrogates as ``\ud800``. It can be encoded as
        UTF-8.
    """
    return _SURROGATES.sub(lambda match: _escape(ord(match[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"
