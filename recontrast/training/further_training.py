"""Training of the network in a checkpoint on further images: by its single pass, or by further steps."""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from recontrast import checkpoint
from recontrast.architectures import get_architecture
from recontrast.checkpoint import Checkpoint
from recontrast.data.augment import augment_images
from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample
from recontrast.data.fingerprint import describe_images, read_fingerprints
from recontrast.data.groups import list_groups
from recontrast.data.images import normalise
from recontrast.data.near_copies import encode_sketches, read_sketches
from recontrast.data.sources import Images, SelectedImages
from recontrast.models.network import OnePassNetwork
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import move_model
from recontrast.runtime.distributed import World
from recontrast.training.device_images import DeviceImages
from recontrast.training.one_pass import observe, plan_memory
from recontrast.training.open_images import sketch_images
from recontrast.training.part_views import count_trained_images
from recontrast.training.rois import TrainingRois
from recontrast.training.sampler import BatchSampler
from recontrast.training.settings import RunSettings
from recontrast.training.state import TrainingState, restore_optimisers
from recontrast.training.trainer import RULE_PARAMETERS, Trainer


def fit_further(
    saved: Checkpoint, path: Path, files: Sequence[Sample], former: Sequence[Sample], device: torch.device,
    on_step: Callable[[int, int], None] | None,
) -> TrainingState:  # fmt: skip
    """Fit the network of a checkpoint to further images, in one pass.

    Args:
        saved: The checkpoint.
        path: Its path, for error messages.
        files: Further images.
        former: Images of the run, of which the network takes those that it needs again.
        device: Device of the computation.
        on_step: Called with the number of finished images and of all further images.

    Returns:
        The state of the extended run.
    """
    recipe = saved.recipe
    images = decode_images(recipe, files)
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
    images = DeviceImages(augment_images(decode_images(recipe, former), recipe.augment), device)
    dtype = next(model.parameters()).dtype
    for start in range(0, len(positions), recipe.batch):
        pixels = images[np.array(positions[start : start + recipe.batch])]
        batch = normalise(pixels, model.mean, model.std, dtype=dtype, channels_last=channels_last)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"):
            model.observe_again(batch)


def train_further(
    saved: Checkpoint, path: Path, new: Sequence[Sample], again: Sequence[Sample], steps: int, device: torch.device,
    on_step: Callable[[int, int], None] | None, entries: list[dict[str, Any]],
) -> TrainingState:  # fmt: skip
    """Make further steps on new and former images.

    Args:
        saved: The checkpoint.
        path: Its path, for error messages.
        new: Images that the run has not seen.
        again: Images of the run.
        steps: Number of further steps.
        device: Device of the computation.
        on_step: Called with the number of finished steps and of all further steps.
        entries: List that receives the lines of the log.

    Returns:
        The state of the extended run.

    Raises:
        ValueError: If the images are too few for a batch.
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
    state.images = _describe_with(saved, new, decode_images(recipe, new))
    return state


def _describe_with(saved: Checkpoint, files: Sequence[Sample], images: ImageCache) -> dict[str, Any]:
    """Describe the images of a run together with new ones, with their groups."""
    description = _describe_together(saved.images, images)
    if groups := list(dict.fromkeys([*saved.images.get("groups", []), *list_groups(files)])):
        description["groups"] = groups
    return description


def decode_images(recipe: Recipe, files: Sequence[Sample]) -> ImageCache:
    """Decode images as in training.

    Args:
        recipe: Recipe of the run.
        files: Images.

    Returns:
        The decoded images.
    """
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
