"""Summary of a comparison, and its files: JSON, CSV, Markdown and HTML."""

import math
from collections.abc import Sequence

import numpy as np

from recontrast.app.compare.gallery import draw_cards, list_pool, rank_pool, select_differing
from recontrast.app.compare.page import render_page
from recontrast.app.compare.peak_memory import describe_measurement
from recontrast.app.compare.recommend import recommend
from recontrast.app.compare.record import MethodResult
from recontrast.app.compare.run import COMMAND, Comparison
from recontrast.app.compare.tables import FILES, Summary
from recontrast.app.compare.unlabelled import compute_agreement
from recontrast.app.train_job import TrainJob
from recontrast.data.atomic import replace_files
from recontrast.data.own_files import check_replaceable
from recontrast.data.unfinished import name_mark


def write_comparison(comparison: Comparison, results: Sequence[MethodResult]) -> Summary:
    """Summarise the methods, and write ``compare.json``, ``.csv``, ``.md`` and ``.html`` to the folder.

    Args:
        comparison: Comparison of the methods.
        results: Their measures, at least one of them without an error.

    Returns:
        The summary.

    Raises:
        ValueError: If a file of others has one of the names.
        OSError: If a file cannot be written; existing files are then unchanged.
    """
    check_replaceable(comparison.out, FILES, overwrite=comparison.overwrite)
    measured = [result for result in results if result.error is None]
    pool = list_pool(measured)
    agreement = compute_agreement(
        {r.name: np.array([r.scores[path] for path in pool], np.float64) for r in measured} if len(pool) > 2 else {}
    )
    for result in measured:
        values = [value for value in agreement.get(result.name, {}).values() if value is not None]
        result.agreement = math.fsum(values) / len(values) if values else None
    ranks = rank_pool(measured, pool)
    differing, noun = select_differing(ranks), _find_job(comparison).recipe.noun
    summary = Summary(
        comparison.category, _describe_settings(comparison), list(results), agreement, len(pool),
        recommend(results, noun), _write_notes(comparison, measured, noun), differing, noun,
    )  # fmt: skip
    targets = {run.name: run.job.target for run in comparison.runs if run.job is not None}
    checkpoints = {result.name: targets[result.name] for result in measured}
    cards = draw_cards(checkpoints, str(comparison.device), differing, ranks, _label_images(comparison, measured))
    texts = (summary.to_json(), summary.to_csv(), summary.to_markdown(), render_page(summary, cards))
    with replace_files(comparison.out, remove=[name_mark(COMMAND)]) as staging:
        for name, text in zip(FILES, texts, strict=True):
            errors = "surrogateescape" if name.endswith(".csv") else "backslashreplace"  # names that are not UTF-8
            (staging / name).write_bytes(text.encode(errors=errors))
    return summary


def _find_job(comparison: Comparison) -> TrainJob:
    """Return the first run, for the settings that all methods share."""
    return next(run.job for run in comparison.runs if run.job is not None)


def _describe_settings(comparison: Comparison) -> dict[str, str]:
    """Describe the settings that all methods share."""
    job = _find_job(comparison)
    recipe = job.recipe
    steps = [run.job.recipe.steps for run in comparison.runs if run.job is not None and run.job.recipe.uses_steps]
    settings = {
        "backbone": recipe.backbone, "size": " x ".join(map(str, recipe.out)) + " px", "batch": str(recipe.batch),
        f"training {recipe.noun}s": str(job.count_training()), "device": str(comparison.device),
    }  # fmt: skip
    if comparison.budget is not None:  # chooses the sizes and the steps
        del settings["size"]
        return {**settings, "time for each training": f"{comparison.budget:g} s"}
    return {**settings, "steps": str(steps[0])} if steps else settings


def _label_images(comparison: Comparison, measured: Sequence[MethodResult]) -> dict[str, str]:
    """Return the label in words of each image, by path."""
    labels = {path: "good, held out of training" for result in measured for path in result.held_out_scores}
    for group in comparison.groups.values():
        for sample in group:
            if sample.split == "test":
                labels[str(sample.path)] = f"defect: {sample.defect}" if sample.label else "good"
    return labels


def _write_notes(comparison: Comparison, measured: Sequence[MethodResult], noun: str) -> list[str]:
    """Return sentences, without full stops, that a reader needs to interpret the numbers."""
    steps = [run.name for run in comparison.runs if run.job is not None and run.job.recipe.uses_steps]
    notes = [describe_measurement(comparison.device)]
    notes.append(
        f"training time: wall clock, with loading weights, reading {noun}s and calibration; inference time: network, "
        f"map and score of {noun}s in memory, the fastest of three passes"
    )
    notes += [f"{result.name} {result.plan}" for result in measured if result.plan is not None]
    if steps and comparison.budget is None:
        recipe = next(run.job.recipe for run in comparison.runs if run.job is not None and run.name == steps[0])
        notes.append(
            f"{', '.join(steps)}: trained for {recipe.steps} steps of {recipe.batch} images; more steps can change "
            "their places"
        )
    if any(result.separation is not None for result in measured):
        notes.append(
            f"separation: the artificial defect is a patch pasted at another place of the {noun} (CutPaste, Li et al., "
            "CVPR 2021), and real defects can be harder or of another kind"
        )
    if alarms := next((r.false_alarms for r in measured if r.false_alarms is not None), None):
        notes.append(
            f"false alarms: promised is a rate of at most {100 * alarms[2]:.3g} % on average, for every method; the "
            f"threshold of each half of the {alarms[1]} held-out {noun}s is applied to the other half"
        )
    if any(result.metrics for result in measured):
        notes.append(f"metrics: percent, of the detectors after their last step, on the labelled test {noun}s")
    return notes
