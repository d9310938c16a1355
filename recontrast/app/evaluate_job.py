"""What `recontrast train` and `recontrast evaluate` do with a trained model and test images."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recontrast.app.prediction.output_files import describe, save_map
from recontrast.calibration.appearance_drift import AppearanceDrift, describe_appearance, measure_appearance_drift
from recontrast.calibration.conformal import Calibration
from recontrast.calibration.score_drift import ScoreDrift, measure_score_drift
from recontrast.data.atomic import replace_file
from recontrast.data.cache import ImageCache
from recontrast.data.datasets import Sample
from recontrast.data.image_files import assign_result_names
from recontrast.data.sources import Images
from recontrast.evaluation.category import SampleImages
from recontrast.evaluation.evaluate import evaluate
from recontrast.evaluation.results import Result
from recontrast.inference.infer import max_map_value
from recontrast.inference.options import InferenceOptions
from recontrast.models.fold import FoldedModel
from recontrast.models.recontrast import ReContrast
from recontrast.recipes.recipe import Recipe
from recontrast.runtime import distributed


@dataclass(frozen=True)
class Decided:
    """What a calibration decides on test images, and whether the good ones are such as it was made with."""

    rate: float  # promised share of false alarms
    good: int  # images
    false_alarms: int
    defects: int  # images
    found: int
    score_drift: ScoreDrift | None  # of the p-values of the good images; None without any
    appearance_drift: (
        AppearanceDrift | None
    )  # of how they look; None without any, or where the calibration does not know

    def describe(self) -> str:
        """The rates."""
        parts = [
            f"{count} of {total} {what} ({100 * count / total:.1f} %)"
            for count, total, what in (
                (self.false_alarms, self.good, "good images called defects"),
                (self.found, self.defects, "defect images found"),
            )
            if total
        ]
        return f"at the promised false-alarm rate of {self.rate:.3g}: {', '.join(parts)}"

    def warnings(self) -> list[str]:
        """A sentence for each way in which the good images are not like those of the calibration."""
        return [
            seen.describe()
            for seen in (self.score_drift, self.appearance_drift)
            if seen is not None and seen.is_significant
        ]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values that JSON can hold."""
        values = asdict(self)
        names = {"score_drift": "departure", "appearance_drift": "change"}  # as in files of earlier versions
        return {**{names.get(name, name): value for name, value in values.items()}, "warnings": self.warnings()}


def measure(
    model: ReContrast,
    groups: Mapping[str, Sequence[Sample]],
    recipe: Recipe,
    out: Path | None,
    *,
    save_maps: bool = False,
    inference: InferenceOptions | None = None,
    calibration: Calibration | None = None,
    **options: Any,
) -> tuple[Result, Decided | None, list[Path]]:
    """Metrics by category, written below ``out``.

    Args:
        model: trained.
        groups: samples by category.
        recipe: as the model was trained with.
        out: folder for ``results.*`` and ``scores.csv``; None writes nothing.
        save_maps: also write ``maps/NAME.tiff`` (uint16) and ``maps/scale.json``, from the same pass.
        inference: how the model is run; None: as trained, and folded.
        calibration: of these very scores; decides on the images too.
        options: as `recontrast.evaluation.evaluate.evaluate` takes them.

    Returns:
        The result, what the calibration decides, and the files of both; under torchrun of the first process, which
        writes them.
    """
    inference = inference or InferenceOptions()
    trained, recipe = recipe, inference.apply_to(recipe)
    network = inference.build_network(model, recipe, trained)
    return measure_network(network, groups, recipe, out, save_maps=save_maps, calibration=calibration, **options)


def measure_network(
    network: ReContrast | FoldedModel,
    groups: Mapping[str, Sequence[Sample]],
    recipe: Recipe,
    out: Path | None,
    *,
    save_maps: bool = False,
    calibration: Calibration | None = None,
    **options: Any,
) -> tuple[Result, Decided | None, list[Path]]:
    """As `measure`, with a network that is ready for inference, and the recipe that says how its maps are made."""
    keep = None
    if save_maps and out is not None:
        keep = _keeper(groups, out / "maps", max_map_value(network, recipe), recipe)
    result = evaluate(network, groups, recipe, on_maps=keep, **options)
    if not distributed.current_world().first:
        return result, None, []
    written = result.write(out) if out is not None else []  # before anything else can fail
    made = None
    if calibration is not None:
        caching = {name: options.get(name) for name in ("workers", "cache_dir")}
        made = decided(result, calibration, groups, recipe, **caching)
        result = replace(result, decided=made.to_dict())
        written = result.write(out) if out is not None else []
    return result, made, written


def decided(
    result: Result, calibration: Calibration, groups: Mapping[str, Sequence[Sample]], recipe: Recipe, *,
    workers: int | None = None, cache_dir: str | Path | None = None,
) -> Decided:  # fmt: skip
    """What ``calibration`` decides on the images of ``result``; the good ones among ``groups`` are looked at again."""
    good, bad = ([image.score for image in result.scored if bool(image.label) == which] for which in (False, True))
    alarms, found = (int(calibration.is_defect(scores).sum()) for scores in (good, bad))
    samples = [s for group in groups.values() for s in group if s.split == "test" and not s.label]
    other = None
    if samples and calibration.appearance:
        images: Images = SampleImages(samples, recipe, workers)
        if cache_dir is not None and recipe.tile is None:
            images = ImageCache(samples, recipe.size, recipe.crop, directory=cache_dir, workers=workers)
        other = measure_appearance_drift(np.array(calibration.appearance), describe_appearance(images))
    seen = measure_score_drift(calibration, good) if good else None
    return Decided(calibration.rate, len(good), alarms, len(bad), found, seen, other)


def _keeper(
    groups: Mapping[str, Sequence[Sample]], folder: Path, top: float, recipe: Recipe
) -> Callable[[Sequence[Sample], Any], None]:
    """Writes maps as they come, and first what their numbers mean."""
    paths = [s.path for group in groups.values() for s in group if s.split == "test"]
    names = dict(zip(paths, assign_result_names(paths), strict=True))
    with replace_file(folder / "scale.json") as file:
        file.write((json.dumps(describe("tiff16", top, recipe), indent=1) + "\n").encode())

    def keep(samples: Sequence[Sample], maps: Any) -> None:
        for sample, anomaly in zip(samples, maps, strict=True):
            name = names[sample.path]
            save_map(folder / name.with_name(name.name + ".tiff"), anomaly, "tiff16", top, recipe)

    return keep
