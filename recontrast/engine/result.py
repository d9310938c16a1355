"""Results of an evaluation, and their tables: JSON, CSV, Markdown."""

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from recontrast.data.atomic import replacing

# Field of `Row` -> its name in tables. The two AUPROs are not comparable: see `recontrast.metrics.aupro`.
METRICS = {
    "i_auroc": "I-AUROC",
    "i_ap": "I-AP",
    "i_f1": "I-F1",
    "p_auroc": "P-AUROC",
    "p_ap": "P-AP",
    "p_f1": "P-F1",
    "aupro": "AUPRO",
    "aupro_per_image": "AUPRO per image",
}


@dataclass(frozen=True)
class Row:
    """One category, or the mean of several. A metric that cannot be formed is None; ``note`` says why."""

    category: str
    images: int
    defects: int  # images with one
    i_auroc: float | None = None
    i_ap: float | None = None
    i_f1: float | None = None  # largest over all thresholds
    p_auroc: float | None = None
    p_ap: float | None = None
    p_f1: float | None = None
    aupro: float | None = None  # over the data set
    aupro_per_image: float | None = None  # the reference's
    i_threshold: float | None = None  # image score that gives i_f1, chosen on these very images
    p_threshold: float | None = None  # map value that gives p_f1
    seconds: dict[str, float] = field(default_factory=dict)  # loading (waited for), forward, maps, metrics
    note: str = ""


@dataclass(frozen=True)
class Result:
    """Rows by category, their mean, and what was decided before: metrics are in [0, 1]."""

    rows: list[Row]
    recipe: str
    size: tuple[int, int]  # of images and maps, (height, width)
    score: str | float
    blur: str | None
    reduce: str
    mask_rule: str

    @property
    def mean(self) -> Row:
        """Mean of each metric over the categories that have it; images and seconds are summed."""
        seconds: dict[str, float] = {}
        for row in self.rows:
            for name, value in row.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + value
        values = {name: [v for row in self.rows if (v := getattr(row, name)) is not None] for name in METRICS}
        lacking = [METRICS[name] for name, found in values.items() if 0 < len(found) < len(self.rows)]
        return Row(
            "mean",
            images=sum(row.images for row in self.rows),
            defects=sum(row.defects for row in self.rows),
            **{name: sum(found) / len(found) if found else None for name, found in values.items()},
            seconds=seconds,
            note=f"not over all categories: {', '.join(lacking)}" if lacking else "",
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values that JSON can hold."""
        return {**asdict(self), "size": list(self.size), "mean": asdict(self.mean)}

    def to_csv(self) -> str:
        """A line for each category and, last, their mean; an absent metric is an empty cell."""
        text = io.StringIO()
        names = [f.name for f in fields(Row) if f.name != "seconds"]
        times = list(self.mean.seconds)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*names, *(f"seconds_{name}" for name in times)])
        for row in (*self.rows, self.mean):
            writer.writerow([*(getattr(row, name) for name in names), *(row.seconds.get(name, "") for name in times)])
        return text.getvalue()

    def to_markdown(self) -> str:
        """A table in percent, "-" for an absent metric, and below it what it was measured with."""
        names = [name for name in METRICS if any(getattr(row, name) is not None for row in self.rows)] or ["i_auroc"]
        head = ["category", "images", *(METRICS[name] for name in names), "seconds"]
        lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
        for row in (*self.rows, *([self.mean] if len(self.rows) > 1 else [])):
            cells = ("-" if (value := getattr(row, name)) is None else f"{100 * value:.2f}" for name in names)
            lines.append(_line([row.category, str(row.images), *cells, f"{sum(row.seconds.values()):.1f}"]))
        lines.append("")
        lines.append(
            f"Percent. Maps of {self.size[0]} x {self.size[1]} px, {self.reduce} of the pairs, blur {self.blur}, "
            f"score {self.score}, mask rule {self.mask_rule}."
        )
        lines += [f"{row.category}: {row.note}." for row in (*self.rows, self.mean) if row.note]
        return "\n".join(lines) + "\n"

    def write(self, folder: str | Path) -> list[Path]:
        """Write ``results.json``, ``results.csv`` and ``results.md`` into ``folder``, each whole or not at all."""
        texts = {"json": json.dumps(self.to_dict(), indent=1) + "\n", "csv": self.to_csv(), "md": self.to_markdown()}
        paths = []
        for suffix, text in texts.items():
            paths.append(Path(folder) / f"results.{suffix}")
            with replacing(paths[-1], wanted=len(text.encode())) as file:
                file.write(text.encode())
        return paths


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
