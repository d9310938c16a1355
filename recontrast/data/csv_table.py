"""CSV tables of data sets, read with errors that name the file and the line."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


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


def read_table(path: Path, columns: Sequence[str]) -> list[TableRow]:
    """Read a CSV file with a header.

    Args:
        path: File in UTF-8, with or without byte order mark.
        columns: Names of the required columns, in any order in the file; further columns are allowed. The first one
            is a key: its values must be unique.

    Returns:
        The rows, at least one; empty rows are skipped.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a CSV table in UTF-8, lacks a column or has no rows, if a row has the wrong
            number of cells, or if a key occurs twice.
    """
    table: list[TableRow] = []
    lines_by_key: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            if missing := [name for name in columns if name not in header]:
                got = ", ".join(header) or "an empty file"
                raise ValueError(f"{path}: wanted the columns {', '.join(columns)}, got {got}: {missing[0]} is missing")
            for cells in reader:
                location = f"{path} line {reader.line_num}"
                if not any(map(str.strip, cells)):
                    continue
                if len(cells) != len(header):
                    raise ValueError(f"{location}: wanted {len(header)} cells, one for each column, got {len(cells)}")
                row = TableRow(location, {name: cell.strip() for name, cell in zip(header, cells, strict=True)})
                key = row[columns[0]]
                if key in lines_by_key:
                    first = lines_by_key[key]
                    raise ValueError(f"{location}: wanted each {columns[0]} once, got {key} again, as in {first}")
                lines_by_key[key] = f"line {reader.line_num}"
                table.append(row)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: wanted a CSV table, got no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: wanted a CSV table in UTF-8, got a file of another kind ({error.reason})") from error
    except csv.Error as error:
        raise ValueError(f"{path}: wanted a CSV table, got one that cannot be read ({error})") from error
    if not table:
        raise ValueError(f"{path}: wanted a CSV table with at least one line below its header, got none")
    return table
