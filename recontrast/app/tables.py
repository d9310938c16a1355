"""Tables on stdout."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from recontrast.app.console import make_printable, print_line

if TYPE_CHECKING:
    from recontrast.evaluation.results import Result

CELL_PADDING = 3  # columns of a terminal that a cell of a table needs besides its text


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on stdout, with the first column left-aligned and a line above the last row.

    Cells are never cut. On a terminal, a table that is too wide is printed in several parts, each with the first
    column, whose text is folded if necessary. A pipe has no width, so that a table is printed in one part.
    """
    cells = [[make_printable(cell) for cell in row] for row in [columns, *rows]]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    limit = Console().width if sys.stdout.isatty() else sum(widths) + CELL_PADDING * len(widths) + 1
    rest = limit - 1 - 2 * CELL_PADDING - max(widths[1:], default=0)
    first = widths[0] if sum(widths) + CELL_PADDING * len(widths) < limit else min(widths[0], max(limit // 3, 8), rest)
    first = max(first, 1)
    for part, selected in enumerate(_split_columns(widths, first, limit)):
        table = Table(title=None if part else Text(make_printable(title)), title_justify="left", box=box.HEAVY_HEAD)
        table.title_style = "bold"
        for index in selected:
            table.add_column(
                Text(cells[0][index]),
                justify="right" if index else "left",
                min_width=widths[index] if index else first,
                no_wrap=index > 0,
                overflow="fold",
            )
        for number, row in enumerate(cells[1:]):
            table.add_row(*(Text(row[index]) for index in selected), end_section=number == len(cells) - 3)
        total = first + sum(widths[index] for index in selected if index) + CELL_PADDING * len(selected) + 1
        Console(width=max(total, limit)).print(table)


def _split_columns(widths: Sequence[int], first: int, limit: int) -> Iterator[list[int]]:
    """Divide columns into groups that fit into ``limit`` columns of a terminal; each begins with the first column."""
    group, used = [0], 1 + first + CELL_PADDING
    for index, width in enumerate(widths[1:], 1):
        if used + width + CELL_PADDING > limit and len(group) > 1:
            yield group
            group, used = [0], 1 + first + CELL_PADDING
        group.append(index)
        used += width + CELL_PADDING
    yield group


def print_result(result: "Result", title: str = "") -> None:
    """Print the metrics of a result in percent."""
    from recontrast.evaluation.results import METRICS, format_metrics, list_extra

    rows = [*result.rows, *([result.mean] if len(result.rows) > 1 else [])]
    names = [name for name in METRICS if any(getattr(row, name) is not None for row in rows)]
    extra = list_extra(result.rows)
    cells = [[row.category, *format_metrics(row, names, extra)] for row in rows]
    print_table(title, ["category", *(METRICS[name] for name in names), *extra], cells)
    for row in rows:
        if row.note:
            print_line(f"{row.category}: {row.note}")
