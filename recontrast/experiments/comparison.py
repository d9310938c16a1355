"""Ours beside the paper's: lines, and their tables in JSON, CSV and Markdown."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recontrast.data.atomic import replace_file
from recontrast.evaluation.results import METRICS


@dataclass(frozen=True)
class Line:
    """One metric of one category, or of their mean, in [0, 1]; None is what was not measured or not published."""

    entry: str
    category: str
    metric: str
    seeds: int  # that have it
    ours: float | None  # mean over them
    spread: float | None  # standard deviation over them, from two on
    paper: float | None

    @property
    def difference(self) -> float | None:
        """Ours less the paper's."""
        return None if self.ours is None or self.paper is None else self.ours - self.paper


@dataclass(frozen=True)
class Comparison:
    """A table of the paper, run again."""

    name: str
    title: str
    lines: list[Line]
    notes: list[str]

    @property
    def metrics(self) -> list[str]:
        """Fields of `Row` that are compared."""
        return list(dict.fromkeys(line.metric for line in self.lines))

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows, in percent: for each metric ours, with its spread, the paper's, and the difference."""
        head = ["entry", "category"]
        for metric in self.metrics:
            head += [METRICS[metric], "paper", "diff"]
        rows: dict[tuple[str, str], list[str]] = {}
        for line in self.lines:
            ours = _percent(line.ours) + ("" if line.spread is None else f" ± {100 * line.spread:.2f}")
            row = rows.setdefault((line.entry, line.category), [line.entry, line.category])
            row += [ours, _percent(line.paper), _percent(line.difference, "+.2f")]
        return head, list(rows.values())

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values that JSON can hold."""
        lines = [{**asdict(line), "difference": line.difference} for line in self.lines]
        return {"table": self.name, "title": self.title, "lines": lines, "notes": self.notes}

    def to_csv(self) -> str:
        """A line for each metric of each category; an absent value is an empty cell."""
        text = io.StringIO()
        rows = self.to_dict()["lines"]
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_markdown(self) -> str:
        """The table in percent, "-" for what is absent, and below it what it was measured with."""
        head, rows = self.cells()
        align = ["---", "---", *["---:"] * (len(head) - 2)]
        lines = [f"# {self.title}", "", *(f"| {' | '.join(cells)} |" for cells in (head, align, *rows)), ""]
        return "\n".join([*lines, "Percent; ± is the standard deviation over seeds.", *self.notes]) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """Write ``comparison.json``, ``.csv`` and ``.md`` into ``folder``, each whole or not at all."""
        return list(self._written(folder))

    def _written(self, folder: Path) -> Iterator[Path]:
        texts = {"json": json.dumps(self.to_dict(), indent=1) + "\n", "csv": self.to_csv(), "md": self.to_markdown()}
        for suffix, text in texts.items():
            path = folder / f"comparison.{suffix}"
            with replace_file(path, size=len(text.encode())) as file:
                file.write(text.encode())
            yield path


def _percent(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(100 * value, form)
