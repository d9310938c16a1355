"""Comparison of methods: train each one as an ordinary run, and measure all of them on the same images."""

import gc
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recontrast.app.compare.measure import OnProgress, measure_method
from recontrast.app.compare.methods import get_changes, select_methods
from recontrast.app.compare.peak_memory import PeakMemory
from recontrast.app.compare.record import RECORD, MethodResult, Record, describe_changes, digest_files, read_record
from recontrast.app.compare.tables import FILES
from recontrast.app.data_options import load_training_data
from recontrast.app.errors import USER_ERRORS, describe_error, is_memory_error
from recontrast.app.prepare_training import find_views_from, prepare_job
from recontrast.app.run_training import run_job
from recontrast.app.train_job import TrainJob
from recontrast.data.datasets import Sample
from recontrast.data.encoded_image import ImagePage
from recontrast.data.listing import list_images
from recontrast.data.locks import lock_folder
from recontrast.data.own_files import check_replaceable
from recontrast.data.roi import EACH
from recontrast.data.unfinished import mark_unfinished, name_mark
from recontrast.data.views import group_paths, list_sources
from recontrast.evaluation.results import FILES as TABLES
from recontrast.inference.rois import RegionOfInterest, resolve_roi
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import resolve_device
from recontrast.training.part_views import fix_views
from recontrast.training.shots import select_shots

COMMAND = "compare"  # in the name of the mark of an unfinished comparison
UNLABELLED_HOLDOUT = 0.2  # share of the good images that is held out if no labelled test images exist
MIN_HOLDOUT_SOURCE = 10  # good images; of fewer, none are held out unless the user asks for it


@dataclass
class MethodRun:
    """One method: its name, its recipe fields, and either its checked training run or why it cannot run."""

    name: str
    changes: Mapping[str, Any]
    job: TrainJob | None = None
    error: str | None = None


@dataclass
class Comparison:
    """Comparison whose options have been checked.

    Attributes:
        runs: Methods in the order of the tables.
        groups: Samples by category.
        category: Name of the category, or "all".
        out: Folder of the comparison; the run of each method is a folder in it.
        device: Device of training and inference.
        unlabelled: Images without labels.
        overwrite: Whether other runs and files of others may be replaced.
        budget: Seconds that the training of each method may take; None for no limit.
    """

    runs: list[MethodRun]
    groups: dict[str, list[Sample]]
    category: str
    out: Path
    device: torch.device
    unlabelled: list[Path]
    overwrite: bool
    budget: float | None = None


def prepare_comparison(
    data: Sequence[Path] | Mapping[str, list[Sample]], methods: Sequence[str], changes: dict[str, Any], *,
    category: str | None, out: Path | None,
    images: Sequence[Path], device: str | None, overwrite: bool, budget: float | None = None,
    roi: RegionOfInterest | None = None,
) -> Comparison:  # fmt: skip
    """Check the options of a comparison, and list its images.

    Args:
        data: Data sets, categories, folders of good images or lists; or samples by category.
        methods: Names of the methods; empty selects all.
        changes: Recipe fields that all methods share.
        category: Name of one category, "all", or None for the only one.
        out: Folder of the comparison. None: ``runs/compare-CATEGORY``.
        images: Folders or files of images without labels.
        device: PyTorch device; None for the default.
        overwrite: Whether other runs and files of others in ``out`` may be replaced.
        budget: Seconds that the training of each method may take; None for no limit.
        roi: Region of interest of all images: a mask image, a JSON file or a mask; None for whole images.

    Returns:
        The comparison. A method that cannot run with these options has an error.

    Raises:
        ValueError: If an option is invalid for all methods.
        OSError: If a folder cannot be read.
    """
    names, resolved = select_methods(methods), resolve_device(device)
    groups = load_training_data(data, category, False, views_from=find_views_from(None, changes, None))
    category = category or next(iter(groups))
    out = out or Path("runs") / f"compare-{category}"
    if roi is not None:
        changes = {**changes, "roi": resolve_roi(roi, "--roi")[0]}
    views = None
    if changes.get("views_from") is not None:
        joined, groups = fix_views(Recipe().replace(views_from=changes["views_from"]), groups)
        changes, views = {**changes, "view_names": joined.view_names}, joined.image_views
    samples = [sample for group in groups.values() for sample in group]
    if changes.get("roi") == EACH or ("roi" not in changes and any(sample.roi is not None for sample in samples)):
        raise ValueError("--roi: wanted one region of interest for all images to compare methods, got one for each")
    is_labelled = len({sample.label for sample in samples if sample.split == "test"}) > 1
    drawn = select_shots(samples, changes.get("shots"), changes.get("seed", Recipe().seed))
    good = sum(sample.split == "train" and not sample.label for sample in drawn)
    if not is_labelled and "holdout" not in changes:
        changes = {**changes, "holdout": UNLABELLED_HOLDOUT if good >= MIN_HOLDOUT_SOURCE else 0.0}
    unlabelled = group_paths(list_images(images) if images else [], views)
    runs = [_prepare_run(name, groups, changes, category, out / name.replace(":", "."), overwrite) for name in names]
    if all(run.job is None for run in runs) and len({run.error for run in runs}) == 1:
        raise ValueError(runs[0].error)
    return Comparison(runs, groups, category, out, resolved, unlabelled, overwrite, budget)


