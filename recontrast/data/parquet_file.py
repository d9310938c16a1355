"""Parquet files, by the optional package pyarrow."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recontrast.data.regular_file import open_regular

MISSING = "Parquet: wanted the package pyarrow, got none installed: pip install pyarrow"


def import_arrow() -> tuple[Any, Any]:
    """Import pyarrow.

    Returns:
        The modules ``pyarrow`` and ``pyarrow.parquet``.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(MISSING) from error
    return pyarrow, pyarrow.parquet


@contextmanager
def open_parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file, and verify the checksums of its pages as they are read.

    An error of pyarrow in the ``with`` block means that the file is damaged, and becomes a ValueError.

    Args:
        path: Path of the file.

    Yields:
        The ``pyarrow.parquet.ParquetFile``.

    Raises:
        ImportError: If pyarrow is not installed.
        OSError: If the file cannot be read.
        ValueError: If it is no Parquet file, or damaged.
    """
    pa, pq = import_arrow()
    try:
        with open_regular(path, "a Parquet file") as file:
            yield pq.ParquetFile(file, page_checksum_verification=True)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and (error.errno is not None or isinstance(error, FileNotFoundError)):
            raise
        raise ValueError(f"{path}: wanted a Parquet file, got a file of another kind or a damaged one") from error
