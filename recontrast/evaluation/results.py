"""Results of an evaluation, and their tables: JSON, CSV, Markdown."""

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, field, fields
from pathlib import Path
from typing import Any

from recontrast.data.atomic import replace_file

# Field of `Row` -> its name in tables. The two AUPROs are not comparable: see `recontrast.metrics.aupro`.
METRICS = {
    "i_auroc": "I-AUROC",
    "i_ap": "I-AP",
    "i_f1": "I-F1",
    "i_accuracy": "I-ACC",
    "p_auroc": "P-AUROC",
    "p_ap": "P-AP",
    "p_f1": "P-F1",
    "aupro": "AUPRO",
    "aupro_per_image": "AUPRO per image",
}


@dataclass(frozen=True)
class Row:
    """One category, or the mean of several. A metric that cannot be formed is None; ``note`` says why.

    Attributes:
        category: its name, or "mean".
        images: how many.
        defects: images with one.
        i_auroc, i_ap, i_f1: metrics of images, in [0, 1]; F1 is the largest over all thresholds.
        i_accuracy: share of images called rightly at that threshold.
        p_auroc, p_ap, p_f1: metrics of pixels, in [0, 1].
        aupro: over the data set.
        aupro_per_image: the reference's.
        i_threshold: image score that gives ``i_f1``, chosen on these very images.
        p_threshold: map value that gives ``p_f1``.
        seconds: loading (waited for), forward, maps, metrics.
        bounds: of streamed metrics, by name: the exact one is as near, or nearer.
        note: why metrics are lacking; empty where none is.
    """

    category: str
    images: int
    defects: int
    i_auroc: float | None = None
    i_ap: float | None = None
    i_f1: float | None = None
    i_accuracy: float | None = None
    p_auroc: float | None = None
    p_ap: float | None = None
    p_f1: float | None = None
    aupro: float | None = None
    aupro_per_image: float | None = None
    i_threshold: float | None = None
    p_threshold: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class ScoredImage:
    """One test image and its score."""

    path: str
    category: str
    defect: str  # kind of defect, or "good"
    label: int  # 1 anomalous
    score: float


@dataclass(frozen=True)
class Result:
    """Rows by category, their mean, and what was decided before: metrics are in [0, 1].

    Attributes:
        rows: one for each category.
        recipe: its name.
        size: of images and maps, (height, width), pixels.
        score, blur, reduce, mask_rule: of the recipe.
        scored: each image.
        decided: what a calibration decides on these images.
        tile: pixels; images and maps then have the size of the files, and ``size`` is that of a tile.
    """

    rows: list[Row]
    recipe: str
    size: tuple[int, int]
    score: str | float
    blur: str | None
    reduce: str
    mask_rule: str
    scored: list[ScoredImage] = field(default_factory=list, repr=False)
    decided: dict[str, Any] | None = None
    tile: int | None = None

    @property
    def mean(self) -> Row:
        """The mean of each metric over the categories that have it; images and seconds are summed."""
        seconds: dict[str, float] = {}
        for row in self.rows:
            for name, value in row.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + value
        values = {name: [v for row in self.rows if (v := getattr(row, name)) is not None] for name in METRICS}
        lacking = [METRICS[name] for name, found in values.items() if 0 < len(found) < len(self.rows)]
        means: dict[str, Any] = {name: sum(v) / len(v) if v else None for name, v in values.items()}
        return Row(
            "mean",
            images=sum(row.images for row in self.rows),
            defects=sum(row.defects for row in self.rows),
            seconds=seconds,
            **means,
            note=f"not over all categories: {', '.join(lacking)}" if lacking else "",
        )

    def to_dict(self) -> dict[str, Any]:
        """All but the scores of the images as plain values that JSON can hold."""
        found = {**asdict(self), "size": list(self.size), "mean": asdict(self.mean)}
        del found["scored"]
        return found

    def to_csv(self) -> str:
        """A line for each category and, last, their mean; an absent metric is an empty cell."""
        text = io.StringIO()
        names = [f.name for f in fields(Row) if f.name not in ("seconds", "bounds")]
        times = list(self.mean.seconds)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*names, *(f"seconds_{name}" for name in times)])
        for row in (*self.rows, self.mean):
            writer.writerow([*(getattr(row, name) for name in names), *(row.seconds.get(name, "") for name in times)])
        return text.getvalue()

    def _bounds(self) -> list[tuple[str, float]]:
        """The largest bound of each streamed metric over the categories."""
        most: dict[str, float] = {}
        for row in self.rows:
            for name, bound in row.bounds.items():
                most[name] = max(bound, most.get(name, 0.0))
        return list(most.items())

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
            f"Percent. Maps of {'the size of the images, from tiles of ' if self.tile else ''}"
            f"{self.size[0]} x {self.size[1]} px, {self.reduce} of the pairs, blur {self.blur}, "
            f"score {self.score}, mask rule {self.mask_rule}."
        )
        lines += [
            f"{METRICS[name]}: from histograms, within {most:.1e} of the exact one." for name, most in self._bounds()
        ]
        lines += [f"{row.category}: {row.note}." for row in (*self.rows, self.mean) if row.note]
        return "\n".join(lines) + "\n"

    def scores_csv(self) -> str:
        """A line for each image: path, category, defect, label and score."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([f.name for f in fields(ScoredImage)])
        writer.writerows([*astuple(scored)[:-1], f"{scored.score:.9g}"] for scored in self.scored)
        return text.getvalue()

    def write(self, folder: str | Path) -> list[Path]:
        """Write ``results.json``, ``.csv`` and ``.md`` and ``scores.csv``, each whole or not at all.

        Args:
            folder: made if need be.

        Returns:
            The four paths.

        Raises:
            OSError: a file cannot be written; a former one stays.
        """
        texts = {
            "results.json": json.dumps(self.to_dict(), indent=1) + "\n",
            "results.csv": self.to_csv(),
            "results.md": self.to_markdown(),
            "scores.csv": self.scores_csv(),
        }
        paths = []
        for name, text in texts.items():
            paths.append(Path(folder) / name)
            with replace_file(paths[-1], size=len(text)) as file:
                file.write(text.encode(errors="surrogateescape"))
        return paths


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
