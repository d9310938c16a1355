"""A training run whose options have been checked, and what is said of it."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from recontrast.data.augment import count_views
from recontrast.data.datasets import Sample
from recontrast.data.groups import list_groups
from recontrast.data.roi import describe_roi
from recontrast.data.window import describe_window
from recontrast.recipes.recipe import Recipe
from recontrast.training.budget import BudgetPlan
from recontrast.training.part_views import count_trained_images, describe_views
from recontrast.training.shots import describe_shots


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
        count = count_good(self.groups)
        return (
            self.training
            if self.training is not None
            else count - round(self.recipe.holdout * (self.different or count))
        )

    def check_target(self) -> None:
        """Raise ValueError if a new run would replace a checkpoint without being asked to."""
        if self.target.exists() and self.resume is None and not self.overwrite:
            raise ValueError(
                f"{self.target} exists already: continue it with --resume {self.out}, or use --overwrite or another "
                "--out"
            )

    def describe_end(self, seconds: float, steps: int) -> str:
        """Describe the finished run and its number of steps in one sentence."""
        is_pass = not self.recipe.uses_steps
        count, views = self.count_training(), count_views(self.recipe.augment)
        kind = f"{self.recipe.noun}s"
        kind += "" if self.recipe.image_views is None else f" of {len(self.recipe.view_names)} views"
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
        count = count_good(self.groups)
        if self.recipe.holdout:
            different = self.different or count
            held_out = round(self.recipe.holdout * different)
            hint = "; --holdout 0 trains on all" if self.resume is None else ""  # a resumed run keeps its share
            kind = f"good {self.recipe.noun}s"
            if different < count:
                kind = f"different {self.recipe.noun}s ({count - different} are copies)"
                kind = f"groups of {count} good {self.recipe.noun}s" if list_groups(self.samples) else kind
            return f"{held_out} of {different} {kind} held out for calibration{hint}"
        if self.few:
            command = f"recontrast calibrate {self.target} --good DIR"
            too_few = f"{count} good {self.recipe.noun}s are too few to hold any out for calibration"
            return f"{too_few}; to calibrate, run {command}"
        return None


def count_good(groups: Mapping[str, Sequence[Sample]]) -> int:
    """Count the good training images of all categories."""
    return sum(s.split == "train" and s.label == 0 for group in groups.values() for s in group)