def _prepare_run(
    name: str, groups: dict[str, list[Sample]], changes: dict[str, Any], category: str, out: Path, overwrite: bool
) -> MethodRun:
    """Check the run of one method; an error concerns this method alone."""
    changes = {**get_changes(name), **changes}
    try:
        job = prepare_job(groups, None, changes, category=category, out=out, resume=None, overwrite=True)
        check_replaceable(out, [*TABLES, RECORD, "checkpoint.pt"], overwrite=overwrite)
    except USER_ERRORS as error:
        return MethodRun(name, changes, error=describe_error(error))
    return MethodRun(name, changes, job)


def complete_method(run: MethodRun, comparison: Comparison, on_progress: OnProgress) -> MethodResult:
    """Train and measure one method, or read what an earlier call has measured.

    Args:
        run: Method.
        comparison: Comparison that it belongs to.
        on_progress: Called with the activity, the items done, the number of items, and a note.

    Returns:
        Its measures, or the error that stopped it.

    Raises:
        KeyboardInterrupt: After Ctrl-C; a method that is trained by steps has a checkpoint then.
    """
    if run.job is None:
        return MethodResult(run.name, run.error)
    try:
        with lock_folder(run.job.out):
            record = _find_record(run.job, comparison)
            if not record.is_trained:
                _mark_changed(comparison)
                _train(run, run.job, record, comparison, on_progress)
            tests = [sample for sample in run.job.samples if sample.split == "test"]
            sources = list_sources(comparison.unlabelled, run.job.recipe.image_views)
            unlabelled = [Path(str(s.path if isinstance(s, ImagePage) else s)) for s in sources]
            views = [view for sample in tests for view in (sample, *sample.views)]
            measured_on = digest_files([*unlabelled, *(path for view in views for path in (view.path, view.mask))])
            # An image that could not be read then may be readable now.
            if record.result is None or record.result.image_errors or record.measured_on != measured_on:
                _mark_changed(comparison)
                record.result = measure_method(run.name, run.job, record, comparison.unlabelled, on_progress)
                record.measured_on = measured_on
                record.write(run.job.out, run.name)
            return record.result
    except Exception as error:
        if is_memory_error(error):
            return MethodResult(run.name, "out of memory: try a smaller --size or --batch")
        if not isinstance(error, USER_ERRORS):
            raise
        return MethodResult(run.name, describe_error(error))


def _find_record(job: TrainJob, comparison: Comparison) -> Record:
    """Return the record of an earlier call with the same settings, or a new one."""
    good = [sample for sample in job.samples if sample.split == "train" and not sample.label]
    recipe = {key: value for key, value in job.recipe.to_dict().items() if key != "steps" or job.recipe.uses_steps}
    settings = {
        "recipe": recipe, "category": job.category, "budget": comparison.budget, "device": str(comparison.device),
        "images": digest_files(view.path for sample in good for view in (sample, *sample.views)),
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))  # as it is read from a file
    record = read_record(job.out)
    if record is not None and record.settings == settings and (job.target.exists() or not record.is_trained):
        return record
    if job.target.exists() and not comparison.overwrite:
        other = "another run" if record is None else f"one with {describe_changes(record.settings, settings)}"
        raise ValueError(f"{job.out}: wanted a run of this comparison, got {other}: use --overwrite or another --out")
    _mark_changed(comparison)
    for name in (*TABLES, job.target.name):  # first the tables, which describe the checkpoint
        (job.out / name).unlink(missing_ok=True)
    return Record(settings)


def _mark_changed(comparison: Comparison) -> None:
    """Mark the comparison as unfinished, and remove the tables of an earlier one: they describe other runs."""
    if not os.path.lexists(comparison.out / name_mark(COMMAND)):
        mark_unfinished(comparison.out, COMMAND, [], FILES)


def _train(run: MethodRun, job: TrainJob, record: Record, comparison: Comparison, on_progress: OnProgress) -> None:
    """Train one method and write its record, also if the training is interrupted."""
    job.out.mkdir(parents=True, exist_ok=True)
    record.write(job.out, run.name)
    before, start = record.seconds, time.perf_counter()
    peak = PeakMemory(comparison.device)
    try:
        with peak:
            job = _continue_or_plan(job, run.changes, comparison)
            record.plan = job.describe_plan() or record.plan
            run_job(
                job, device=comparison.device, cache=None, teacher_cache=0, tensorboard=False,
                on_step=lambda _, done, total, note: on_progress(f"train {run.name}", done, total, note),
            )  # fmt: skip
        record.is_trained = True
    finally:
        record.seconds = before + time.perf_counter() - start
        record.memory = max(peak.bytes or 0, record.memory or 0) or None
        record.write(job.out, run.name)


def _continue_or_plan(job: TrainJob, changes: Mapping[str, Any], comparison: Comparison) -> TrainJob:
    """Return the run that continues an interrupted one, or one that fits into the time budget."""
    options: dict[str, Any] = {"category": job.category, "out": job.out}
    if job.target.exists() and job.recipe.uses_steps:
        return prepare_job(comparison.groups, None, {}, **options, resume=job.target, overwrite=False)
    if comparison.budget is None:
        return job
    return prepare_job(
        comparison.groups, None, changes, **options, resume=None, overwrite=True, budget=comparison.budget,
        device=comparison.device,
    )  # fmt: skip


def run_comparison(comparison: Comparison, on_progress: OnProgress, results: list[MethodResult]) -> None:
    """Complete all methods, one after the other.

    Args:
        comparison: Checked comparison, whose folder is locked.
        on_progress: See `complete_method`.
        results: List that receives the result of each method as soon as it is complete.
    """
    for run in comparison.runs:
        results.append(complete_method(run, comparison, on_progress))
        gc.collect()
