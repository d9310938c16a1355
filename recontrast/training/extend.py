"""Extension of a fitted detector: further good images are added without fitting it anew."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from recontrast.data.fingerprint import describe_images
from recontrast.data.groups import list_groups
from recontrast.data.locks import lock_checkpoint
from recontrast.data.near_copies import encode_sketches, read_sketches
from recontrast.data.sources import Images, SelectedImages
from recontrast.data.views import group_samples
from recontrast.float32 import convolution_precision
from recontrast.inference.calibrate import split_trained_images
from recontrast.recipes.recipe import Recipe
from recontrast.runtime.device import move_model, resolve_device
from recontrast.training.device_images import DeviceImages
from recontrast.training.holdout import calibrate_holdout
from recontrast.training.json_log import read_log
from recontrast.training.new_images import split_new_images
from recontrast.training.one_pass import observe, plan_memory
from recontrast.training.open_images import sketch_images
from recontrast.training.rois import TrainingRois
from recontrast.training.run_files import CHECKPOINT, LOG, list_results
from recontrast.training.sampler import BatchSampler
from recontrast.training.state import TrainingState, snapshot


@dataclass(frozen=True)
class Extension:
    """Result of `extend`.

    Attributes:
        checkpoint: Path of the checkpoint.
        added: Number of images that were added.
        total: Number of images that the detector has been fitted to.
        left_out: Images that the detector was trained on already, and copies of new images.
        lost_calibration: Whether a calibration was removed, because it belongs to the detector before.
        calibration: Calibration on held-out new images; None if none were held out.
        seconds: Duration.
    """

    checkpoint: Path
    added: int
    total: int
    left_out: tuple[Path, ...]
    lost_calibration: bool
    calibration: Calibration | None
    seconds: float


def extend(
    path: str | Path,
    paths: Sequence[Path | Sample],
    *,
    holdout: float = 0.0,
    device: str | torch.device | None = None,
    on_step: Callable[[int, int], None] | None = None,
    option: str = "good",
) -> Extension:
    """Add good images to a detector that was fitted in one pass, such as PatchCore.

    The bank keeps its vectors and gains a share of those of the new images. The file is replaced at the end, so that an
    error or Ctrl-C leaves it as it was. The stored calibration is removed: it belongs to the detector before.

    Warns (`recontrast.data.listing.DataWarning`) of pictures that were saved again. Such pictures stay on one side of
    the division into added and held-out images, and those of an image that the detector was trained on are added.

    Args:
        path: Checkpoint, which is replaced. Results of an evaluation beside it are removed.
        paths: Files of good images, or samples with their groups. Those that the detector was trained on already are
            left out.
        holdout: Share of the new images that are not added but used for a calibration, in [0, 1).
        device: Device of the computation; None takes the GPU if there is one.
        on_step: Called with the number of finished images and of all new images.
        option: Option or argument that gave the images, for messages.

    Returns:
        What was added and left out.

    Raises:
        ValueError: If the architecture cannot be extended, an image cannot be read, none is new, too few are held out,
            or another process writes to the run.
        OSError: If a file cannot be read or written.
    """
    path, started = Path(path), time.perf_counter()
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout: wanted a share in [0, 1), got {holdout:g}")
    resolved = resolve_device(device)
    with lock_checkpoint(path):
        saved = checkpoint.load(path)
        _check_extendable(saved, path)
        samples = group_samples([_to_sample(item, saved.category) for item in paths], saved.recipe.image_views)
        given = {sample.path: sample for sample in samples}
        new, left_out, sketches = split_trained_images(option, list(given), saved)
        if not new:
            raise ValueError(
                f"{option}: wanted good images that the detector was not trained on, got {len(left_out)} that it was"
            )
        new_samples = [given[path] for path in new]
        training, held_out, groups = split_new_images(new_samples, sketches, saved, holdout, option)
        with convolution_precision(saved.recipe.tf32):
            state = _fit_further(saved, path, training, resolved, on_step)
            content, calibration = snapshot(state), None
            if held_out:
                images = None if saved.recipe.tile is not None else _decode(saved.recipe, held_out)
                calibration = calibrate_holdout(state, held_out, None, images, groups)
        seconds = time.perf_counter() - started
        entry = {"step": state.step, "images": state.images["count"], "seconds": seconds}
        _write(path, replace(content, calibration=calibration), entry)
    return Extension(
        path, len(training), state.images["count"], tuple(left_out), saved.calibration is not None, calibration, seconds
    )


def _to_sample(item: Path | Sample, category: str) -> Sample:
    return item if isinstance(item, Sample) else Sample(item, None, 0, category, "train", "good")


def _check_extendable(saved: Checkpoint, path: Path) -> None:
    """Raise ValueError if the network cannot be fitted to further images, or is not fitted."""
    name = saved.recipe.architecture
    if not get_architecture(saved.recipe).is_extendable:
        names = ", ".join(key for key, value in ARCHITECTURES.items() if value.is_extendable)
        raise ValueError(
            f"{path}: wanted a detector that can be extended ({names}), got architecture {name!r}: train it again with "
            "all images"
        )
    if not saved.rng:
        raise ValueError(f"{path}: wanted the checkpoint of a run, got a detector alone, which has no training state")


def _fit_further(
    saved: Checkpoint, path: Path, files: Sequence[Sample], device: torch.device,
    on_step: Callable[[int, int], None] | None,
) -> TrainingState:  # fmt: skip
    """Fit the network of a checkpoint to further images, and return the state of the extended run."""
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
    description = _describe_together(saved.images, images)
    if groups := list(dict.fromkeys([*saved.images.get("groups", []), *list_groups(files)])):
        description["groups"] = groups
    sampler = BatchSampler(description["count"], recipe.batch, drop_last=recipe.drop_last, seed=recipe.seed)
    step = saved.step + len(starts)
    return TrainingState(recipe, saved.category, device, model, [], sampler, description, step=step)


def _decode(recipe: Recipe, files: Sequence[Sample]) -> ImageCache:
    """Decode images as in training."""
    return ImageCache(
        files, recipe.size, recipe.crop, tile=recipe.tile, stride=recipe.stride, bits=recipe.bits,
        window=recipe.window, views=recipe.image_views,
    )  # fmt: skip


def _describe_together(before: Mapping[str, Any], images: ImageCache) -> dict[str, Any]:
    """Describe the images of both fits together, see `recontrast.data.fingerprint.describe_images`."""
    added = describe_images(images)
    joined = {
        "count": before["count"] + added["count"],
        "digest": hashlib.sha256(f"{before['digest']} {added['digest']}".encode()).hexdigest(),
        "each": before.get("each", "") + added["each"],
    }
    if len(sketches := read_sketches(before)):  # else of an older version
        new = read_sketches({"sketches": sketch_images(images)})
        joined["sketches"] = encode_sketches([*sketches, *new]) if len(new) else ""
    return joined


def _write(path: Path, content: Checkpoint, entry: Mapping[str, Any]) -> None:
    """Replace the checkpoint; that of a run together with its log, and without the results of an evaluation."""
    if path.name != CHECKPOINT:
        checkpoint.save(path, content)
        return
    log = [*read_log(path.parent / LOG), entry] if (path.parent / LOG).is_file() else []
    with replace_files(path.parent, remove=list_results(path.parent)) as staging:
        checkpoint.save(staging / CHECKPOINT, content)
        if log:
            (staging / LOG).write_text("".join(f"{json.dumps(line)}\n" for line in log))
