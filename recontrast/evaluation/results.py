"""Results of an evaluation, and their tables in JSON, CSV and Markdown."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from recontrast.checkpoint.fields import is_finite
from recontrast.data.atomic import replace_files
from recontrast.data.csv_table import Rounded, format_table
from recontrast.data.markdown import escape_markdown, format_row
from recontrast.data.own_files import check_replaceable
from recontrast.recipes.describe import describe_value

FILES = ("results.json", "results.csv", "results.md", "scores.csv")  # of `Result.write`
# Field of `Row` -> heading in tables. The two forms of AUPRO are not comparable, see `recontrast.metrics.aupro`.
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


def describe_missing(skipped: int, total: int, noun: str = "image") -> str:
    """Describe how many test images are missing from the metrics.

    Args:
        skipped: Number of missing images.
        total: Number of all test images.
        noun: What is counted, see `recontrast.recipes.recipe.Recipe.noun`.

    Returns:
        The description, without a full stop.
    """
    return f"{skipped} of {total} test {noun}s are missing, because they could not be read or scored"


@dataclass(frozen=True)
class Row:
    """Metrics of one category, or the mean of several. Undefined metrics are None, and ``note`` gives the reason.

    Attributes:
        category: Name of the category, or "mean".
        images: Number of test images with a score, over which the metrics are computed.
        defects: Number of defective images among them.
        i_auroc, i_ap, i_f1: Image metrics in [0, 1]; F1 is the maximum over all thresholds.
        i_accuracy: Accuracy at the threshold of the maximum F1.
        p_auroc, p_ap, p_f1: Pixel metrics in [0, 1].
        aupro: Area under the per-region-overlap curve of the whole data set.
        aupro_per_image: AUPRO in the per-image form of the reference.
        i_threshold: Image score that gives ``i_f1``, chosen on these images.
        p_threshold: Map value that gives ``p_f1``.
        seconds: Time in seconds spent waiting for images (``loading``), and in ``forward``, ``maps`` and ``metrics``.
        bounds: Largest possible distance of streamed metrics from the exact values, by name.
        note: Missing images and reasons for undefined metrics; empty if there are neither.
        skipped: Number of test images that could not be read or scored, or whose mask could not be read. The metrics
            are those of the other images, and not comparable with those of the whole set.
        extra: Measures of a benchmark in [0, 1] by heading (`recontrast.evaluation.measures`).
        seg_threshold: Map value at which SegF1 was computed; None without SegF1.
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
    skipped: int = 0
    extra: dict[str, float] = field(default_factory=dict)
    seg_threshold: float | None = None


def parse_row(values: Any) -> Row:
    """Create a row from the values in results.json.

    Args:
        values: Stored values, of any type.

    Returns:
        The row.

    Raises:
        ValueError: If the values are not those of a row.
    """
    if not isinstance(values, dict) or not {"category", "images", "defects"} <= values.keys() <= _ROW_FIELDS:
        raise ValueError("wanted the fields of a row, got others")
    for name, value in values.items():
        if name in ("category", "note"):
            is_valid = isinstance(value, str)
        elif name in ("images", "defects"):
            is_valid = type(value) is int and value >= 0
        elif name in ("seconds", "bounds", "extra"):
            is_valid = isinstance(value, dict) and all(map(is_finite, value.values()))
        else:
            is_valid = value is None or is_finite(value)
        if not is_valid:
            raise ValueError(f"{name}: wanted a valid value, got {describe_value(value)}")
    return Row(**values)


_ROW_FIELDS = {f.name for f in fields(Row)}


def list_extra(rows: Sequence[Row]) -> list[str]:
    """Return the headings of the measures of benchmarks in ``rows``, in the order of their first use."""
    return list(dict.fromkeys(heading for row in rows for heading in row.extra))


def format_metrics(row: Row, names: Sequence[str], extra: Sequence[str]) -> list[str]:
    """Format metrics in percent.

    Args:
        row: Row.
        names: Names of `METRICS`.
        extra: Headings of measures of benchmarks.

    Returns:
        One cell for each, "-" if it is undefined.
    """
    values = [*(getattr(row, name) for name in names), *(row.extra.get(heading) for heading in extra)]
    return ["-" if value is None else f"{100 * value:.2f}" for value in values]


