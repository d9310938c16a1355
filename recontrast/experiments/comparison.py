"""Comparison of our results with the paper's, as tables in JSON, CSV and Markdown."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recontrast.data.atomic import replace_files
from recontrast.data.csv_table import format_table
from recontrast.data.markdown import escape_markdown, format_row
from recontrast.data.own_files import check_replaceable
from recontrast.evaluation.results import METRICS

FILES = ("comparison.json", "comparison.csv", "comparison.md")  # of `Comparison.write`


@dataclass(frozen=True)
class Line:
    """Comparison of one metric for one category, or for the mean over categories.

    Attributes:
        entry: Name of the table's entry.
        category: Name of the category, or "mean".
        metric: Field of `recontrast.evaluation.results.Row`.
        seeds: Number of seeds for which the metric is defined.
        ours: Mean over these seeds, in [0, 1]; None if there are none.
        spread: Standard deviation over these seeds; None if there are fewer than two.
        paper: Published value in [0, 1]; None if it was not published.
    """

    entry: str
    category: str
    metric: str
    seeds: int
    ours: float | None
    spread: float | None
    paper: float | None

    @property
    def difference(self) -> float | None:
        """Our value minus the published one; None if either is missing."""
        return None if self.ours is None or self.paper is None else self.ours - self.paper


@dataclass(frozen=True)
class Comparison:
    """Comparison of one table of the paper with our runs.

    Attributes:
        name: Name of the table in `recontrast.experiments.paper_tables.TABLES`.
        title: Title of the table.
        lines: One line for each entry, category and metric.
        notes: Sentences that a reader needs to interpret the numbers.
    """

    name: str
    title: str
    lines: list[Line]
    notes: list[str]

    @property
    def metrics(self) -> list[str]:
        """Metrics that are compared, as fields of `recontrast.evaluation.results.Row`."""
        return list(dict.fromkeys(line.metric for line in self.lines))

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows of the table, in percent.

        Each metric has three columns: our mean with its standard deviation, the published value, and the difference; or
        the first alone, if no published value belongs to the table.
        """
        header, is_published = ["entry", "category"], any(line.paper is not None for line in self.lines)
        columns = 3 if is_published else 1
        for metric in self.metrics:
            header += [METRICS[metric], "paper", "diff"][:columns]
        rows: dict[tuple[str, str], dict[str, list[str]]] = {}
        for line in self.lines:
            ours = _format_percent(line.ours) + ("" if line.spread is None else f" ± {100 * line.spread:.2f}")
            cells = [ours, _format_percent(line.paper), _format_percent(line.difference, "+.2f")]
            rows.setdefault((line.entry, line.category), {})[line.metric] = cells[:columns]
        missing = ["-"] * columns  # a metric that is not published for the entry
        return header, [
            [*names, *(cell for metric in self.metrics for cell in row.get(metric, missing))]
            for names, row in rows.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON can represent."""
        lines = [{**asdict(line), "difference": line.difference} for line in self.lines]
        return {"table": self.name, "title": self.title, "lines": lines, "notes": self.notes}

    def to_csv(self) -> str:
        """Return a CSV table with one line for each entry, category and metric; missing values are empty."""
        rows = self.to_dict()["lines"]
        return format_table([list(rows[0]), *(row.values() for row in rows)]).decode(errors="surrogateescape")

    def to_markdown(self) -> str:
        """Return a Markdown table in percent, with "-" for missing values, followed by the notes."""
        header, rows = self.cells()
        align = ["---", "---", *["---:"] * (len(header) - 2)]
        escaped = [[*map(escape_markdown, row[:2]), *row[2:]] for row in rows]
        lines = [f"# {self.title}", "", *(format_row(cells) for cells in (header, align, *escaped)), ""]
        notes = map(escape_markdown, self.notes)
        return "\n".join([*lines, "Percent; ± is the standard deviation over seeds.", *notes]) + "\n"

    def write(self, folder: Path, *, overwrite: bool = False) -> list[Path]:
        """Write ``comparison.json``, ``comparison.csv`` and ``comparison.md``.

        Args:
            folder: Folder of the files, created if necessary.
            overwrite: Whether files of these names that this package did not write may be replaced.

        Returns:
            Paths of the three files.

        Raises:
            ValueError: If a file of others has one of the names.
            OSError: If a file cannot be written; existing files are then unchanged.
        """
        check_replaceable(folder, FILES, overwrite=overwrite, option="folder")
        texts = {"json": json.dumps(self.to_dict(), indent=1) + "\n", "csv": self.to_csv(), "md": self.to_markdown()}
        with replace_files(folder) as staging:
            for suffix, text in texts.items():
                (staging / f"comparison.{suffix}").write_bytes(text.encode(errors="surrogateescape"))
        return [folder / f"comparison.{suffix}" for suffix in texts]


def _format_percent(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(100 * value, form)
