"""Training loop of the reference (`train` in `recontrast_mvtec.py`), for any number of steps and with resume.

Each image is decoded once and enters every epoch as the same tensor, and so do its augmented copies, which the paper
does not have. The loop itself is in `recontrast.training.trainer`, the step in `recontrast.training.step`.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from recontrast.calibration.conformal import Calibration
from recontrast.checkpoint import Checkpoint
from recontrast.data.datasets import Sample, describe
from recontrast.data.groups import group_samples
from recontrast.data.sources import Images
from recontrast.data.views import list_sources
from recontrast.float32 import convolution_precision
from recontrast.inference.options import InferenceOptions
from recontrast.models.network import Network
from recontrast.recipes.recipe import Recipe
from recontrast.runtime import distributed
from recontrast.runtime.cudnn import tuned_convolutions
from recontrast.training.camera_bits import fix_bits, fix_window
from recontrast.training.holdout import split_holdout
from recontrast.training.one_pass import OnePassTrainer
from recontrast.training.part_views import count_trained_images, fix_views
from recontrast.training.run_files import CHECKPOINT, RunFiles
from recontrast.training.settings import OnLog, RunSettings, check_options
from recontrast.training.shots import describe_shots, select_shots
from recontrast.training.step import build_model, train_step
from recontrast.training.trainer import Trainer

__all__ = ["TrainResult", "build_model", "train", "train_step"]


@dataclass(frozen=True)
class TrainResult:
    """Result of `train`.

    Attributes:
        model: Trained model, in eval mode.
        recipe: Recipe of the run.
        category: Category of the run, as given or derived from the samples.
        checkpoint: Path of the checkpoint; None if nothing was written.
        losses: Loss of each step made in this call.
        seconds: Duration of these steps, without decoding, log lines and checkpoints.
        state: Content of the final checkpoint, without optimiser and random states.
    """

    model: Network
    recipe: Recipe
    category: str
    checkpoint: Path | None
    losses: list[float]
    seconds: float
    state: Checkpoint

    @property
    def calibration(self) -> Calibration | None:
        """Calibration on the held-out images, in the first process; None in others and without held-out images."""
        return InferenceOptions().valid_calibration(self.recipe, self.state.calibration)


def train(
    recipe: Recipe,
    samples: Sequence[Sample] | Images,
    *,
    category: str | None = None,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    resume: str | Path | None = None,
    on_log: OnLog | None = None,
    cache_dir: str | Path | None = None,
    model: Network | None = None,
    teacher_cache: int = 0,
    time_limit: float | None = None,
) -> TrainResult:
    """Train a detector on the good training images in ``samples``.

    PatchCore and PaDiM are fitted in one pass over the images. An interrupted pass begins anew.

    If the recipe holds out a share of the good images, the detector is calibrated on them after the last step.

    Under torchrun all processes train one detector together, with the same result as one process with the full batch
    (see `recontrast.runtime.distributed`). Only the first process writes files.

    Args:
        recipe: Recipe of the run.
        samples: Samples of one category, or of several categories for one unified detector; test samples are ignored.
            Alternatively, decoded good images of size ``recipe.out``: an array (n, H, W, 3) uint8 or any other
            `Images`.
        category: Name of the category, for the checkpoint and for `Recipe.encoder_bn_for`. By default the categories
            of the samples joined by "+", or "images" for decoded images.
        out: Folder for ``checkpoint.pt``, ``log.jsonl`` and ``recipe.yaml``; None writes nothing. Those of an earlier
            run are replaced, all three at once, when the first checkpoint of this run is complete.
        device: Device to train on; by default the GPU if there is one, else the CPU.
        resume: Checkpoint to resume from; its recipe and training images must be the same.
        on_log: Callback that receives the step, the mean loss since the last call, the images per second and the
            parameter of the mining rule (alpha), every ``recipe.log_every`` steps and after the last step.
            Architectures that are fitted in one pass count batches as steps; their loss and parameter are NaN.
        cache_dir: Folder for decoded images; None keeps them in memory.
        model: Model to train in place; by default a new one is built.
        teacher_cache: Size of the cache of frozen features on the device, bytes; see
            `recontrast.training.teacher_cache.TeacherCache`.
        time_limit: Seconds from the call after which no further step is made, and an architecture that is fitted in
            one pass observes no further images. It then takes them in random order. A warning (RuntimeWarning) names
            how many steps were made or images observed. The checkpoint of a run that was ended early can be resumed.
            None: all steps, or all images in their order.

    Returns:
        The trained model in eval mode, the losses and the path of the checkpoint.

    Raises:
        ValueError: If there are no good training images, or too few for the batch or the calibration; if two options
            exclude each other; if the loss is not finite; if the checkpoint does not fit; or if another process writes
            to ``out``.
        OSError: If a file cannot be read or written.
        KeyboardInterrupt: After Ctrl-C, or SIGTERM in a single process, once the current step is complete and a
            checkpoint is written.
    """
    started = time.perf_counter()
    images: Images | None = None if isinstance(samples, Sequence) else samples
    if isinstance(samples, Sequence):
        recipe, joined = fix_views(recipe, {"": samples})
        samples = joined[""]
    good = select_shots(_select_good(samples), recipe.shots, recipe.seed) if isinstance(samples, Sequence) else []
    count = len(good) if images is None else len(images)
    if not count:
        raise ValueError(f"train: samples: wanted good training images, got none among {len(samples)} samples")
    category = category or "+".join(dict.fromkeys(sample.category for sample in good)) or "images"
    if images is not None:
        _check_decoded(recipe, count)
        count //= max(len(recipe.view_names), 1)  # parts
    copies = group_samples(good) if recipe.holdout else None
    training, held_out = split_holdout(good, recipe.holdout, recipe.seed, copies)
    count = count_trained_images(count - len(held_out), recipe)
    if recipe.drop_last and count < recipe.batch:
        raise ValueError(f"train: batch: wanted at most the {count} training images, got {recipe.batch}")
    with (
        distributed.join_processes(device) as (world, resolved_device),
        convolution_precision(recipe.tf32),
        tuned_convolutions(recipe.cudnn_benchmark),
    ):
        return _run(
            RunSettings(
                recipe=recipe,
                category=category,
                samples=training,
                held_out=held_out,
                good=good,
                copies=copies,
                images=images,
                out=None if out is None else Path(out),
                resume=resume,
                on_log=on_log,
                cache_dir=cache_dir,
                model=model,
                teacher_cache=teacher_cache,
                time_limit=None if time_limit is None else time_limit - (time.perf_counter() - started),
                world=world,
                device=resolved_device,
            )
        )


def _run(settings: RunSettings) -> TrainResult:
    """Train within joined processes; on return DistributedDataParallel is freed, before the process group ends."""
    check_options(settings)
    if settings.resume is None:
        samples = (*settings.samples, *settings.held_out)
        paths = list_sources([sample.path for sample in samples], settings.recipe.image_views)
        settings = replace(settings, recipe=fix_bits(fix_window(settings.recipe, paths), paths))
    out, world = settings.out, settings.world
    with ExitStack() as stack:
        files = None
        if out is not None and world.first:
            files = stack.enter_context(RunFiles(out, settings.recipe, _describe_data(settings)))
        trainer = (Trainer if settings.recipe.uses_steps else OnePassTrainer)(settings, files)
        trainer.run_loop()
        final = trainer.calibrate()
    state, path = trainer.state, None if out is None else out / CHECKPOINT
    seconds = trainer.progress.seconds
    return TrainResult(state.model.eval(), state.recipe, settings.category, path, state.losses, seconds, final)


def _describe_data(settings: RunSettings) -> str | None:
    """Describe the folders of the training images, as ``recontrast train`` prints them; None for images in memory."""
    groups: dict[str, list[Sample]] = {}
    for sample in (*settings.samples, *settings.held_out):
        groups.setdefault(sample.category, []).append(sample)
    drawn = describe_shots(settings.good, settings.recipe.shots, settings.recipe.seed)
    return "\n".join([*describe(groups), *([] if drawn is None else [drawn])]) if groups else None


def _check_decoded(recipe: Recipe, count: int) -> None:
    """Raise ValueError if a recipe needs the files of images that are decoded already."""
    for name, value, default in (
        ("holdout", recipe.holdout, 0.0), ("shots", recipe.shots, None), ("sampling", recipe.sampling, "images"),
    ):  # fmt: skip
        if value != default:
            shown = "none" if default is None else f"{default:g}" if isinstance(default, float) else repr(default)
            raise ValueError(f"train: {name}: wanted {shown} for images that are decoded already, got {value!r}")
    views = len(recipe.view_names)
    if recipe.views_from is not None and (not views or count % views):
        got = f"{count} images of {views} views" if views else "none"
        raise ValueError(f"train: view_names: wanted them, and all views of parts that are decoded already, got {got}")


def _select_good(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.split == "train" and sample.label == 0]