@dataclass(frozen=True)
class ScoredImage:
    """Score of one test image, or why it has none.

    Attributes:
        path: Path of the image.
        category: Name of its category.
        defect: Type of defect, or "good".
        label: 1 for a defective image, 0 for a good one.
        score: Anomaly score; NaN if the image is missing from the metrics.
        error: Why the image is missing, or why it has no map although it has a score; else None.
    """

    path: str
    category: str
    defect: str
    label: int
    score: float
    error: str | None = None


@dataclass(frozen=True)
class Result:
    """Result of an evaluation: metrics by category, and the settings that they were computed with.

    Attributes:
        rows: One row for each category, with metrics in [0, 1].
        recipe: Name of the recipe.
        size: Height and width of the maps in pixels.
        score, blur, reduce, mask_rule: Fields of the recipe.
        scored: Scores of all test images; NaN for those that are missing from the metrics.
        decided: Summary of the calibrated decisions on these images; None without a calibration.
        tile: Side of a tile in pixels, or None. With tiles, images and maps have the size of the files, and ``size`` is
            the size of a tile.
        roi: Description of the region of interest whose pixels were counted; None for whole images.
        noun: What the tables count, see `recontrast.recipes.recipe.Recipe.noun`.
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
    roi: str | None = None
    noun: str = "image"

    @property
    def mean(self) -> Row:
        """Mean of each metric over the categories for which it is defined; images and seconds are summed."""
        seconds: dict[str, float] = {}
        for row in self.rows:
            for name, value in row.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + value
        values = {name: [v for row in self.rows if (v := getattr(row, name)) is not None] for name in METRICS}
        incomplete = [METRICS[name] for name, defined in values.items() if 0 < len(defined) < len(self.rows)]
        means: dict[str, Any] = {name: sum(v) / len(v) if v else None for name, v in values.items()}
        extra = {head: [row.extra[head] for row in self.rows if head in row.extra] for head in list_extra(self.rows)}
        incomplete += [head for head, defined in extra.items() if len(defined) < len(self.rows)]
        means["extra"] = {head: sum(defined) / len(defined) for head, defined in extra.items()}
        images, skipped = (sum(getattr(row, name) for row in self.rows) for name in ("images", "skipped"))
        notes = [describe_missing(skipped, images + skipped, self.noun)] if skipped else []
        notes += [f"not over all categories: {', '.join(incomplete)}"] if incomplete else []
        return Row(
            "mean",
            images=images,
            defects=sum(row.defects for row in self.rows),
            seconds=seconds,
            **means,
            note="; ".join(notes),
            skipped=skipped,
        )

    @property
    def errors(self) -> list[str]:
        """One sentence for each test image that is missing from the metrics, or whose map could not be written."""
        return [image.error for image in self.scored if image.error is not None]

    def to_dict(self) -> dict[str, Any]:
        """Return everything except the scores of the images as values that JSON can represent."""
        values = {**asdict(self), "size": list(self.size), "mean": asdict(self.mean)}
        del values["scored"], values["noun"]
        return {**values, "skipped": self.mean.skipped, "errors": self.errors}

    def to_csv(self) -> str:
        """Return a CSV table with one line for each category and one for the mean; undefined metrics are empty.

        There is a column ``skipped`` only if images are missing, and one for each measure of a benchmark.
        """
        left_out = ["seconds", "bounds", "extra"] + ([] if self.mean.skipped else ["skipped"])
        left_out += [] if any(row.seg_threshold is not None for row in self.rows) else ["seg_threshold"]
        names = [f.name for f in fields(Row) if f.name not in left_out]
        times, extra = list(self.mean.seconds), list_extra(self.rows)
        table: list[list[Any]] = [[*names, *extra, *(f"seconds_{name}" for name in times)]]
        for row in (*self.rows, self.mean):
            values = [*(getattr(row, name) for name in names), *(row.extra.get(heading) for heading in extra)]
            table.append([*values, *(row.seconds.get(name) for name in times)])
        return format_table(table).decode(errors="surrogateescape")

    def _bounds(self) -> list[tuple[str, float]]:
        """Return the largest bound of each streamed metric over the categories."""
        largest: dict[str, float] = {}
        for row in self.rows:
            for name, bound in row.bounds.items():
                largest[name] = max(bound, largest.get(name, 0.0))
        return list(largest.items())

    def __str__(self) -> str:
        return self.to_markdown()

    def _repr_markdown_(self) -> str:
        """Return the table that notebooks display."""
        return self.to_markdown()

    def to_markdown(self) -> str:
        """Return a Markdown table in percent, with "-" for undefined metrics, followed by settings and notes."""
        names = [name for name in METRICS if any(getattr(row, name) is not None for row in self.rows)] or ["i_auroc"]
        skipped, extra = ["skipped"] if self.mean.skipped else [], list_extra(self.rows)
        head = ["category", f"{self.noun}s", *skipped, *(METRICS[name] for name in names), *extra, "seconds"]
        lines = [format_row(head), format_row(["---", *["---:"] * (len(head) - 1)])]
        for row in (*self.rows, *([self.mean] if len(self.rows) > 1 else [])):
            cells = format_metrics(row, names, extra)
            name = escape_markdown(row.category)
            counts = [str(getattr(row, column)) for column in ("images", *skipped)]
            lines.append(format_row([name, *counts, *cells, f"{sum(row.seconds.values()):.1f}"]))
        lines.append("")
        lines.append(
            f"Percent. Maps of {f'the size of the {self.noun}s, from tiles of ' if self.tile else ''}"
            f"{self.size[0]} x {self.size[1]} px, {self.reduce} of the pairs, blur {self.blur}, "
            f"score {self.score}, mask rule {self.mask_rule}."
            + ("" if self.roi is None else f" Pixels in the region of interest alone: {self.roi}.")
        )
        thresholds = [
            f"{escape_markdown(row.category)} {row.seg_threshold:.6g}"
            for row in self.rows
            if row.seg_threshold is not None
        ]
        lines += [f"SegF1 at the threshold: {', '.join(thresholds)}."] if thresholds else []
        lines += [
            f"{METRICS.get(name, name)}: from histograms, within {bound:.1e} of the exact value."
            for name, bound in self._bounds()
        ]
        lines += [
            f"{escape_markdown(row.category)}: {escape_markdown(row.note)}."
            for row in (*self.rows, self.mean)
            if row.note
        ]
        return "\n".join(lines) + "\n"

    def scores_csv(self) -> str:
        """Return a CSV table with path, category, defect, label and score of each image, and its error if any has one.

        The score of an image that is missing from the metrics is empty.
        """
        names = [f.name for f in fields(ScoredImage) if f.name != "error" or self.errors]
        table: list[list[Any]] = [names]
        for image in self.scored:
            score = None if math.isnan(image.score) else Rounded(image.score)
            table.append([score if name == "score" else getattr(image, name) for name in names])
        return format_table(table).decode(errors="surrogateescape")

    def write(self, folder: str | Path, remove: Sequence[str] = (), *, overwrite: bool = False) -> list[Path]:
        """Write ``results.json``, ``results.csv``, ``results.md`` and ``scores.csv``, all at once.

        Args:
            folder: Folder of the files, created if necessary.
            remove: Names of other files in ``folder`` to remove at the same moment.
            overwrite: Whether files of these names that this package did not write may be replaced.

        Returns:
            Paths of the four files.

        Raises:
            ValueError: If a file of others has one of the names.
            OSError: If a file cannot be written; existing files are then unchanged.
        """
        check_replaceable(Path(folder), FILES, overwrite=overwrite, option="folder")
        texts = {
            "results.json": json.dumps(self.to_dict(), indent=1) + "\n",
            "results.csv": self.to_csv(),
            "results.md": self.to_markdown(),
            "scores.csv": self.scores_csv(),
        }
        with replace_files(folder, remove=remove) as staging:
            for name, text in texts.items():
                (staging / name).write_bytes(text.encode(errors="surrogateescape"))
        return [Path(folder) / name for name in texts]
