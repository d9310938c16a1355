"""Tables of a comparison, as JSON, CSV and Markdown, and their cells on the screen and on the page."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from recontrast.app.compare.recommend import COMPARED, Recommendation, compute_mean, list_metrics
from recontrast.app.compare.record import MethodResult
from recontrast.data.csv_table import format_table
from recontrast.data.markdown import escape_markdown, format_row
from recontrast.evaluation.results import METRICS

FILES = ("compare.json", "compare.csv", "compare.md", "compare.html")
HIDDEN = ("test_scores", "held_out_scores", "unlabelled_scores", "image_errors", "error", "name")  # not in tables


@dataclass(frozen=True)
class Column:
    """Column of the tables: its heading, what it means, and its cell for each method."""

    title: str
    meaning: str
    cells: list[str]


@dataclass(frozen=True)
class Summary:
    """Everything that the tables and the page show.

    Attributes:
        category: Name of the category, or "all".
        settings: Settings that all methods share, as texts.
        results: Measures of the methods in order.
        agreement: Rank correlation by method and other method.
        pool: Number of images that ``agreement`` is computed on.
        recommendation: Recommended method; None if no method was measured.
        notes: Sentences that a reader needs to interpret the numbers.
        differing: Paths of the images of the gallery, the largest difference first.
        noun: What is counted, see `recontrast.recipes.recipe.Recipe.noun`.
    """

    category: str
    settings: Mapping[str, str]
    results: list[MethodResult]
    agreement: Mapping[str, Mapping[str, float | None]]
    pool: int
    recommendation: Recommendation | None
    notes: list[str]
    differing: list[str] = field(default_factory=list)
    noun: str = "image"

    @property
    def measured(self) -> list[MethodResult]:
        """Methods without an error."""
        return [result for result in self.results if result.error is None]

    def accuracy_columns(self) -> list[Column]:
        """Return the columns about accuracy; those without any value are left out."""
        measured, names = self.measured, list_metrics(self.results)
        shown = [name for name in COMPARED if any(name in result.metrics for result in measured)]
        columns = [
            Column(
                METRICS[name],
                _MEANINGS[name].format(noun=self.noun),
                [_percent(result.metrics.get(name)) for result in measured],
            )
            for name in shown
        ]
        if len(names) > 1:
            means = [_percent(compute_mean(result, names)) for result in measured]
            columns.append(Column("mean", "mean of the metrics before it", means))
        columns += [
            Column(
                "separation", f"AUROC between held-out good {self.noun}s and copies with an artificial defect, percent",
                [_percent(result.separation) for result in measured],
            ),
            Column(
                "false alarms",
                f"held-out good {self.noun}s called defects, by a threshold from the other half of them",
                ["-" if (f := result.false_alarms) is None else f"{f[0]} of {f[1]}" for result in measured],
            ),
            Column(
                "agreement", f"mean rank correlation with the other methods, on {self.pool} {self.noun}s",
                ["-" if result.agreement is None else f"{result.agreement:.2f}" for result in measured],
            ),
        ]  # fmt: skip
        return [column for column in columns if set(column.cells) != {"-"}]

    def cost_columns(self) -> list[Column]:
        """Return the columns about time, memory and file size."""
        measured = self.measured
        columns = [
            Column("training, s", f"wall-clock time with reading {self.noun}s and calibration",
                   [_number(result.train_seconds) for result in measured]),
            Column(f"ms per {self.noun}", f"network, map and score of one {self.noun} in memory",
                   [_number(result.image_seconds, 1000) for result in measured]),
            Column("training, MB", "peak memory of the training", [_size(r.train_memory) for r in measured]),
            Column("inference, MB", "peak memory of the inference", [_size(r.image_memory) for r in measured]),
            Column("file, MB", "size of the checkpoint", [_size(r.file_bytes) for r in measured]),
        ]  # fmt: skip
        return [column for column in columns if set(column.cells) != {"-"}]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Return the header and the rows of the whole table."""
        columns = [*self.accuracy_columns(), *self.cost_columns()]
        rows = [[r.name, *(column.cells[i] for column in columns)] for i, r in enumerate(self.measured)]
        return ["method", *(column.title for column in columns)], rows

    def to_json(self) -> str:
        """Return everything but the scores of the images as JSON."""
        methods = []
        for result in self.results:
            values = {key: value for key, value in asdict(result).items() if key not in HIDDEN}
            methods.append({"method": result.name, "error": result.error, **values})
        content: dict[str, Any] = {
            "compared": [result.name for result in self.results], "category": self.category,
            "settings": dict(self.settings),
            "recommendation": None if self.recommendation is None else asdict(self.recommendation),
            "methods": methods, "agreement": self.agreement, "agreement_images": self.pool,
            "differing_images": self.differing, "notes": self.notes,
        }  # fmt: skip
        return json.dumps(content, indent=1) + "\n"

    def to_csv(self) -> str:
        """Return a CSV table with one line for each method; metrics lie in [0, 1], and missing values are empty."""
        header = [
            "method", "error", *COMPARED, "separation", "false_alarms", "held_out", "promised_rate", "agreement",
            "train_seconds", "image_seconds", "train_memory_bytes", "image_memory_bytes", "file_bytes",
        ]  # fmt: skip
        table: list[Sequence[Any]] = [header]
        for result in self.results:
            table.append([
                result.name, result.error, *(result.metrics.get(name) for name in COMPARED), result.separation,
                *(result.false_alarms or (None, None, None)), result.agreement, result.train_seconds,
                result.image_seconds, result.train_memory, result.image_memory, result.file_bytes,
            ])  # fmt: skip
        return format_table(table).decode(errors="surrogateescape")

    def to_markdown(self) -> str:
        """Return the recommendation, a Markdown table, the meaning of its columns, and the notes."""
        header, rows = self.cells()
        align = ["---", *["---:"] * (len(header) - 1)]
        lines = [f"# Comparison of methods on {escape_markdown(self.category)}", ""]
        if self.recommendation is not None:
            lines += [f"Recommended: {escape_markdown(self.recommendation.sentence)}", ""]
        lines += [format_row(cells) for cells in (header, align, *rows)]
        columns = [*self.accuracy_columns(), *self.cost_columns()]
        lines += ["", *(f"- {column.title}: {column.meaning}" for column in columns), ""]
        lines += [f"- {name}: {escape_markdown(value)}" for name, value in self.settings.items()]
        lines += [f"- {escape_markdown(note)}" for note in self.notes]
        lines += [f"- {r.name} failed: {escape_markdown(r.error)}" for r in self.results if r.error is not None]
        return "\n".join(lines) + "\n"


_MEANINGS = {
    "i_auroc": "{noun}s: probability that a defective one scores higher than a good one, percent",
    "i_ap": "{noun}s: average precision, percent",
    "p_auroc": "pixels: probability that a defective one scores higher than a good one, percent",
    "p_ap": "pixels: average precision, percent",
    "aupro": "regions: mean overlap up to 30 % false positive pixels, percent",
}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _number(value: float | None, factor: float = 1) -> str:
    if value is None:
        return "-"
    value *= factor
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _size(value: int | None) -> str:
    return "-" if value is None else _number(value / 1e6)
