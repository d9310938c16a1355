"""Preparation of a training run for the command line and for `recontrast.train`: check its options, list its images."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recontrast import checkpoint
from recontrast.app.data_options import load_training_data
from recontrast.app.options import check_writable
from recontrast.app.train_job import TrainJob, count_good
from recontrast.architectures import ARCHITECTURES, get_architecture
from recontrast.data.datasets import Sample
from recontrast.data.groups import group_samples
from recontrast.data.own_files import check_replaceable
from recontrast.data.part_samples import check_part_files
from recontrast.data.roi import EACH
from recontrast.data.views import PAGES, is_pattern, list_sources
from recontrast.data.window import AUTO
from recontrast.inference.rois import RegionOfInterest, add_rois, open_rois, resolve_roi
from recontrast.models.weights import check_source
from recontrast.recipes import yaml_file
from recontrast.recipes.recipe import Recipe
from recontrast.registration import import_architecture
from recontrast.runtime.device import resolve_device
from recontrast.training.budget import plan_budget
from recontrast.training.camera_bits import fix_window
from recontrast.training.holdout import split_holdout
from recontrast.training.part_views import fix_views
from recontrast.training.run_files import LOG
from recontrast.training.shots import select_shots

HOLDOUT = 0.1  # share of the good images held out for calibration if no recipe is given
MIN_HOLDOUT = 9  # images; fewer cannot promise even one false alarm in ten images


def prepare_job(
    data: Sequence[Path] | Mapping[str, list[Sample]], recipe: str | None, changes: Mapping[str, Any], *,
    category: str | None, out: Path | None, resume: Path | None, overwrite: bool, all_good: bool = False,
    option: str = "--out", budget: float | None = None, device: str | torch.device | None = None,
    roi: RegionOfInterest | None = None,
) -> TrainJob:  # fmt: skip
    """Check the options of a run, and load its recipe and data.

    Args:
        data: Data sets, categories, folders of good images or lists; or samples by category.
        recipe: Name of a recipe, or a YAML file; ignored with ``resume``. None: "mvtec", with a tenth of the good
            images held out for calibration if they are enough (the paper's recipes hold out none).
        changes: Fields of the recipe to change.
        category: Name of one category, "all", or None for the only one.
        out: Folder of the run. None: ``runs/CATEGORY``.
        resume: Checkpoint to continue, with its recipe, category and folder.
        overwrite: Whether ``out`` may hold a checkpoint, and files of others in the way.
        all_good: Whether all images in plain folders are good, see `recontrast.data.datasets.load`.
        option: Option or argument that names ``out``, for error messages.
        budget: Seconds that the training may take, see `recontrast.training.budget.plan_budget`. Fields in ``changes``
            stay as they are; with a recipe, its architecture does. An architecture "MODULE:NAME" is imported.
        device: Device of the training, for the budget.
        roi: Region of interest of all images, or a folder with a mask for each. None: that in ``changes`` or of the
            resumed run; else the masks of the samples, if these have any, or that of the recipe.

    Returns:
        The checked run.

    Raises:
        ValueError: If an option is invalid, does not fit the others, or names something that does not exist.
    """
    done, started, folder = 0, time.perf_counter(), None
    changes = _add_architecture_settings(changes, is_new=recipe is None and resume is None)
    if resume is not None:
        stored = checkpoint.load(resume)
        base, category, out, done = stored.recipe, category or stored.category, out or resume.parent, stored.step
        if changes.get("window") == AUTO and base.window is not None:
            del changes["window"]  # the run has found it when it was started
    else:
        base = yaml_file.load_recipe(recipe or "mvtec")
    if roi is not None:
        changes["roi"], folder = resolve_roi(roi, "roi" if isinstance(roi, np.ndarray) else "--roi")
    changed = base.replace(**changes)
    groups = load_training_data(data, category, all_good, views_from=changed.views_from)
    category = category or next(iter(groups))
    changed, groups = fix_views(changed, groups)
    if changed.views_from is not None:
        groups = {name: check_part_files(samples, changed.views_from) for name, samples in groups.items()}
    groups = add_rois(_select_shots(groups, changed), folder)
    if resume is None and "roi" not in changes and any(s.roi is not None for group in groups.values() for s in group):
        changed = changed.replace(roi=EACH)
    is_default = recipe is None and resume is None and "holdout" not in changes
    copies = _group_copies(groups) if is_default or changed.holdout else list(range(count_good(groups)))
    different = len(set(copies))
    few = is_default and round(HOLDOUT * different) < MIN_HOLDOUT
    changed = changed.replace(holdout=HOLDOUT) if is_default and not few else changed
    job = TrainJob(
        changed, category, groups, out or Path("runs") / category, resume, done, few, overwrite, different,
        started=started,
    )  # fmt: skip
    job.check_target()
    if resume is None:
        check_source(changed.backbone, changed.weights)
    check_size(changed)
    open_rois(changed, [s for group in groups.values() for s in group if s.split == "train" and not s.label])
    if copies:  # without good images, training raises the error
        job = replace(job, training=len(split_holdout(copies, changed.holdout, changed.seed, copies)[0]))
    check_writable(job.out, option)
    if changed.window == AUTO:
        job = _find_window(job)
    if budget is not None:
        job = _plan_job(job, {*changes, *(["architecture"] if recipe is not None else [])}, budget, device)
    check_replaceable(job.out, [yaml_file.FILE_NAME, LOG], overwrite=overwrite, option=option)
    return job


def _add_architecture_settings(changes: Mapping[str, Any], is_new: bool) -> dict[str, Any]:
    """Return the changed fields; for a new run without a recipe those of their architecture too, which is imported."""
    architecture = changes.get("architecture")
    if not isinstance(architecture, str):
        return dict(changes)
    import_architecture(architecture)  # the user names it, here and nowhere else
    settings = ARCHITECTURES[architecture].settings if is_new and architecture in ARCHITECTURES else {}
    return {**settings, **changes}


def find_views_from(recipe: str | None, changes: Mapping[str, Any], resume: Path | None) -> str | None:
    """Return where a run finds the views of a part, before its images are listed.

    Args:
        recipe: As in `prepare_job`, as the other arguments.
        changes: Fields of the recipe to change.
        resume: Checkpoint to continue.

    Returns:
        The recipe field ``views_from``; None for single images, or for an invalid field, which `prepare_job` reports.
    """
    if "views_from" in changes:
        source = changes["views_from"]
        return source if isinstance(source, str) and (source == PAGES or is_pattern(source)) else None
    base = yaml_file.load_recipe(recipe or "mvtec") if resume is None else checkpoint.load(resume, mapped=True).recipe
    return base.views_from


def _find_window(job: TrainJob) -> TrainJob:
    """Return the run with the window of its good images."""
    good = [sample.path for sample in job.samples if sample.split == "train" and not sample.label]
    recipe = fix_window(job.recipe, list_sources(good, job.recipe.image_views))
    return replace(job, recipe=recipe, has_auto_window=True)


def _plan_job(job: TrainJob, fixed: set[str], budget: float, device: str | torch.device | None) -> TrainJob:
    """Return the run with the recipe that fits into a budget of seconds."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"--budget: wanted one process, got the {os.environ['WORLD_SIZE']} of torchrun")
    if job.resume is not None:
        raise ValueError("--budget: wanted a new run, got one to resume, whose recipe is set")
    paths = [s.path for group in job.groups.values() for s in group if s.split == "train" and s.label == 0]
    if not paths:
        return job  # training raises the error
    held_out = len(paths) - job.count_training()
    views = max(len(job.recipe.view_names), 1)
    sources = list_sources(paths[: job.count_training()], job.recipe.image_views)
    plan = plan_budget(job.recipe, fixed, sources, held_out * views, budget, resolve_device(device), job.category)
    return replace(job, recipe=plan.recipe, plan=plan, budget=budget)


def check_size(recipe: Recipe) -> None:
    """Check that the strides of the network divide the size of images or tiles, before any image is read."""
    step = get_architecture(recipe).compute_stride(recipe)
    if any(side < step or side % step for side in recipe.out):
        option = "--tile" if recipe.tile is not None else "--size" if recipe.crop is None else "crop"
        sides = recipe.out if len(set(recipe.out)) > 1 else recipe.out[:1]
        raise ValueError(
            f"{option}: wanted a multiple of {step} px of at least {step} (the network's stride), got "
            f"{' x '.join(map(str, sides))}"
        )


def _group_copies(groups: Mapping[str, Sequence[Sample]]) -> list[int]:
    """Return for each good training image the position of the first one of its group."""
    return group_samples([s for group in groups.values() for s in group if s.split == "train" and s.label == 0])


def _select_shots(groups: Mapping[str, list[Sample]], recipe: Recipe) -> dict[str, list[Sample]]:
    """Return the samples by category, with the good training images that the recipe draws."""
    selected = select_shots([sample for group in groups.values() for sample in group], recipe.shots, recipe.seed)
    return {name: [sample for sample in selected if sample.category == name] for name in groups}
