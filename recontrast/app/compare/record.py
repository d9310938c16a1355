"""Record of one method: what was trained and measured, so that a second call does neither again."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from recontrast.data.atomic import replace_file
from recontrast.data.json_text import parse_json
from recontrast.data.regular_file import read_bytes

RECORD = "method.json"  # in the folder of a method


@dataclass
class MethodResult:
    """Measures of one method; None where there is nothing to measure with.

    Attributes:
        name: Name of the method.
        error: Why the method has no measures; else None.
        plan: What was chosen for a time budget; None without one.
        metrics: Metrics on labelled test images in [0, 1], by the fields of `recontrast.evaluation.results.Row`.
        images, defects: Number of labelled test images, and of those with a defect.
        decided: Decisions on labelled test images, see `recontrast.app.evaluate_job.DecisionSummary`.
        separation: AUROC between held-out good images and copies with an artificial defect, in [0, 1].
        false_alarms: False alarms on held-out good images, number of these images, and promised rate.
        agreement: Mean rank correlation with the other methods, in [-1, 1].
        train_seconds: Wall-clock time of the training, with reading images and calibration.
        train_memory: Peak memory of the training in bytes.
        image_seconds: Time of one image in the network, its map and its score.
        image_memory: Peak memory of the inference in bytes.
        file_bytes: Size of the checkpoint.
        test_scores, held_out_scores, unlabelled_scores: Scores by path of the image; None if it has none.
        image_errors: One sentence for each image that has no score.
    """

    name: str
    error: str | None = None
    plan: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    images: int = 0
    defects: int = 0
    decided: dict[str, Any] | None = None
    separation: float | None = None
    false_alarms: tuple[int, int, float] | None = None
    agreement: float | None = None
    train_seconds: float | None = None
    train_memory: int | None = None
    image_seconds: float | None = None
    image_memory: int | None = None
    file_bytes: int | None = None
    test_scores: dict[str, float | None] = field(default_factory=dict)
    held_out_scores: dict[str, float | None] = field(default_factory=dict)
    unlabelled_scores: dict[str, float | None] = field(default_factory=dict)
    image_errors: list[str] = field(default_factory=list)

    @property
    def scores(self) -> dict[str, float | None]:
        """Scores of all images that the method was not trained on, by path."""
        return {**self.held_out_scores, **self.unlabelled_scores, **self.test_scores}


@dataclass
class Record:
    """Content of `RECORD`.

    Attributes:
        settings: Recipe, category, time budget, device and training images of the method.
        seconds: Time of its training so far, in seconds.
        is_trained: Whether the training is complete.
        memory: Peak memory of the training in bytes, or None.
        plan: What was chosen for a time budget; None without one.
        measured_on: Digest of the images that ``result`` was measured on.
        result: Measures, or None.
    """

    settings: dict[str, Any]
    seconds: float = 0.0
    is_trained: bool = False
    memory: int | None = None
    plan: str | None = None
    measured_on: str = ""
    result: MethodResult | None = None

    def write(self, folder: Path, name: str) -> None:
        """Write the record of the method ``name`` to the folder of its run."""
        with replace_file(folder / RECORD) as file:
            file.write((json.dumps({"method": name, **asdict(self)}, indent=1) + "\n").encode())


def read_record(folder: Path) -> Record | None:
    """Read the record in the folder of a method; None if there is none or it is damaged."""
    try:
        values = parse_json(read_bytes(folder / RECORD))
        values = {item.name: values[item.name] for item in fields(Record)}
        if values["result"] is not None:
            values["result"] = MethodResult(**values["result"])
        record = Record(**values)
        return record if isinstance(record.settings, dict) and isinstance(record.seconds, float) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def digest_files(paths: Iterable[Path | None], labels: Mapping[str, Any] | None = None) -> str:
    """Return a digest of the paths, sizes and modification times of files, and of ``labels``."""
    digest = hashlib.blake2b(json.dumps(labels or {}, sort_keys=True).encode(), digest_size=16)
    for path in paths:
        try:
            status = None if path is None else path.stat()
        except OSError:  # reported when the image is read
            status = None
        state = () if status is None else (status.st_size, status.st_mtime_ns)
        digest.update(f"{os.fspath(path.absolute()) if path else ''}\0{state}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def describe_changes(stored: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Describe which settings differ, such as ``steps 2 instead of 3``.

    Args:
        stored: Settings of an existing run.
        settings: Settings of this call.
    """
    first, second = ({**values, **values.get("recipe", {})} for values in (stored, settings))
    names = [name for name in second if name != "recipe" and first.get(name) != second[name]]
    names += [] if "roi" in second or first.get("roi") is None else ["roi"]  # a recipe without one does not name it
    others = {"images": "other images", "roi": "another region of interest"}
    parts = [others.get(name) or f"{name} {first.get(name)} instead of {second[name]}" for name in names]
    return ", ".join(parts)
