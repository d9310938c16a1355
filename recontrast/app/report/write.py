"""``recontrast report``: a run becomes one HTML file to look at."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recontrast.app.options import resolve_checkpoint

if TYPE_CHECKING:
    from recontrast.data.datasets import Sample

BUDGET = 7_000_000  # bytes of all pictures in the file; what else is in it takes some 100 kB
ALL = "all"
OnProgress = Callable[[str, int, int], None]  # category, images done, images of the category


@dataclass(frozen=True)
class WrittenReport:
    """What was made."""

    path: Path
    bytes: int
    images: int  # evaluated
    shown: int  # in the gallery


def write_report(
    run: Path, data: list[Path], out: Path | None = None, *, category: str | None = None, images: int = 300,
    batch: int = 16, device: str | None = None, budget: int = BUDGET, on_progress: OnProgress | None = None,
) -> WrittenReport:  # fmt: skip
    """Evaluate the detector of ``run`` once more and write what it does as one HTML file.

    Args:
        run: folder of a run, or its checkpoint.
        data: data sets or categories; none: those whose images stand in the ``scores.csv`` of the run.
        out: the file; None: ``report.html`` beside the checkpoint.
        category: one, "all", or None for what the run was trained on, where that is in ``data``, else all.
        images: in the gallery, at most.
        batch: images at once in the network.
        device: None: the GPU where there is one.
        budget: bytes of the pictures in the file, at most.
        on_progress: called with category, images done, and images of the category.

    Raises:
        ValueError: no test images, or images that are gone.
        OSError: the file cannot be written; known before the network runs.
    """
    from recontrast import checkpoint as checkpoints
    from recontrast.app.environment import describe_environment
    from recontrast.app.report import findings, thumbnails
    from recontrast.app.report.page import page
    from recontrast.data import datasets
    from recontrast.data.atomic import replace_file
    from recontrast.inference.options import InferenceOptions
    from recontrast.training import json_log

    file = resolve_checkpoint(run)
    out = out or file.parent / "report.html"
    if out.is_dir():
        raise ValueError(f"{out}: wanted a file to write the report to, got a folder")
    if images < 1:
        raise ValueError(f"report: images: wanted at least 1, got {images}")
    model, recipe, checkpoint = checkpoints.load_model(file, device)
    found = datasets.load(data or _recorded(file.parent / "scores.csv"))
    groups = _chosen(found, category, checkpoint.category)
    # The file is opened first: one that cannot be written costs no evaluation.
    with replace_file(out, size=budget) as target:
        how = InferenceOptions()
        network = how.build_network(model, recipe, recipe)  # as evaluate and predict run it: their very scores
        decides = how.valid_calibration(recipe, checkpoint.calibration)
        seen = findings.gather(network, groups, recipe, decides, batch=batch, on_progress=on_progress)
        shots = seen.shots[:images]
        pictures = thumbnails.encode(seen, shots, recipe, budget)
        lines = json_log.read_log(file.parent / "log.jsonl")
        text = page(seen, shots, pictures, recipe, checkpoint, lines, describe_environment(), str(run))
        content = text.encode(errors="backslashreplace")  # names that are no UTF-8
        target.write(content)
        total = len(seen.shots)
    return WrittenReport(out, len(content), total, len(shots))


def _chosen(found: "dict[str, list[Sample]]", category: str | None, trained_on: str) -> "dict[str, list[Sample]]":
    if category is None:
        category = trained_on if trained_on in found else ALL
    if category == ALL:
        return found
    if category not in found:
        raise ValueError(f"--category: wanted one of {', '.join(found)} or all, got {category!r}")
    return {category: found[category]}


def _recorded(scores: Path) -> list[Path]:
    """Folders of the categories whose test images ``scores.csv`` names."""
    from recontrast.data.csv_table import read_table

    if not scores.is_file():
        raise ValueError(f"{scores}: wanted the images that the run was evaluated on, got no such file: name DATA")
    folders: dict[Path, None] = {}
    for line in read_table(scores, ["path", "category"]):
        path = Path(line["path"])
        if not path.is_file():
            raise ValueError(f"{scores}: wanted the image {path} that the run was evaluated on, it is gone: name DATA")
        place = next((up for up in path.parents if up.name == line["category"] and (up / "test").is_dir()), None)
        if place is None:
            raise ValueError(f"{scores}: wanted {path} below {line['category']}/test, got it elsewhere: name DATA")
        folders[place] = None
    return list(folders)
