"""What `recontrast train` does: recipe, data and folder from its options, the run itself, and what it says of it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recontrast import checkpoint
from recontrast.app.options import check_writable
from recontrast.data import datasets
from recontrast.data.datasets import Sample
from recontrast.models.backbone import get_strides
from recontrast.recipes import yaml_file
from recontrast.recipes.recipe import Recipe
from recontrast.training.holdout import split_holdout
from recontrast.training.tensorboard import FOLDER, TensorBoardLogger
from recontrast.training.train import TrainResult, train

HOLDOUT = 0.1  # share of the good images that is held out where no recipe was asked for
LEAST = 9  # held out by default: with fewer, not even one false alarm in ten images can be promised
OnStep = Callable[[str, int, int, str], None]  # category, steps done, of how many, how it goes


@dataclass(frozen=True)
class TrainJob:
    """A run that may begin."""

    recipe: Recipe
    category: str
    groups: dict[str, list[Sample]]
    out: Path
    resume: Path | None
    done: int  # steps of the checkpoint that it goes on from
    few: bool = False  # images: too few to hold out the share that would be by default

    @property
    def target(self) -> Path:
        """Its checkpoint."""
        return self.out / "checkpoint.pt"

    @property
    def samples(self) -> list[Sample]:
        """Of all categories."""
        return [sample for group in self.groups.values() for sample in group]

    def describe_holdout(self) -> str | None:
        """What is held out of training, in a sentence; None: nothing, as the recipe says."""
        count = _good(self.groups)
        if self.recipe.holdout:
            kept = round(self.recipe.holdout * count)
            begun = self.resume is None  # else it is decided
            return f"{kept} of {count} good images held out for calibration" + "; --holdout 0 trains on all" * begun
        if self.few:
            later = f"recontrast calibrate {self.target} --good DIR"
            return f"{count} good images are too few to hold any out: no calibration; for one, {later}"
        return None


def prepare_job(
    data: Sequence[Path] | Mapping[str, list[Sample]], recipe: str | None, changes: Mapping[str, Any], *,
    category: str | None, out: Path | None, resume: Path | None, overwrite: bool,
) -> TrainJob:  # fmt: skip
    """Recipe, data and folder of a run.

    Args:
        data: Data sets, categories or folders of good images; or samples by category.
        recipe: name or YAML file; what ``resume`` holds takes its place. None: "mvtec", with a tenth of the good images
            held out for calibration where they are enough, which the paper's recipes do not.
        changes: fields of it.
        category: one, "all", or None for the only one.
        out: folder of the run; by default ``runs/CATEGORY``.
        resume: checkpoint to go on from, with its recipe, category and folder.
        overwrite: allow a folder with a checkpoint.

    Raises:
        ValueError: anything of this is not there or does not go together.
    """
    done = 0
    if resume is not None:
        found = checkpoint.load(resume)
        base, category, out, done = found.recipe, category or found.category, out or resume.parent, found.step
    else:
        base = yaml_file.load_recipe(recipe or "mvtec")
    chosen = base.replace(**changes)
    if isinstance(data, Mapping):
        groups, where = dict(data), "data"
    else:
        groups = datasets.load(data, None if category in (None, "all") else [category])
        where = " ".join(map(str, data))
    if category is None and len(groups) > 1:
        raise ValueError(f"{where} holds {len(groups)} categories: choose one with --category, or all of them with "
                         f"--category all ({', '.join(groups)})")  # fmt: skip
    category = category or next(iter(groups))
    few = False
    if recipe is None and resume is None and "holdout" not in changes:
        few = round(HOLDOUT * _good(groups)) < LEAST
        chosen = chosen if few else chosen.replace(holdout=HOLDOUT)
    job = TrainJob(chosen, category, groups, out or Path("runs") / category, resume, done, few)
    if job.target.exists() and resume is None and not overwrite:
        raise ValueError(
            f"{job.target} is there already: go on with --resume {job.out}, or take --overwrite or another --out"
        )
    check_size(chosen)
    if count := _good(groups):  # without any there is nothing to train on, which is said later
        split_holdout(range(count), chosen.holdout, chosen.seed)
    check_writable(job.out)
    return job


def check_size(recipe: Recipe) -> None:
    """Refuse tiles or images that the strides of the network do not divide, before anything is read."""
    step = 2 * get_strides(recipe.backbone)[-1]  # as `ReContrast.stride`
    if any(side < step or side % step for side in recipe.out):
        option = "--tile" if recipe.tile is not None else "--size" if recipe.crop is None else "crop"
        sides = recipe.out if len(set(recipe.out)) > 1 else recipe.out[:1]
        raise ValueError(
            f"{option}: wanted a multiple of {step} px of at least {step} (the network's stride), got "
            f"{' x '.join(map(str, sides))}"
        )


def run_job(
    job: TrainJob, *, device: str | torch.device | None, cache: Path | None, teacher_cache: float, tensorboard: bool,
    on_step: OnStep | None = None,
) -> TrainResult:  # fmt: skip
    """Train, and keep the log for TensorBoard where that is wanted; ``teacher_cache`` is in GiB."""
    if not 0 <= teacher_cache < float("inf"):
        raise ValueError(f"--teacher-cache: wanted GiB of at least 0, got {teacher_cache:g}")
    total, samples = job.recipe.steps, job.samples
    with ExitStack() as stack:
        board = TensorBoardLogger(job.out / FOLDER, keep=job.done) if tensorboard else None
        if board is not None:
            stack.callback(board.close)

        def log(step: int, loss: float, rate: float, alpha: float) -> None:
            if board is not None:
                board.log(step, loss, rate, alpha)
            if on_step is not None:
                on_step(job.category, step, total, f"loss {loss:.4f}, {rate:.1f} images/s")

        result = train(
            job.recipe, samples, category=job.category, out=job.out, device=device, resume=job.resume,
            cache_dir=cache, on_log=log, teacher_cache=int(teacher_cache * 2**30),
        )  # fmt: skip
        if board is not None:
            board.images(total, result.model, samples, job.recipe)
    return result


def _good(groups: Mapping[str, Sequence[Sample]]) -> int:
    """Good training images in all."""
    return sum(s.split == "train" and s.label == 0 for group in groups.values() for s in group)
