"""Rows of a list of images: CSV, JSON lines or Parquet, read with errors that name the file and the row."""

import csv
import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from recontrast.data.atomic import replace_file
from recontrast.data.csv_table import TableRow, decode_text, format_table, restore_cell, shorten
from recontrast.data.json_text import parse_json
from recontrast.data.listing import DataWarning, PathLike
from recontrast.data.parquet_file import import_arrow, open_parquet
from recontrast.data.regular_file import read_bytes

COLUMNS = ("path", "split", "label", "defect", "mask", "roi", "category", "group")
"""Columns of a list; only ``path`` is required."""

_LARGEST = 2**30  # bytes: a list of ten million images
_DELIMITERS = ",;\t"  # spreadsheets write semicolons in some languages


def is_list(path: PathLike) -> bool:
    """Return whether a path is that of a list of images: an existing file with the suffix of a list."""
    return Path(path).suffix.lower() in SUFFIXES and os.path.isfile(path)


def read_rows(path: PathLike) -> list[TableRow]:
    """Read the rows of a list.

    Warns (`recontrast.data.listing.DataWarning`) of columns that have no meaning here.

    Args:
        path: CSV file with a header (``.csv``, ``.tsv``), JSON objects one a line (``.jsonl``, ``.ndjson``), or a
            Parquet file (``.parquet``, ``.pq``; needs pyarrow).

    Returns:
        The rows, at least one. Each has all of `COLUMNS`, as text; what is missing is empty.

    Raises:
        OSError: If the file cannot be read.
        ImportError: If pyarrow is needed and not installed.
        ValueError: If the file is damaged or of another kind, has no column ``path`` or no rows, or a cell holds
            neither text nor a number.
    """
    path = Path(path)
    columns, rows = _READERS[path.suffix.lower()](path)
    if not rows:
        raise ValueError(f"{path}: wanted a list of images, got one without rows")
    if "path" not in columns:
        got = shorten(", ".join(columns)) or "none"
        raise ValueError(f"{path}: wanted a column path, got the columns {got}")
    if unknown := [name for name in columns if name not in COLUMNS]:
        warnings.warn(
            f"{path}: columns not used: {shorten(', '.join(unknown))}; those of a list are {', '.join(COLUMNS)}",
            DataWarning, stacklevel=2,
        )  # fmt: skip
    return [
        TableRow(location, {name: _to_text(cells.get(name), f"{location}: {name}") for name in COLUMNS})
        for location, cells in rows
    ]


def write_rows(path: PathLike, rows: Sequence[Sequence[str]]) -> None:
    """Write a list of images, completely or not at all.

    Args:
        path: File with the suffix of a list, see `read_rows`.
        rows: Text of each of `COLUMNS`, empty if it is missing. Columns that are empty in all rows are left out.

    Raises:
        ImportError: If pyarrow is needed and not installed.
        OSError: If the file cannot be written.
        ValueError: If the suffix is not that of a list, or Parquet or JSON cannot hold a name that is not UTF-8.
    """
    path = Path(path)
    check_name(path)
    used = [index for index, name in enumerate(COLUMNS) if name == "path" or any(row[index] for row in rows)]
    table = [[row[index] for index in used] for row in rows]
    content = _WRITERS[path.suffix.lower()](path, [COLUMNS[index] for index in used], table)
    with replace_file(path, size=len(content)) as file:
        file.write(content)


def check_name(path: Path, option: str = "") -> None:
    """Raise ValueError if the name of a list to write has no ending that `write_rows` knows.

    Args:
        path: Path of the file.
        option: Option that names it, with ": ", for the error message.
    """
    if path.suffix.lower() not in _WRITERS:
        got = path.suffix or "no ending"
        raise ValueError(f"{option}{path}: wanted a name that ends in {', '.join(_WRITERS)}, got {got}")


_Rows = tuple[list[str], list[tuple[str, dict[str, Any]]]]  # names of the columns; location and cells of each row


