"""Extension of a detector by further good images: a fitted one gains their vectors, others make further steps."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from recontrast import checkpoint
from recontrast.architectures import ARCHITECTURES, get_architecture
from recontrast.calibration.conformal import Calibration
from recontrast.checkpoint import Checkpoint
from recontrast.data.atomic import replace_files
from recontrast.data.augment import augment_images
from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample
from recontrast.data.fingerprint import count_files, describe_images, read_fingerprints
from recontrast.data.groups import list_groups
from recontrast.data.images import normalise
from recontrast.data.locks import lock_checkpoint
from recontrast.data.near_copies import encode_sketches, read_sketches
from recontrast.data.sources import Images, SelectedImages
from recontrast.data.views import group_samples
from recontrast.float32 import convolution_precision
from recontrast.inference.calibrate import split_trained_images
from recontrast.models.network import OnePassNetwork
from recontrast.recipes import yaml_file
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import move_model, resolve_device
from recontrast.runtime.distributed import World
from recontrast.training.device_images import DeviceImages
from recontrast.training.holdout import calibrate_holdout
from recontrast.training.json_log import read_log
from recontrast.training.new_images import split_new_images
from recontrast.training.one_pass import observe, plan_memory
from recontrast.training.open_images import sketch_images
from recontrast.training.part_views import count_trained_images
from recontrast.training.rois import TrainingRois
from recontrast.training.run_files import CHECKPOINT, LOG, list_results
from recontrast.training.sampler import BatchSampler
from recontrast.training.settings import RunSettings
from recontrast.training.state import TrainingState, restore_optimisers, snapshot
from recontrast.training.trainer import RULE_PARAMETERS, Trainer

STEP_SHARE = 4  # further steps by default: one for each so many of the run


@dataclass(frozen=True)
class Extension:
    """Result of `extend`.

    Attributes:
        checkpoint: Path of the checkpoint.
        added: Number of images that were added; parts with several views, and images cut into tiles, count once.
        total: Number of images that the detector has been trained on, then and now, counted in the same way. None if
            the checkpoint is of an older version, without their fingerprints: images that it was trained on may be
            among those added.
        left_out: Images that were not used: copies, and for a fitted detector those that it was trained on already.
        lost_calibration: Whether a calibration was removed, because it belongs to the detector before.
        calibration: Calibration on held-out new images; None if none were held out.
        seconds: Duration.
        steps: Number of further steps; 0 for a detector that is fitted in one pass.
        again: Number of images that the detector was trained on already, and that were used again.
        forgotten: Number of images that the detector was trained on, and that were not given for the further steps; 0
            without fingerprints.
    """

    checkpoint: Path
    added: int
    total: int | None
    left_out: tuple[Path, ...]
    lost_calibration: bool
    calibration: Calibration | None
    seconds: float
    steps: int = 0
    again: int = 0
    forgotten: int = 0


def extend(
    path: str | Path,
    paths: Sequence[Path | Sample],
    *,
    holdout: float = 0.0,
    steps: int | None = None,
    device: str | torch.device | None = None,
    on_step: Callable[[int, int], None] | None = None,
    option: str = "good",
) -> Extension:
    """Add good images to a detector.

    The bank of PatchCore keeps its vectors and gains a share of those of the new images. The Gaussians of PaDiM become
    those of all images. The ensemble does both, and weights its members anew, for which it needs the former images as
    well. A detector that is trained by
    steps makes further ones on all given images, new ones and those that it was trained on, with the optimisers as they
    were left; its recipe then has all steps, and its schedule that of a run of so many. The file is replaced at the
    end, so that an error or Ctrl-C leaves it as it was. The stored calibration is removed: it belongs to the detector
    before.

    Warns (`recontrast.data.listing.DataWarning`) of pictures that were saved again. Such pictures stay on one side of
    the division into added and held-out images, and those of an image that the detector was trained on are added. The
    checkpoint of an older version does not tell which images the detector was trained on: all given ones are added.

    Args:
        path: Checkpoint, which is replaced. Results of an evaluation beside it are removed.
        paths: Files of good images; or samples with their groups and, where the run draws classes equally often, with
            their category. A fitted detector leaves out those that it was trained on already. One that is trained by
            steps may forget what it learnt from images that are not given.
        holdout: Share of the new images that are not added but used for a calibration, in [0, 1).
        steps: Number of further steps; None: a quarter of those of the run. Only for a detector trained by steps.
        device: Device of the computation; None takes the GPU if there is one.
        on_step: Called with the number of finished images and of all new images, or with those of steps.
        option: Option or argument that gave the images, for messages.

    Returns:
        What was added and left out.

    Raises:
        ValueError: If the architecture cannot be extended, an image cannot be read, none is new, too few are held out,
            images are held out although the checkpoint does not tell which it was trained on, or another process
            writes to the run.
        OSError: If a file cannot be read or written.
    """
    path, started = Path(path), time.perf_counter()
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout: wanted a share in [0, 1), got {holdout:g}")
    resolved = resolve_device(device)
    with lock_checkpoint(path):
        saved = checkpoint.load(path)
        _check_extendable(saved, path, steps, holdout)
        samples = group_samples([_to_sample(item) for item in paths], saved.recipe.image_views)
        _check_classes(samples, saved.recipe, option)
        given = {sample.path: sample for sample in samples}
        new, known, left_out, sketches = split_trained_images(option, list(given), saved)
        if not new:
            count = len(known) + len(left_out)
            raise ValueError(
                f"{option}: wanted good images that the detector was not trained on, got {count} that it was"
            )
        new_samples = [given[path] for path in new]
        _check_former(saved, path, len(known), option)
        training, held_out, groups = split_new_images(new_samples, sketches, saved, holdout, option)
        again, entries = [given[path] for path in known], list[dict[str, Any]]()
        with convolution_precision(saved.recipe.tf32):
            if saved.recipe.uses_steps:
                further = max(saved.recipe.steps // STEP_SHARE, 1) if steps is None else steps
                state = _train_further(saved, path, training, again, further, resolved, on_step, entries)
            else:
                state = _fit_further(saved, path, training, again, resolved, on_step)
                if not get_architecture(saved.recipe).needs_former:
                    again, left_out = [], [*known, *left_out]
            content, calibration = snapshot(state), None
            if held_out:
                images = None if saved.recipe.tile is not None else _decode(saved.recipe, held_out)
                calibration = calibrate_holdout(state, held_out, None, images, groups)
        seconds = time.perf_counter() - started
        counted = {"images": state.images["count"]} if "count" in state.images else {}
        entries = entries or [{"step": state.step, **counted, "seconds": seconds}]
        _write(path, replace(content, calibration=calibration), entries)
    trained = len(read_fingerprints(saved.images))
    is_stepped = saved.recipe.uses_steps
    return Extension(
        path, len(training), count_files(state.images), tuple(left_out), saved.calibration is not None, calibration,
        seconds, state.step - saved.step if is_stepped else 0, len(again),
        max(trained - len(again), 0) if is_stepped else 0,
    )  # fmt: skip


def _to_sample(item: Path | Sample) -> Sample:
    return item if isinstance(item, Sample) else Sample(item, None, 0, "", "train", "good")


def _check_classes(samples: Sequence[Sample], recipe: Recipe, option: str) -> None:
    """Raise ValueError if classes are drawn equally often, and the class of an image is not known."""
    unknown = [sample.path for sample in samples if not sample.category]
    if recipe.sampling == "classes" and unknown:
        raise ValueError(
            f"{option}: wanted the class of each image, since the run draws classes equally often (sampling: classes), "
            f"got {len(unknown)} whose folder or list does not name it alone (first: {unknown[0]}): give one list with "
            "the column category"
        )


def _check_extendable(saved: Checkpoint, path: Path, steps: int | None, holdout: float) -> None:
    """Raise ValueError if the network cannot be trained on further images, is no finished run, or fits no option."""
    name, recipe = saved.recipe.architecture, saved.recipe
    if not recipe.uses_steps and not get_architecture(recipe).is_extendable:
        names = ", ".join(key for key, value in ARCHITECTURES.items() if value.is_extendable)
        raise ValueError(
            f"{path}: wanted a detector that can be extended ({names}, or one trained by steps), got architecture "
            f"{name!r}: train it again with all images, in one pass"
        )
    if not recipe.uses_steps and get_architecture(recipe).needs_count and "observed" not in saved.images:
        raise ValueError(
            f"{path}: wanted a checkpoint with the number of images that it was fitted to, got one of an older "
            "version, which has to be trained again with all images"
        )
    if steps is not None and not recipe.uses_steps:
        raise ValueError(f"steps: wanted none for architecture {name!r}, which is fitted in one pass, got {steps}")
    if steps is not None and steps < 1:
        raise ValueError(f"steps: wanted at least 1, got {steps}")
    if recipe.uses_steps and saved.step < recipe.steps:
        raise ValueError(
            f"{path}: wanted a finished run, got one after {saved.step} of {recipe.steps} steps: continue it with "
            "--resume"
        )
    if not saved.rng:
        raise ValueError(f"{path}: wanted the checkpoint of a run, got a detector alone, which has no training state")
    if holdout and not read_fingerprints(saved.images):
        raise ValueError(
            f"holdout: wanted none for {path}, which is of an older version and does not tell which images it was "
            f"trained on, got {holdout:g}: run recontrast calibrate with images that it has not seen"
        )


def _check_former(saved: Checkpoint, path: Path, known: int, option: str) -> None:
    """Raise ValueError if the network needs all images of the run, and some are not given."""
    recipe, wanted = saved.recipe, len(read_fingerprints(saved.images))
    if recipe.uses_steps or not get_architecture(recipe).needs_former:
        return
    observed, count = saved.images["observed"], count_trained_images(wanted, recipe)
    if observed != count:
        raise ValueError(
            f"{path}: wanted a run that observed all its images, got one that time ended after {observed} of {count}: "
            "train it again with all images"
        )
    if known < wanted:
        raise ValueError(
            f"{option}: wanted all {wanted} images of the run with the new ones, since the weights of architecture "
            f"{recipe.architecture!r} come from a sample of all images, got {known}"
        )


def _fit_further(
    saved: Checkpoint, path: Path, files: Sequence[Sample], former: Sequence[Sample], device: torch.device,
    on_step: Callable[[int, int], None] | None,
) -> TrainingState:  # fmt: skip
    """Fit the network of a checkpoint to further images, and return the state of the extended run.

    Of the former images, it takes those that the network needs again.
    """
    recipe = saved.recipe
    images = _decode(recipe, files)
    rois = None if recipe.roi is None else TrainingRois(recipe, files, images, device)
    model = checkpoint.build(saved, path)
    channels_last = move_model(model, device, recipe.channels_last) == torch.channels_last
    model.eval()
    used: Images = images if rois is None else SelectedImages(images, rois.inside)
    augmented = augment_images(used, recipe.augment)
    count = len(augmented)
    plan_memory(model, recipe, count, device)
    if get_architecture(recipe).needs_count:
        _observe_former(cast(OnePassNetwork, model), saved, former, device, channels_last)
    batches = DeviceImages(augmented, device)
    starts = range(0, count, recipe.batch)
    for start in starts:
        stop = min(start + recipe.batch, count)
        index = np.arange(start, stop)
        inside = None if rois is None else rois[index]
        observe(model, batches[index], recipe, channels_last=channels_last, inside=inside)
        if on_step is not None:
            on_step(stop, count)
    fit = get_architecture(recipe).fit
    if fit is not None:  # never None here
        fit(model, recipe)
    description = _describe_with(saved, files, images)
    if "observed" in saved.images:
        description["observed"] = saved.images["observed"] + count
    sampler = BatchSampler(description.get("count", count), recipe.batch, drop_last=recipe.drop_last, seed=recipe.seed)
    step = saved.step + len(starts)
    return TrainingState(recipe, saved.category, device, model, [], sampler, description, step=step)


def _observe_former(
    model: OnePassNetwork, saved: Checkpoint, former: Sequence[Sample], device: torch.device, channels_last: bool
) -> None:  # fmt: skip
    """Let a network go on from its fit, and show it the former images that it needs again."""
    recipe, positions = saved.recipe, model.resume(saved.images["observed"])
    if not positions:
        return
    images = DeviceImages(augment_images(_decode(recipe, former), recipe.augment), device)
    dtype = next(model.parameters()).dtype
    for start in range(0, len(positions), recipe.batch):
        pixels = images[np.array(positions[start : start + recipe.batch])]
        batch = normalise(pixels, model.mean, model.std, dtype=dtype, channels_last=channels_last)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            model.observe_again(batch)


def _train_further(
    saved: Checkpoint, path: Path, new: Sequence[Sample], again: Sequence[Sample], steps: int, device: torch.device,
    on_step: Callable[[int, int], None] | None, entries: list[dict[str, Any]],
) -> TrainingState:  # fmt: skip
    """Make further steps on new and former images, and return the state of the extended run.

    ``entries`` receives the lines of the log.
    """
    recipe = saved.recipe.replace(steps=saved.step + steps)
    samples = [*again, *new]
    if recipe.drop_last and count_trained_images(len(samples), recipe) < recipe.batch:
        raise ValueError(
            f"good: wanted at least {recipe.batch} images for a batch, new ones or those of the run, got {len(samples)}"
        )
    started = time.perf_counter()

    def log(step: int, loss: float, rate: float, parameter: float) -> None:
        named = {RULE_PARAMETERS.get(recipe.rule, "alpha"): parameter}
        seconds = time.perf_counter() - started
        entries.append({"step": step, "loss": loss, **named, "images_per_second": rate, "seconds": seconds})
        if on_step is not None:
            on_step(step - saved.step, steps)

    model = checkpoint.build(saved, path)
    trainer = Trainer(
        RunSettings(
            recipe=recipe, category=saved.category, samples=samples, held_out=(), good=samples, copies=None,
            images=None, out=None, resume=None, on_log=log, cache_dir=None, model=model, teacher_cache=0,
            time_limit=None, world=World(), device=device,
        ),
        None,
    )  # fmt: skip
    state = trainer.state
    restore_optimisers(state, saved, f"{path}")
    state.step = trainer.saved_step = saved.step
    trainer.run_loop()
    state.images = _describe_with(saved, new, _decode(recipe, new))
    return state


def _describe_with(saved: Checkpoint, files: Sequence[Sample], images: ImageCache) -> dict[str, Any]:
    """Describe the images of a run together with new ones, with their groups."""
    description = _describe_together(saved.images, images)
    if groups := list(dict.fromkeys([*saved.images.get("groups", []), *list_groups(files)])):
        description["groups"] = groups
    return description


def _decode(recipe: Recipe, files: Sequence[Sample]) -> ImageCache:
    """Decode images as in training."""
    return ImageCache(
        files, recipe.size, recipe.crop, tile=recipe.tile, stride=recipe.stride, bits=recipe.bits,
        window=recipe.window, views=recipe.image_views,
    )  # fmt: skip


def _describe_together(before: Mapping[str, Any], images: ImageCache) -> dict[str, Any]:
    """Describe the images of both fits together, see `recontrast.data.fingerprint.describe_images`.

    Without fingerprints of the former images, the description has neither "each" nor "count".
    """
    added = describe_images(images)
    joined: dict[str, Any] = {"digest": hashlib.sha256(f"{before['digest']} {added['digest']}".encode()).hexdigest()}
    if read_fingerprints(before):  # else images of the run may be among the new ones, and would count twice
        joined |= {"count": before["count"] + added["count"], "each": before["each"] + added["each"]}
    if len(sketches := read_sketches(before)):  # else of an older version
        new = read_sketches({"sketches": sketch_images(images)})
        joined["sketches"] = encode_sketches([*sketches, *new]) if len(new) else ""
    return joined


def _write(path: Path, content: Checkpoint, entries: Sequence[Mapping[str, Any]]) -> None:
    """Replace the checkpoint; that of a run together with its log and recipe, and without results of an evaluation."""
    if path.name != CHECKPOINT:
        checkpoint.save(path, content)
        return
    log = [*read_log(path.parent / LOG), *entries] if (path.parent / LOG).is_file() else []
    with replace_files(path.parent, remove=list_results(path.parent)) as staging:
        checkpoint.save(staging / CHECKPOINT, content)
        if log:
            (staging / LOG).write_text("".join(f"{json.dumps(line)}\n" for line in log))
        if content.recipe.uses_steps and (path.parent / yaml_file.FILE_NAME).is_file():  # which names the steps
            yaml_file.write_recipe(staging / yaml_file.FILE_NAME, content.recipe)
