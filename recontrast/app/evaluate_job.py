"""Evaluation for the command line and for `recontrast.evaluate`: metrics, decisions, and their files."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recontrast.app.prediction.output_files import SCALE, save_map, save_scale
from recontrast.calibration.appearance_drift import AppearanceDrift, describe_appearance, measure_appearance_drift
from recontrast.calibration.conformal import Calibration
from recontrast.calibration.score_drift import ScoreDrift, measure_score_drift
from recontrast.data.datasets import Sample
from recontrast.data.groups import name_group, number_groups
from recontrast.data.image_files import IMAGE_ERRORS, assign_result_names, describe_image_error
from recontrast.data.json_text import parse_json
from recontrast.data.locks import lock_folder
from recontrast.data.own_files import check_replaceable
from recontrast.data.part_samples import join_part_samples
from recontrast.data.regular_file import read_bytes
from recontrast.data.unfinished import is_inside, list_unfinished, mark_unfinished, name_mark, remove_files
from recontrast.evaluation.evaluate import evaluate
from recontrast.evaluation.results import FILES, Result
from recontrast.evaluation.sample_images import open_images
from recontrast.evaluation.scorers import build_scorer
from recontrast.inference.exported_detector import ExportedDetector
from recontrast.inference.options import InferenceOptions
from recontrast.models.network import Network
from recontrast.recipes.recipe import Recipe
from recontrast.runtime import distributed

COMMAND = "evaluate"  # in the name of the mark of unfinished results


@dataclass(frozen=True)
class DecisionSummary:
    """Decisions of a calibration on test images, and whether the good images are like the calibration images.

    Attributes:
        rate: Promised false-alarm rate.
        good: Number of good images.
        false_alarms: Number of good images called defects.
        defects: Number of images with a defect.
        found: Number of images with a defect that were called defects.
        score_drift: Drift of the scores of the good images; None without good images.
        appearance_drift: Drift of their appearance; None without good images, or if the calibration
            has no appearance.
        noun: What is counted, see `recontrast.recipes.recipe.Recipe.noun`.
    """

    rate: float
    good: int
    false_alarms: int
    defects: int
    found: int
    score_drift: ScoreDrift | None
    appearance_drift: AppearanceDrift | None
    noun: str = "image"

    def describe(self) -> str:
        """Describe the rates in one sentence."""
        parts = [
            f"{count} of {total} {kind} ({100 * count / total:.1f} %)"
            for count, total, kind in (
                (self.false_alarms, self.good, f"good {self.noun}s called defects"),
                (self.found, self.defects, f"defect {self.noun}s found"),
            )
            if total
        ]
        return f"at the promised false-alarm rate of {self.rate:.3g}: {', '.join(parts)}"

    def warnings(self) -> list[str]:
        """Return one sentence for each significant drift of the good images."""
        drifts = (self.score_drift, self.appearance_drift)
        return [drift.describe(self.noun) for drift in drifts if drift is not None and drift.is_significant]

    def to_dict(self) -> dict[str, Any]:
        """Return all values as types that JSON can hold."""
        values = {name: value for name, value in asdict(self).items() if name != "noun"}
        names = {"score_drift": "departure", "appearance_drift": "change"}  # the names in files of earlier versions
        return {**{names.get(name, name): value for name, value in values.items()}, "warnings": self.warnings()}


def measure(
    model: Network | ExportedDetector,
    groups: Mapping[str, Sequence[Sample]],
    recipe: Recipe,
    out: Path | None,
    *,
    save_maps: bool = False,
    inference: InferenceOptions | None = None,
    calibration: Calibration | None = None,
    **options: Any,
) -> tuple[Result, DecisionSummary | None, list[Path]]:
    """Compute metrics by category and write them below ``out``.

    Args:
        model: Trained model, or the detector in an exported file.
        groups: Samples by category.
        recipe: Recipe that the model was trained with, or that of the file.
        out: Folder for ``results.*`` and ``scores.csv``. None writes nothing.
        save_maps: Whether to write ``maps/NAME.tiff`` (uint16) and ``maps/scale.json`` as well.
        inference: Inference options. None: as trained, with folded BatchNorm.
        calibration: Calibration that is valid for these scores. With it, the images are also called good or defect.
        options: Options of `recontrast.evaluation.evaluate.evaluate`.

    Returns:
        The result, the decisions of the calibration or None, and the written files. Under torchrun only the first
        process has the last two, and writes.
    """
    network, inference = model, inference or InferenceOptions()
    if not isinstance(model, ExportedDetector):
        trained, recipe = recipe, inference.apply_to(recipe)
        network = inference.build_network(model, recipe, trained)
    return measure_network(network, groups, recipe, out, save_maps=save_maps, calibration=calibration, **options)


def measure_network(
    network: Network | ExportedDetector,
    groups: Mapping[str, Sequence[Sample]],
    recipe: Recipe,
    out: Path | None,
    *,
    save_maps: bool = False,
    calibration: Calibration | None = None,
    **options: Any,
) -> tuple[Result, DecisionSummary | None, list[Path]]:
    """Do the same as `measure` for a network or file that is ready for inference, with the recipe of its maps."""
    is_writer = out is not None and distributed.current_world().first
    with lock_folder(out) if out is not None and is_writer else nullcontext():
        return _measure_and_write(network, groups, recipe, out, save_maps, calibration, options)


def _measure_and_write(
    network: Network | ExportedDetector, groups: Mapping[str, Sequence[Sample]], recipe: Recipe, out: Path | None,
    save_maps: bool, calibration: Calibration | None, options: dict[str, Any],
) -> tuple[Result, DecisionSummary | None, list[Path]]:  # fmt: skip
    """Compute metrics and write them to a folder that is locked."""
    groups = {name: join_part_samples(samples, recipe.image_views) for name, samples in groups.items()}
    is_first, writer, earlier = distributed.current_world().first, None, set[str]()
    names = name_maps(groups) if save_maps and out is not None else {}
    if out is not None and is_first:
        earlier = _list_earlier_maps(out)
        if earlier or names:
            mark_unfinished(out, COMMAND, earlier.union(names.values()), _list_own_tables(out))
    if out is not None and names:  # every process writes the maps of its images
        writer = _MapWriter(names, out, build_scorer(network, recipe, None).max_value, recipe)
    result = evaluate(network, groups, recipe, on_maps=None if writer is None else writer.write, **options)
    errors, maps = ({}, set()) if writer is None else writer.gather()
    if not is_first:
        return result, None, []
    result = _add_errors(result, errors)
    written = []
    if out is not None:  # before anything else can fail
        remove_files(out, earlier.difference(maps, [] if not names else [SCALE]))
        written = result.write(out, [name_mark(COMMAND)], overwrite=True)  # checked before
    decisions = None
    if calibration is not None:
        reading = {name: options.get(name) for name in ("workers", "cache_dir")}
        unread: dict[str, str] = {}
        decisions = decide_on_result(result, calibration, groups, recipe, unread=unread, **reading)
        result = replace(_add_errors(result, unread), decided=decisions.to_dict())
        written = result.write(out, overwrite=True) if out is not None else []
    return result, decisions, written


def decide_on_result(
    result: Result, calibration: Calibration, groups: Mapping[str, Sequence[Sample]], recipe: Recipe, *,
    workers: int | None = None, cache_dir: str | Path | None = None, unread: dict[str, str] | None = None,
) -> DecisionSummary:  # fmt: skip
    """Decide on the images of ``result``; the good images in ``groups`` are read again for their appearance.

    ``unread`` receives one sentence for each image that can no longer be read, by path. It has a decision, but is
    missing from the appearance.
    """
    scored = [image for image in result.scored if not math.isnan(image.score)]
    good, bad = ([image.score for image in scored if bool(image.label) == is_defect] for is_defect in (False, True))
    false_alarms, detected = (int(calibration.is_defect(scores).sum()) for scores in (good, bad))
    paths = {image.path for image in scored}
    samples = [
        s for group in groups.values() for s in group if s.split == "test" and not s.label and str(s.path) in paths
    ]
    appearance_drift = None
    if samples and calibration.appearance:
        missing: dict[int, str] = {}
        images = open_images(samples, recipe, workers, cache_dir if recipe.tile is None else None, missing)
        appearance = np.delete(
            describe_appearance(images, views=max(len(recipe.view_names), 1)), sorted(missing), axis=0
        )
        if len(appearance):
            appearance_drift = measure_appearance_drift(np.array(calibration.appearance), appearance)
        if unread is not None:
            unread.update({str(samples[position].path): text for position, text in missing.items()})
    names = {str(sample.path): name_group(sample) for group in groups.values() for sample in group}
    owners = number_groups([names.get(image.path) for image in scored if not image.label])
    score_drift = measure_score_drift(calibration, good, owners) if good else None
    counts = (len(good), false_alarms, len(bad), detected)
    return DecisionSummary(calibration.rate, *counts, score_drift, appearance_drift, recipe.noun)


def _add_errors(result: Result, errors: Mapping[str, str]) -> Result:
    """Add errors of images that have a score, by path, to those of a result."""
    if not errors:
        return result
    scored = [
        replace(image, error=errors[image.path]) if image.error is None and image.path in errors else image
        for image in result.scored
    ]
    return replace(result, scored=scored)


def check_outputs(
    out: Path, groups: Mapping[str, Sequence[Sample]], *, save_maps: bool, overwrite: bool, option: str
) -> None:
    """Check that an evaluation would replace no file of others and none of its images.

    Args:
        out: Folder of the results.
        groups: Samples by category; the names of maps are those of parts only if the samples are joined.
        save_maps: Whether maps are written as well.
        overwrite: Whether files of others may be replaced.
        option: Option or argument that names the folder, for the error message.

    Raises:
        ValueError: If a file of others, a folder or an image has the name of a result.
    """
    maps = [*name_maps(groups).values(), SCALE] if save_maps else []
    images = [s for group in groups.values() for sample in group for s in (sample, *sample.views)]
    check_replaceable(out, [*FILES, name_mark(COMMAND), *maps], overwrite=overwrite, option=option,
                      inputs=[path for s in images for path in (s.path, s.mask) if path is not None])  # fmt: skip


def name_maps(groups: Mapping[str, Sequence[Sample]]) -> dict[Path, str]:
    """Return the path of the map of each test image, relative to the folder of the results."""
    paths = [s.path for group in groups.values() for s in group if s.split == "test"]
    return {path: f"maps/{name.as_posix()}.tiff" for path, name in zip(paths, assign_result_names(paths), strict=True)}


def _list_earlier_maps(out: Path) -> set[str]:
    """List the maps of earlier evaluations, finished or not, and the file of their scale."""
    names = list_unfinished(out, COMMAND) or set()
    try:
        listed = parse_json(read_bytes(out / SCALE))["files"]
        names |= {SCALE, *(name for name in listed if isinstance(name, str))}
    except (OSError, ValueError, KeyError, TypeError):  # no maps, or those of an older version
        pass
    return {name for name in names if name.startswith("maps/") and is_inside(name)}


def _list_own_tables(out: Path) -> list[str]:
    """List the tables of a finished evaluation in a folder."""
    try:
        is_ours = "rows" in parse_json(read_bytes(out / "results.json"))
    except (OSError, ValueError, TypeError):
        is_ours = False
    return list(FILES) if is_ours else []


class _MapWriter:
    """Writer of the maps of this process, with a scale and a list of the maps of all processes.

    A map that cannot be written is recorded, and the others go on.
    """

    def __init__(self, names: Mapping[Path, str], out: Path, top: float, recipe: Recipe) -> None:
        self.names, self.out, self.top, self.recipe = names, out, top, recipe
        self.errors: dict[str, str] = {}
        self.written: set[str] = set()
        save_scale(out, "tiff16", top, recipe, {"files": list(names.values())})

    def write(self, samples: Sequence[Sample], maps: Any) -> None:
        """Write the maps (n, H, W) of ``samples``."""
        for sample, anomaly in zip(samples, maps, strict=True):
            name = self.names[sample.path]
            try:
                save_map(self.out / name, anomaly, "tiff16", self.top, self.recipe)
                self.written.add(name)
            except IMAGE_ERRORS as error:
                self.errors[str(sample.path)] = describe_image_error(str(sample.path), error)

    def gather(self) -> tuple[dict[str, str], set[str]]:
        """Return the errors by path and the names of the written maps of all processes, in every process."""
        errors: dict[str, str] = {}
        written: set[str] = set()
        for part, names in distributed.gather_from_all(distributed.current_world(), (self.errors, self.written)):
            errors |= part
            written |= names
        return errors, written
