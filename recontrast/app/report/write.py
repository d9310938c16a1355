"""Writer of the HTML report of a run (``recontrast report``)."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recontrast.app.options import resolve_checkpoint
from recontrast.data.names import escape_bytes

if TYPE_CHECKING:
    from recontrast.data.datasets import Sample
    from recontrast.inference.rois import RegionOfInterest

BUDGET = 7_000_000  # bytes of all pictures; the rest of the file takes about 100 kB
ALL = "all"
OnProgress = Callable[[str, int, int], None]  # category, images processed, images in the category


@dataclass(frozen=True)
class WrittenReport:
    """Path and size of a written report."""

    path: Path
    bytes: int
    images: int  # number of evaluated images
    shown: int  # number of images in the gallery
    errors: tuple[str, ...] = ()  # one sentence for each image that could not be read, now or again
    note: str | None = None  # why the calibration of the run is not used


def write_report(
    run: Path, data: list[Path], out: Path | None = None, *, category: str | None = None, images: int = 300,
    batch: int = 16, device: str | None = None, budget: int = BUDGET, on_progress: OnProgress | None = None,
    roi: "RegionOfInterest | None" = None,
) -> WrittenReport:  # fmt: skip
    """Evaluate the detector of ``run`` and write the results as one HTML file.

    Args:
        run: Folder of a run, or its checkpoint.
        data: Folders of data sets or categories, or lists; if empty, the categories listed in the ``scores.csv`` of the
            run.
        out: Output file; None writes ``report.html`` next to the checkpoint.
        category: Name of a category, or "all"; None selects the training category if ``data`` has it, else all.
        images: Maximum number of images in the gallery.
        batch: Batch size in images.
        device: Device for the model; None uses the GPU if one is available.
        budget: Maximum number of bytes of all pictures.
        on_progress: Called with the category, the images processed and the number of images in the category.
        roi: Another region of interest, see `recontrast.inference.rois.resolve_roi`, for which the calibration does not
            hold; or the folder with a mask for each image. None: as trained.

    Returns:
        Path, size and content of the report. An image that cannot be read has a placeholder in it.

    Raises:
        ValueError: If there are no test images, or none of them can be read.
        OSError: If the file cannot be written; raised before the evaluation.
    """
    from recontrast import checkpoint as checkpoints
    from recontrast.app.data_options import load_tests
    from recontrast.app.environment import describe_environment
    from recontrast.app.report import findings, shown_views, thumbnails
    from recontrast.app.report.page import render_page
    from recontrast.data.atomic import replace_file
    from recontrast.data.locks import lock_file
    from recontrast.data.regular_file import check_regular
    from recontrast.data.temporary import complete_commits
    from recontrast.inference.options import InferenceOptions
    from recontrast.inference.rois import add_rois, apply_roi, describe_other_roi
    from recontrast.runtime.device import resolve_device
    from recontrast.training import json_log

    file = resolve_checkpoint(run)
    out = out or file.parent / "report.html"
    if out.is_dir():
        raise ValueError(f"{out}: wanted a file to write the report to, got a folder")
    for name, value in (("images", images), ("batch", batch)):
        if value < 1:
            raise ValueError(f"report: {name}: wanted at least 1, got {value}")
    resolve_device(device)
    complete_commits(file.parent)  # checkpoint and log are then of one run
    check_regular(file, "a checkpoint file")
    folders, deleted = (data, []) if data else _read_evaluated_folders(file.parent / "scores.csv")
    categories = load_tests(lambda: checkpoints.load(file, mapped=True), folders, None, None)
    listed = {sample.path for group in categories.values() for sample in group}
    for sample in deleted:
        if sample.path not in listed:  # a defect whose mask is left is listed
            categories[sample.category].append(sample)
    if category is not None:  # checked before the model is loaded
        categories = _select_categories(categories, category, "")
    model, recipe, checkpoint = checkpoints.load_model(file, device)
    trained = recipe
    recipe, masks = apply_roi(trained, roi)
    groups = add_rois(_select_categories(categories, category, checkpoint.category), masks)
    # Open the file first: if it cannot be written, no time is spent on the evaluation.
    with lock_file(out), replace_file(out, size=budget) as target:
        options = InferenceOptions()
        network = options.build_network(model, recipe, trained)  # same scores as evaluate and predict
        calibration = options.valid_calibration(trained, checkpoint.calibration)
        mismatch = None if calibration is None else describe_other_roi(trained, recipe)
        calibration = None if mismatch is not None else calibration
        results = findings.gather(network, groups, recipe, calibration, batch=batch, on_progress=on_progress)
        shots = results.shots[:images]
        shown = [shown_views.select_views(network, shot.sample, recipe, batch) for shot in shots]
        pictures = thumbnails.encode_pictures(results, shots, recipe, budget, shown)
        lines = json_log.read_log(file.parent / "log.jsonl")
        text = render_page(results, shots, pictures, recipe, checkpoint, lines, describe_environment(), str(run))
        content = escape_bytes(text).encode()  # the page names files
        target.write(content)
        total = len(results.shots)
    errors = [*results.errors, *(picture.error for picture in pictures if picture.error is not None)]
    note = None if mismatch is None else f"{file}: {mismatch}"
    return WrittenReport(out, len(content), total, len(shots), tuple(dict.fromkeys(errors)), note)


def _select_categories(
    categories: "dict[str, list[Sample]]", category: str | None, trained_on: str
) -> "dict[str, list[Sample]]":
    if category is None:
        category = trained_on if trained_on in categories else ALL
    if category == ALL:
        return categories
    if category not in categories:
        raise ValueError(f"--category: wanted one of {', '.join(categories)} or all, got {category!r}")
    return {category: categories[category]}


def _read_evaluated_folders(scores: Path) -> "tuple[list[Path], list[Sample]]":
    """Return the folders of the categories in ``scores.csv``, and the test images in it that were deleted since."""
    from recontrast.data.csv_table import read_table
    from recontrast.data.datasets import Sample
    from recontrast.data.unfinished import check_finished

    check_finished(scores.parent, "evaluate")
    if not scores.is_file():
        raise ValueError(f"{scores}: wanted the list of evaluated images, got no such file: give DATA")
    folders: dict[Path, None] = {}
    deleted = []
    lines = read_table(scores, ["path", "category"], own=True)
    for line in lines:
        path = Path(line["path"])
        folder = next((up for up in path.parents if up.name == line["category"] and (up / "test").is_dir()), None)
        if folder is None:
            got = path if path.is_file() else "no such file"
            raise ValueError(f"{scores}: wanted an image below {line['category']}/test, got {got}: give DATA")
        folders[folder] = None
        if not os.path.lexists(path):
            label = int(line.cells.get("label") == "1")
            mask = path if label else None  # is never read, but the other images of the category may have masks
            deleted.append(Sample(path, mask, label, line["category"], "test", line.cells.get("defect") or "good"))
    if lines and len(deleted) == len(lines):
        raise ValueError(f"{scores}: wanted the evaluated image {deleted[0].path}, got no such file: give DATA")
    return list(folders), deleted