def _read_csv(path: Path) -> _Rows:
    text = decode_text(path, read_bytes(path, "a list of images", _LARGEST))
    head = text.lstrip("\r\n").partition("\n")[0]
    if path.suffix.lower() == ".tsv":
        delimiter = "\t"
    else:  # the one that separates "path" from other columns; commas if it is alone
        delimiter = next((mark for mark in _DELIMITERS if re.search(rf"(^|{mark})[\"' ]*path\W*({mark}|$)", head, re.I)
                          and mark in head), ",")  # fmt: skip
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    header: list[str] = []
    rows = []
    try:
        for cells in reader:
            if not any(map(str.strip, cells)):
                continue
            location = f"{path} line {reader.line_num}"
            if not header:
                header = [name.strip().lower() for name in cells]
                if doubled := next((name for name in header if header.count(name) > 1), None):
                    raise ValueError(f"{location}: wanted each column once, got {shorten(doubled)!r} again")
                continue
            if len(cells) != len(header):
                raise ValueError(f"{location}: wanted {len(header)} cells, one for each column, got {len(cells)}")
            rows.append((location, dict(zip(header, map(restore_cell, cells), strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num}: wanted a CSV table, got one that cannot be read ({error})"
                         ) from error  # fmt: skip
    return header, rows


def _read_json_lines(path: Path) -> _Rows:
    columns: dict[str, None] = {}
    rows = []
    for number, line in enumerate(decode_text(path, read_bytes(path, "a list of images", _LARGEST)).split("\n"), 1):
        if not line.strip():
            continue
        location = f"{path} line {number}"
        try:
            values = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{location}: wanted a JSON object, got text that is not JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{location}: wanted a JSON object, one a line, got {shorten(line)}")
        cells = {name.strip().lower(): value for name, value in values.items()}
        columns.update(dict.fromkeys(cells))
        rows.append((location, cells))
    return list(columns), rows


def _read_parquet(path: Path) -> _Rows:
    with open_parquet(path) as opened:
        names = list(opened.schema_arrow.names)
        wanted = {name: name.strip().lower() for name in names if name.strip().lower() in COLUMNS}
        table = opened.read(columns=list(wanted))
        values = {lower: table[name].to_pylist() for name, lower in wanted.items()}
        count = opened.metadata.num_rows
    columns = [name.strip().lower() for name in names]
    return columns, [
        (f"{path} row {index + 1}", {name: cells[index] for name, cells in values.items()}) for index in range(count)
    ]


def _to_text(value: Any, location: str) -> str:
    """Return a cell as text: whole numbers without a point, nothing for a missing value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError(f"{location}: wanted text, got a null byte")
        return value
    raise ValueError(f"{location}: wanted text or a whole number, got {shorten(repr(value))}")


def _format_csv(path: Path, columns: list[str], rows: list[list[str]]) -> bytes:
    return format_table([columns, *rows])


def _format_json_lines(path: Path, columns: list[str], rows: list[list[str]]) -> bytes:
    lines = (json.dumps(dict(_select(columns, row)), ensure_ascii=False) + "\n" for row in rows)
    return _encode(path, "".join(lines))


def _format_parquet(path: Path, columns: list[str], rows: list[list[str]]) -> bytes:
    pa, pq = import_arrow()
    for row in rows:
        _encode(path, "".join(row))
    cells = [dict(_select(columns, row)) for row in rows]
    table = pa.Table.from_pylist(cells, schema=pa.schema([(name, pa.string()) for name in columns]))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    return bytes(sink.getvalue())


def _select(columns: list[str], row: list[str]) -> Iterable[tuple[str, str]]:
    """Return the cells of a row that are not empty."""
    return ((name, cell) for name, cell in zip(columns, row, strict=True) if cell)


def _encode(path: Path, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}: wanted names in UTF-8, got other bytes: write a .csv, which keeps them") from error


_READERS: dict[str, Callable[[Path], _Rows]] = {
    ".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_json_lines, ".ndjson": _read_json_lines,
    ".parquet": _read_parquet, ".pq": _read_parquet,
}  # fmt: skip
_WRITERS: dict[str, Callable[[Path, list[str], list[list[str]]], bytes]] = {
    ".csv": _format_csv, ".jsonl": _format_json_lines, ".ndjson": _format_json_lines,
    ".parquet": _format_parquet, ".pq": _format_parquet,
}  # fmt: skip
SUFFIXES = tuple(_READERS)
"""Endings of the names of lists."""
