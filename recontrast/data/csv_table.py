"""CSV tables: read with errors that name the file and the line, written so that spreadsheets run nothing in them."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recontrast.data.regular_file import read_bytes

# Spreadsheets run a cell that begins with one of these as a formula (OWASP, "CSV Injection"), also in full width.
_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_QUOTED = re.compile(r"[,;\t\r\n\"]|^\s|\s$")  # semicolons separate the cells in some languages
_LARGEST_QUOTE = 200  # characters
_LARGEST = 2**30  # bytes of a table: the scores of ten million images
_BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)


@dataclass(frozen=True)
class TableRow:
    """One row of a table.

    Attributes:
        location: File and line, the first words of error messages.
        cells: Content by column name, without surrounding blanks.
    """

    location: str
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        """Return the content of the cell in ``column``."""
        return self.cells[column]


def format_table(rows: Iterable[Sequence[Any]]) -> bytes:
    """Format rows as a CSV file.

    Text that a spreadsheet would run as a formula gets a ``'`` in front; `read_table` removes it. Numbers, also
    negative ones, are not text. Every row is one line, except for names with line breaks, which are quoted.

    Args:
        rows: Rows of cells, the header first. None gives an empty cell, and a float keeps 9 significant digits if it is
            wrapped in `Rounded`, else all.

    Returns:
        Content of the file, in UTF-8; bytes of file names that are not UTF-8 are kept.
    """
    text = "".join(",".join(map(_format_cell, row)) + "\n" for row in rows)
    return text.encode(errors="surrogateescape")


class Rounded(float):
    """Number that a table shows with 9 significant digits, which identify every float32."""

    def __str__(self) -> str:
        return f"{float(self):.9g}"


def _format_cell(cell: Any) -> str:
    if cell is None:
        return ""
    text = str(cell)
    if isinstance(cell, str):
        if _FORMULA.match(text):
            text = f"'{text}"
        if _QUOTED.search(text):
            text = text.replace('"', '""')
            return f'"{text}"'
    return text


def shorten(text: str) -> str:
    """Return text of a file as error messages quote it: one line of at most 200 characters."""
    line = " ".join(text.split())
    return line if len(line) <= _LARGEST_QUOTE else f"{line[:_LARGEST_QUOTE]}..."


def decode_text(path: Path, content: bytes) -> str:
    """Decode a text file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

    Args:
        path: Path of the file, for the error message.
        content: Content of the file.

    Returns:
        The text, without the byte order mark. Bytes that are not UTF-8 are kept as surrogates, for names of files.

    Raises:
        ValueError: If the text has null bytes, as UTF-16 without a byte order mark has, or is cut off.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            try:
                text = content[len(mark) :].decode(encoding, "surrogateescape" if encoding == "utf-8" else "strict")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: wanted text in {encoding.upper()}, got {error.reason}") from error
            break
    else:
        text = content.decode(errors="surrogateescape")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(f"{path} line {line}: wanted text in UTF-8, or UTF-16 with a byte order mark, got a null byte")
    return text


def read_table(path: Path, columns: Sequence[str], *, own: bool = False) -> list[TableRow]:
    """Read a CSV file with a header.

    Args:
        path: File in UTF-8, or in UTF-16 with a byte order mark, as spreadsheets write it.
        columns: Names of the required columns, in any order in the file; further columns are allowed. The first one
            is a key: its values must be unique.
        own: Whether `format_table` wrote the file: cells are returned exactly as they were given to it, including
            blanks at their ends and bytes that are not UTF-8.

    Returns:
        The rows, at least one; empty rows are skipped.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a CSV table in UTF-8, lacks a column or has no rows, if a row has the wrong
            number of cells, or if a key occurs twice.
    """
    table: list[TableRow] = []
    lines_by_key: dict[str, str] = {}
    clean = restore_cell if own else str.strip
    try:
        text = decode_text(path, read_bytes(path, "a CSV table", _LARGEST))
        if not own:
            text.encode()
        reader = csv.reader(io.StringIO(text, newline=""))
        header = [name.strip() for name in next(reader, [])]
        if missing := [name for name in columns if name not in header]:
            got = shorten(", ".join(header)) or "an empty file"
            raise ValueError(f"{path}: wanted the columns {', '.join(columns)}, got {got}: {missing[0]} is missing")
        for cells in reader:
            location = f"{path} line {reader.line_num}"
            if not any(map(str.strip, cells)):
                continue
            if len(cells) != len(header):
                raise ValueError(f"{location}: wanted {len(header)} cells, one for each column, got {len(cells)}")
            row = TableRow(location, {name: clean(cell) for name, cell in zip(header, cells, strict=True)})
            key = row[columns[0]]
            if key in lines_by_key:
                first = lines_by_key[key]
                raise ValueError(f"{location}: wanted each {columns[0]} once, got {shorten(key)} again, as in {first}")
            lines_by_key[key] = f"line {reader.line_num}"
            table.append(row)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: wanted a CSV table, got no such file") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"{path}: wanted a CSV table in UTF-8, got a file of another kind or encoding") from error
    except csv.Error as error:
        raise ValueError(f"{path}: wanted a CSV table, got one that cannot be read ({error})") from error
    if not table:
        raise ValueError(f"{path}: wanted a CSV table with at least one line below its header, got none")
    return table


def restore_cell(cell: str) -> str:
    """Return a cell as it was given to `format_table`.

    Args:
        cell: Content of the cell in the file.

    Returns:
        The content without the ``'`` that keeps a spreadsheet from running it.
    """
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
