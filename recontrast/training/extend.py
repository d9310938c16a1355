"""Extension of a detector by further good images: a fitted one gains their vectors, others make further steps."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from recontrast import checkpoint
from recontrast.architectures import get_architecture
from recontrast.calibration.conformal import Calibration
from recontrast.checkpoint import Checkpoint
from recontrast.data.atomic import replace_files
from recontrast.data.datasets import Sample
from recontrast.data.fingerprint import count_files, read_fingerprints
from recontrast.data.locks import lock_checkpoint
from recontrast.data.part_samples import join_part_samples
from recontrast.float32 import convolution_precision
from recontrast.inference.calibrate import split_trained_images
from recontrast.recipes import yaml_file
from recontrast.runtime.device import resolve_device
from recontrast.training.extend_checks import check_classes, check_extendable, check_former
from recontrast.training.further_training import decode_images, fit_further, train_further
from recontrast.training.holdout import calibrate_holdout
from recontrast.training.json_log import read_log
from recontrast.training.new_images import split_new_images
from recontrast.training.run_files import CHECKPOINT, LOG, list_results
from recontrast.training.state import snapshot

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
        noun: What is counted, see `recontrast.recipes.recipe.Recipe.noun`.
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
    noun: str = "image"


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
    well. A detector that is trained by steps makes further ones on all given images, new ones and those that it was
    trained on, with the optimisers as they were left; its recipe then has all steps, and its schedule that of a run of
    so many. The file is replaced at the end, so that an error or Ctrl-C leaves it as it was. The stored calibration is
    removed: it belongs to the detector before.

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
        check_extendable(saved, path, steps, holdout)
        samples = join_part_samples([_to_sample(item) for item in paths], saved.recipe.image_views)
        check_classes(samples, saved.recipe, option)
        given = {sample.path: sample for sample in samples}
        new, known, left_out, sketches = split_trained_images(option, list(given), saved)
        if not new:
            count = len(known) + len(left_out)
            raise ValueError(
                f"{option}: wanted good images that the detector was not trained on, got {count} that it was"
            )
        new_samples = [given[path] for path in new]
        check_former(saved, path, len(known), option)
        training, held_out, groups = split_new_images(new_samples, sketches, saved, holdout, option)
        again, entries = [given[path] for path in known], list[dict[str, Any]]()
        with convolution_precision(saved.recipe.tf32):
            if saved.recipe.uses_steps:
                further = max(saved.recipe.steps // STEP_SHARE, 1) if steps is None else steps
                state = train_further(saved, path, training, again, further, resolved, on_step, entries)
            else:
                state = fit_further(saved, path, training, again, resolved, on_step)
                if not get_architecture(saved.recipe).needs_former:
                    again, left_out = [], [*known, *left_out]
            content, calibration = snapshot(state), None
            if held_out:
                images = None if saved.recipe.tile is not None else decode_images(saved.recipe, held_out)
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
        max(trained - len(again), 0) if is_stepped else 0, saved.recipe.noun,
    )  # fmt: skip


def _to_sample(item: Path | Sample) -> Sample:
    return item if isinstance(item, Sample) else Sample(item, None, 0, "", "train", "good")


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
