"""Training for the command line and for `recontrast.train`: check the options, then run."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recontrast import checkpoint
from recontrast.app.console import is_silent
from recontrast.app.data_options import load_training_data
from recontrast.app.options import check_writable
from recontrast.architectures import ARCHITECTURES, get_architecture
from recontrast.data.augment import count_views
from recontrast.data.datasets import Sample
from recontrast.data.groups import group_samples, list_groups
from recontrast.data.locks import lock_folder
from recontrast.data.own_files import check_replaceable
from recontrast.data.roi import EACH, describe_roi
from recontrast.data.views import PAGES, is_pattern, list_sources
from recontrast.data.window import AUTO, describe_window
from recontrast.inference.rois import RegionOfInterest, add_rois, open_rois, resolve_roi
from recontrast.models.weights import check_source
from recontrast.recipes import yaml_file
from recontrast.recipes.recipe import Recipe
from recontrast.registration import import_architecture
from recontrast.runtime.device import resolve_device
from recontrast.training.budget import BudgetPlan, plan_budget
from recontrast.training.camera_bits import fix_window
from recontrast.training.holdout import split_holdout
from recontrast.training.part_views import check_files, count_trained_images, describe_views, fix_views
from recontrast.training.run_files import LOG
from recontrast.training.shots import describe_shots, select_shots
from recontrast.training.tensorboard import FOLDER, TensorBoardLogger, import_writer, list_own_events
from recontrast.training.train import TrainResult, train

HOLDOUT = 0.1  # share of the good images held out for calibration if no recipe is given
MIN_HOLDOUT = 9  # images; fewer cannot promise even one false alarm in ten images
OnStep = Callable[[str, int, int, str], None]  # category, finished steps, all steps, text with loss and speed


@dataclass(frozen=True)
class TrainJob:
    """Training run whose options have been checked.

    Attributes:
        recipe: Recipe of the run.
        category: Name of the category, or "all".
        groups: Samples by category.
        out: Folder of the run.
        resume: Checkpoint to continue, or None.
        done: Number of finished steps in the resumed checkpoint.
        few: Whether there are too few images to hold out the default share.
        budget: Seconds that the training may take; None for no limit.
        plan: What was chosen for the budget, and why.
        started: Value of `time.perf_counter` when the options of the run were given.
        different: Number of good training images, without copies if some are held out; 0 counts all. Images of one
            group count once.
        training: Number of good images that are not held out; None: by the share.
        has_auto_window: Whether the window was found from the good images.
        overwrite: Whether the checkpoint of an earlier run may be replaced.
    """

    recipe: Recipe
    category: str
    groups: dict[str, list[Sample]]
    out: Path
    resume: Path | None
    done: int
    few: bool = False
    overwrite: bool = False
    different: int = 0
    training: int | None = None
    has_auto_window: bool = False
    budget: float | None = None
    plan: BudgetPlan | None = None
    started: float = field(default_factory=time.perf_counter)

    @property
    def target(self) -> Path:
        """Path of the checkpoint."""
        return self.out / "checkpoint.pt"

    @property
    def samples(self) -> list[Sample]:
        """Samples of all categories."""
        return [sample for group in self.groups.values() for sample in group]

    @property
    def steps(self) -> int:
        """Number of steps; of batches, if the architecture is fitted in one pass over whole images."""
        if self.recipe.uses_steps:
            return self.recipe.steps
        return max(math.ceil(count_trained_images(self.count_training(), self.recipe) / self.recipe.batch), 1)

    def count_training(self) -> int:
        """Count the good images that are not held out."""
        count = _count_good(self.groups)
        return (
            self.training
            if self.training is not None
            else count - round(self.recipe.holdout * (self.different or count))
        )

    def describe_end(self, seconds: float, steps: int) -> str:
        """Describe the finished run and its number of steps in one sentence."""
        is_pass = not self.recipe.uses_steps
        count, views = self.count_training(), count_views(self.recipe.augment)
        kind = "images" if self.recipe.image_views is None else f"parts of {len(self.recipe.view_names)} views"
        images = f"{count} {kind}" if views == 1 else f"{count} {kind} in {views} augmented copies each"
        work = f"one pass over {images}" if is_pass else f"{steps} steps"
        return f"{work} in {seconds:.1f} s: {self.target}"

    def describe_elapsed(self, seconds: float) -> str:
        """Return how much of the budget is spent, to follow a text; empty without a budget."""
        return "" if self.budget is None else f" ({seconds:.0f} of {self.budget:g} s)"

    def describe_plan(self) -> str | None:
        """Describe what was chosen for the time budget; None without a budget."""
        if self.plan is None or self.budget is None:
            return None
        return f"for {self.budget:g} s: {self.plan.description}; expected: {self.plan.seconds:.0f} s"

    def compute_time_limit(self) -> float | None:
        """Return the seconds in which training must have seen its last image; None without a budget."""
        if self.plan is None or self.budget is None:
            return None
        return self.plan.compute_time_limit(self.budget - (time.perf_counter() - self.started))

    def describe(self) -> list[str | None]:
        """Describe the run in sentences for the screen; None for those that do not apply."""
        notes = (
            describe_views(self.recipe),
            self.describe_roi(),
            self.describe_window(),
            self.describe_shots(),
            self.describe_holdout(),
        )
        return [*notes, self.describe_plan()]

    def describe_roi(self) -> str | None:
        """Describe the region of interest; None if whole images are looked at."""
        return None if self.recipe.roi is None else f"region of interest: {describe_roi(self.recipe.roi)}"

    def describe_window(self) -> str | None:
        """Describe the window of the samples, and what is lost; None if images are scaled to 8 bits."""
        if self.recipe.window is None:
            return None
        source = " (percentiles 0.1 and 99.9 of the good images)" if self.has_auto_window else ""
        return f"window: {describe_window(self.recipe.window)}{source}, values outside are clipped"

    def describe_shots(self) -> str | None:
        """Describe which good images were drawn; None if the recipe uses all."""
        return describe_shots(self.samples, self.recipe.shots, self.recipe.seed)

    def describe_holdout(self) -> str | None:
        """Describe the images held out for calibration; None if the recipe holds out none."""
        count = _count_good(self.groups)
        if self.recipe.holdout:
            different = self.different or count
            held_out = round(self.recipe.holdout * different)
            hint = "; --holdout 0 trains on all" if self.resume is None else ""  # a resumed run keeps its share
            kind = "good images" if different == count else f"different images ({count - different} are copies)"
            if different < count and list_groups(self.samples):
                kind = f"groups of {count} good images"
            return f"{held_out} of {different} {kind} held out for calibration{hint}"
        if self.few:
            command = f"recontrast calibrate {self.target} --good DIR"
            return f"{count} good images are too few to hold any out for calibration; to calibrate, run {command}"
        return None


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
    done, started, changes = 0, time.perf_counter(), dict(changes)
    if isinstance(architecture := changes.get("architecture"), str):
        import_architecture(architecture)  # the user names it, here and nowhere else
        if recipe is None and resume is None and architecture in ARCHITECTURES:
            changes = {**ARCHITECTURES[architecture].settings, **changes}
    if resume is not None:
        stored = checkpoint.load(resume)
        base, category, out, done = stored.recipe, category or stored.category, out or resume.parent, stored.step
        if changes.get("window") == AUTO and base.window is not None:
            del changes["window"]  # the run has found it when it was started
    else:
        base = yaml_file.load_recipe(recipe or "mvtec")
    folder = None
    if roi is not None:
        changes["roi"], folder = resolve_roi(roi, "roi" if isinstance(roi, np.ndarray) else "--roi")
    changed = base.replace(**changes)
    groups = load_training_data(data, category, all_good, views_from=changed.views_from)
    category = category or next(iter(groups))
    changed, groups = fix_views(changed, groups)
    if changed.views_from is not None:
        check_files(groups)
    groups = add_rois(_select_shots(groups, changed), folder)
    if resume is None and "roi" not in changes and any(s.roi is not None for group in groups.values() for s in group):
        changed = changed.replace(roi=EACH)
    few = False
    is_default = recipe is None and resume is None and "holdout" not in changes
    copies = _group_copies(groups) if is_default or changed.holdout else list(range(_count_good(groups)))
    different = len(set(copies))
    if is_default:
        few = round(HOLDOUT * different) < MIN_HOLDOUT
        changed = changed if few else changed.replace(holdout=HOLDOUT)
    job = TrainJob(
        changed, category, groups, out or Path("runs") / category, resume, done, few, overwrite, different,
        started=started,
    )  # fmt: skip
    _check_target(job)
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


def check_run_options(
    *, device: str | torch.device | None, cache: Path | None, teacher_cache: float, tensorboard: bool
) -> None:
    """Check the options of `run_job`, before any image is listed.

    Args:
        device: PyTorch device; None for the default.
        cache: Folder for decoded images, or None.
        teacher_cache: Size of the cache of frozen features in GiB.
        tensorboard: Whether a TensorBoard log is written.

    Raises:
        ValueError: If this machine does not have the device, the folder cannot be written, or the size is negative.
        ImportError: If the package tensorboard is needed and not installed.
    """
    resolve_device(device)
    if cache is not None:
        check_writable(cache, "--cache")
    if not 0 <= teacher_cache < float("inf"):
        raise ValueError(f"--teacher-cache: wanted GiB of at least 0, got {teacher_cache:g}")
    if tensorboard:
        import_writer()


def run_job(
    job: TrainJob, *, device: str | torch.device | None, cache: Path | None, teacher_cache: float, tensorboard: bool,
    on_step: OnStep | None = None,
) -> TrainResult:  # fmt: skip
    """Train, optionally with a TensorBoard log; ``teacher_cache`` is in GiB."""
    limit = job.compute_time_limit()
    check_run_options(device=device, cache=cache, teacher_cache=teacher_cache, tensorboard=tensorboard)
    total, samples = job.steps, job.samples
    with ExitStack() as stack:
        if not is_silent():
            stack.enter_context(lock_folder(job.out))
            _check_target(job)  # again: another process may have finished a run in the meantime
        replaced = list_own_events(job.out / FOLDER) if tensorboard and job.resume is None else []
        board = TensorBoardLogger(job.out / FOLDER, keep=job.done) if tensorboard else None
        if board is not None:
            stack.callback(board.close)

        def log(step: int, loss: float, rate: float, alpha: float) -> None:
            if board is not None:
                board.log(step, loss, rate, alpha)
            if on_step is not None:
                loss_text = "" if math.isnan(loss) else f"loss {loss:.4f}, "
                on_step(job.category, step, max(step, total), f"{loss_text}{rate:.1f} images/s")

        result = train(
            job.recipe, samples, category=job.category, out=job.out, device=device, resume=job.resume,
            cache_dir=cache, on_log=log, teacher_cache=int(teacher_cache * 2**30),
            time_limit=limit,
        )  # fmt: skip
        if board is not None:
            board.images(total, result.model, samples, result.recipe)
        for path in replaced:  # of the earlier run
            path.unlink(missing_ok=True)
    return result


def _check_target(job: TrainJob) -> None:
    """Raise ValueError if a new run would replace a checkpoint without being asked to."""
    if job.target.exists() and job.resume is None and not job.overwrite:
        raise ValueError(
            f"{job.target} exists already: continue it with --resume {job.out}, or use --overwrite or another --out"
        )


def _group_copies(groups: Mapping[str, Sequence[Sample]]) -> list[int]:
    """Return for each good training image the position of the first one of its group."""
    return group_samples([s for group in groups.values() for s in group if s.split == "train" and s.label == 0])


def _select_shots(groups: Mapping[str, list[Sample]], recipe: Recipe) -> dict[str, list[Sample]]:
    """Return the samples by category, with the good training images that the recipe draws."""
    selected = select_shots([sample for group in groups.values() for sample in group], recipe.shots, recipe.seed)
    return {name: [sample for sample in selected if sample.category == name] for name in groups}


def _count_good(groups: Mapping[str, Sequence[Sample]]) -> int:
    """Count the good training images of all categories."""
    return sum(s.split == "train" and s.label == 0 for group in groups.values() for s in group)
