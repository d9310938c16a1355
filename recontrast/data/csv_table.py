"""Tables that come with data sets: CSV with a header, read with errors that name file and line."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TableRow:
    """One line of a table, by column."""

    place: str  # file and line, as errors begin
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        """The cell of ``column``, without blanks around it."""
        return self.cells[column]


def read_table(path: Path, columns: Sequence[str]) -> list[TableRow]:
    """Read a CSV file.

    Args:
        path: the file, UTF-8 with or without byte order mark; its columns may stand in any order, and be more.
        columns: those wanted; the first one must name each thing once.

    Returns:
        Its lines, at least one; empty ones are passed over.
    """
    lines: list[TableRow] = []
    seen: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            if missing := [name for name in columns if name not in header]:
                got = ", ".join(header) or "an empty file"
                raise ValueError(f"{path}: wanted the columns {', '.join(columns)}, got {got}: {missing[0]} is missing")
            for row in reader:
                place = f"{path} line {reader.line_num}"
                if not any(map(str.strip, row)):
                    continue
                if len(row) != len(header):
                    raise ValueError(f"{place}: wanted {len(header)} cells, one for each column, got {len(row)}")
                line = TableRow(place, {name: cell.strip() for name, cell in zip(header, row, strict=True)})
                key = line[columns[0]]
                if key in seen:
                    raise ValueError(f"{place}: wanted each {columns[0]} once, got {key} of {seen[key]} again")
                seen[key] = f"line {reader.line_num}"
                lines.append(line)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: wanted a CSV table, got no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: wanted a CSV table in UTF-8, got a file of another kind ({error.reason})") from error
    except csv.Error as error:
        raise ValueError(f"{path}: wanted a CSV table, got one that cannot be read ({error})") from error
    if not lines:
        raise ValueError(f"{path}: wanted a CSV table with at least one line below its header, got none")
    return lines
