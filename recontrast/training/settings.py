"""Settings of a training run, resolved from the arguments of `recontrast.training.train.train`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from recontrast.data.datasets import Sample
from recontrast.data.sources import Images
from recontrast.models.network import Network
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.distributed import World

OnLog = Callable[[int, float, float, float], None]  # step, loss, images per second, parameter of the mining rule


@dataclass(frozen=True)
class RunSettings:
    """Resolved and checked arguments of one call of `train`.

    Attributes:
        recipe: Recipe of the run.
        category: Name of the category, for the checkpoint and for `Recipe.encoder_bn_for`.
        samples: Good images to train on; empty if ``images`` is given.
        held_out: Good images held out for the calibration.
        good: Images of ``samples`` and ``held_out``, in the order of the data set.
        copies: For each image of ``good`` the position of the first one of its group, see
            `recontrast.data.groups.group_samples`; None if no images are held out.
        images: Decoded images to train on; None decodes ``samples``.
        out: Output folder; None writes nothing.
        resume: Path of the checkpoint to resume from, or None.
        on_log: Callback for log lines, or None.
        cache_dir: Folder for decoded images; None keeps them in memory.
        model: Model to train in place; None builds one.
        teacher_cache: Size of the cache of frozen features on the device, bytes.
        time_limit: Seconds after which the training ends, see `recontrast.training.train.train`.
        world: Rank of this process and number of processes.
        device: Device of this process.
    """

    recipe: Recipe
    category: str
    samples: Sequence[Sample]
    held_out: Sequence[Sample]
    good: Sequence[Sample]
    copies: Sequence[int] | None
    images: Images | None
    out: Path | None
    resume: str | Path | None
    on_log: OnLog | None
    cache_dir: str | Path | None
    model: Network | None
    teacher_cache: int
    time_limit: float | None
    world: World
    device: torch.device


def check_options(settings: RunSettings) -> None:
    """Check that no two options exclude each other.

    Args:
        settings: Settings of the run.

    Raises:
        ValueError: If an architecture that is fitted in one pass has several processes, or a compiled or graphed step
            is requested with several processes.
    """
    recipe, processes = settings.recipe, settings.world.size
    if processes > 1 and not recipe.uses_steps:
        raise ValueError(
            f"train: wanted one process for architecture {recipe.architecture!r}, which is fitted in one pass, got the "
            f"{processes} of torchrun"
        )
    for name, is_set in (("compile", recipe.compile), ("graph", recipe.graph)):
        if is_set and processes > 1:
            raise ValueError(f"train: {name}: wanted false for the {processes} processes of torchrun, got true")
