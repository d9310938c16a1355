"""Read bytes from files that may end too early."""

from typing import IO


def read_exactly(file: IO[bytes], length: int, offset: int | None = None) -> bytes:
    """Read a number of bytes.

    Args:
        file: File opened for reading bytes.
        length: Number of bytes.
        offset: Position of the first byte. None reads from the current position.

    Returns:
        The bytes.

    Raises:
        ValueError: If the file ends before.
    """
    if offset is not None:
        file.seek(offset)
    data = file.read(length)
    if len(data) < length:
        raise ValueError(f"the file ends {length - len(data)} bytes early")
    return data
