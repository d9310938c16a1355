"""File names that are not UTF-8, in texts that must be."""


def escape_bytes(text: str) -> str:
    r"""Replace the bytes of file names that are not UTF-8.

    Args:
        text: Text with file names as Python reads them: each byte that is not UTF-8 is a surrogate.

    Returns:
        The text, with each such byte written as ``\xff``. It can be encoded as UTF-8.
    """
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
