"""Measures of one trained method: metrics where labels exist, measures without labels, time, memory and file size."""

import gc
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recontrast import checkpoint as checkpoints
from recontrast.app.compare.peak_memory import PeakMemory
from recontrast.app.compare.record import MethodResult, Record
from recontrast.app.compare.unlabelled import (
    compute_separation,
    count_false_alarms,
    read_chunks,
    score_defaced,
    score_files,
)
from recontrast.app.evaluate_job import measure_network
from recontrast.app.train_job import TrainJob
from recontrast.checkpoint import Checkpoint
from recontrast.data.fingerprint import compute_fingerprint, read_fingerprints
from recontrast.data.groups import group_equal_samples, group_samples
from recontrast.data.near_copies import read_sketches
from recontrast.evaluation.results import METRICS
from recontrast.inference.detector import CheckpointDetector
from recontrast.inference.infer import infer
from recontrast.training.holdout import split_holdout

TIMED_IMAGES, TIMED_PASSES = 64, 3
OnProgress = Callable[[str, int, int, str], None]  # activity, items done, all items, note


def measure_method(
    name: str, job: TrainJob, record: Record, unlabelled: Sequence[Path], on_progress: OnProgress
) -> MethodResult:
    """Measure one trained method.

    Args:
        name: Name of the method.
        job: Its run.
        record: Its record, with the time and the memory of the training.
        unlabelled: Images without labels.
        on_progress: Called with the activity, the images done, the number of images, and the category.

    Returns:
        The measures; ``agreement`` is None.
    """
    gc.collect()
    device = torch.device(record.settings["device"])
    detector = CheckpointDetector(job.target, device)
    batch = detector.recipe.batch
    result = MethodResult(
        name, train_seconds=record.seconds, train_memory=record.memory, file_bytes=job.target.stat().st_size
    )
    stored = checkpoints.load(job.target)
    result.plan = record.plan
    trained = read_fingerprints(stored.images)
    held_out = list_held_out(job, detector, trained)
    with PeakMemory(device) as peak:
        if any(sample.split == "test" for sample in job.samples):
            _measure_labelled(result, job, detector, stored, on_progress)
        if held_out:
            scores, errors = score_files(detector, held_out, batch)
            result.held_out_scores, result.image_errors = _pair(held_out, scores), [*result.image_errors, *errors]
            result.separation = compute_separation(scores, score_defaced(detector, held_out, batch))
            result.false_alarms = count_false_alarms(scores, job.recipe.seed)
        if unlabelled:
            scores, errors = score_files(detector, unlabelled, batch)
            result.unlabelled_scores = _pair(unlabelled, scores)
            result.image_errors = [*result.image_errors, *errors]
        result.image_seconds = _time_inference(detector, _list_timed(job, held_out), batch)
    result.image_memory = peak.bytes
    return result


def _measure_labelled(
    result: MethodResult, job: TrainJob, detector: CheckpointDetector, stored: Checkpoint, on_progress: OnProgress
) -> None:
    """Compute the metrics on labelled test images, and write them to the folder of the run."""
    evaluated, decisions, _ = measure_network(
        detector.model, job.groups, detector.recipe, job.out, calibration=detector.calibration, errors="keep",
        batch=detector.recipe.batch, trained=read_fingerprints(stored.images), sketches=read_sketches(stored.images),
        on_progress=lambda category, done, total: on_progress(f"evaluate {result.name}", done, total, category),
    )  # fmt: skip
    mean = evaluated.mean
    result.metrics = {name: value for name in METRICS if (value := getattr(mean, name)) is not None}
    result.images, result.defects = mean.images, mean.defects
    result.decided = None if decisions is None else decisions.to_dict()
    result.test_scores = _pair(
        [Path(image.path) for image in evaluated.scored], np.array([image.score for image in evaluated.scored])
    )
    result.image_errors = list(evaluated.errors)


def list_held_out(job: TrainJob, detector: CheckpointDetector, trained: Collection[str]) -> list[Path]:
    """List the good images held out of training, without copies.

    Args:
        job: Run, for the images and the share that is held out.
        detector: Its detector, for the size of the images.
        trained: Fingerprints of the images that it was trained on.

    Returns:
        Paths in the order of the data set.
    """
    good = [sample for sample in job.samples if sample.split == "train" and not sample.label]
    copies, groups = group_equal_samples(good), group_samples(good)
    positions = split_holdout(list(range(len(good))), job.recipe.holdout, job.recipe.seed, groups)[1]
    drawn = [good[position].path for position in positions if copies[position] == position]
    selected = _select_untrained(drawn, detector, trained)
    if len(selected) < len(drawn):  # training divided the images again, to keep near-copies on one side
        different = [sample.path for position, sample in enumerate(good) if copies[position] == position]
        selected = _select_untrained(different, detector, trained)
    return selected


def _select_untrained(paths: Sequence[Path], detector: CheckpointDetector, trained: Collection[str]) -> list[Path]:
    known, selected = set(trained), []
    views = max(len(detector.recipe.view_names), 1)
    chunks = (chunk.reshape(-1, views, *chunk.shape[1:]) for chunk in read_chunks(detector, paths))
    for path, part in zip(paths, (part for chunk in chunks for part in chunk), strict=True):
        fingerprint = compute_fingerprint(part)
        if fingerprint not in known:
            known.add(fingerprint)
            selected.append(path)
    return selected


def _list_timed(job: TrainJob, held_out: Sequence[Path]) -> list[Path]:
    """List images for the measurement of the time: any do, since the time does not depend on their content."""
    good = [sample.path for sample in job.samples if sample.split == "train" and not sample.label]
    return [*held_out, *good][:TIMED_IMAGES]


def _time_inference(detector: CheckpointDetector, paths: Sequence[Path], batch: int) -> float:
    """Return the seconds for an image or part in memory, through network, map and score; the best of `TIMED_PASSES`."""
    pixels = next(read_chunks(detector, paths))
    seconds = []
    for _ in range(TIMED_PASSES + 1):  # the first one warms up
        start = time.perf_counter()
        for _, scores in infer(detector.model, pixels, detector.recipe, batch=batch):
            scores.cpu()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / len(paths)


def _pair(paths: Sequence[Path], scores: Any) -> dict[str, float | None]:
    """Return scores by path, with None for those that are not finite."""
    return {str(path): float(s) if np.isfinite(s) else None for path, s in zip(paths, scores, strict=True)}
