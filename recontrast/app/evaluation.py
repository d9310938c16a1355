"""What `recontrast train` and `recontrast evaluate` do with a trained model and test images."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recontrast.app.results import describe, save_map
from recontrast.data.atomic import replacing
from recontrast.data.datasets import Sample
from recontrast.data.inputs import result_names
from recontrast.engine import distributed
from recontrast.engine.calibrate import Calibration
from recontrast.engine.evaluate import evaluate
from recontrast.engine.infer import highest
from recontrast.engine.ready import Inference
from recontrast.engine.recipes import Recipe
from recontrast.engine.result import Result
from recontrast.engine.uniformity import departure
from recontrast.model import ReContrast


def measure(
    model: ReContrast,
    groups: Mapping[str, Sequence[Sample]],
    recipe: Recipe,
    out: Path | None,
    *,
    save_maps: bool = False,
    inference: Inference | None = None,
    **options: Any,
) -> tuple[Result, list[Path]]:
    """Metrics by category, written below ``out``.

    Args:
        model: trained.
        groups: samples by category.
        recipe: as the model was trained with.
        out: folder for ``results.*`` and ``scores.csv``; None writes nothing.
        save_maps: also write ``maps/NAME.tiff`` (uint16) and ``maps/scale.json``, from the same pass.
        inference: how the model is run; None: as trained, and folded.
        options: as `recontrast.engine.evaluate.evaluate` takes them.

    Returns:
        The result, and the files of it; under torchrun the first process writes them.
    """
    inference = inference or Inference()
    recipe = inference.recipe(recipe)
    network = inference.network(model, recipe)
    keep = None
    if save_maps and out is not None:
        keep = _keeper(groups, out / "maps", highest(network, recipe), recipe)
    result = evaluate(network, groups, recipe, on_maps=keep, **options)
    return result, result.write(out) if out is not None and distributed.here().first else []


def kept_promise(result: Result, calibration: Calibration) -> tuple[str, str | None]:
    """What a calibration decides on the test images.

    Returns:
        A sentence with the rates of false alarms and of detection, and a warning where the good test images do not look
        like the calibration images.
    """
    good = [image.score for image in result.scored if not image.label]
    bad = [image.score for image in result.scored if image.label]
    parts = [
        f"{count} of {len(scores)} {what} ({100 * count / len(scores):.1f} %)"
        for scores, what in ((good, "good images called defects"), (bad, "defect images found"))
        if scores
        for count in [int(calibration.defects(scores).sum())]
    ]
    seen = departure(calibration, good) if good else None
    return (
        f"at the promised false-alarm rate of {calibration.rate:.3g}: {', '.join(parts)}",
        seen.sentence() if seen is not None and seen.far else None,
    )


def _keeper(
    groups: Mapping[str, Sequence[Sample]], folder: Path, top: float, recipe: Recipe
) -> Callable[[Sequence[Sample], Any], None]:
    """Writes maps as they come, and first what their numbers mean."""
    paths = [s.path for group in groups.values() for s in group if s.split == "test"]
    names = dict(zip(paths, result_names(paths), strict=True))
    with replacing(folder / "scale.json") as file:
        file.write((json.dumps(describe("tiff16", top, recipe), indent=1) + "\n").encode())

    def keep(samples: Sequence[Sample], maps: Any) -> None:
        for sample, anomaly in zip(samples, maps, strict=True):
            name = names[sample.path]
            save_map(folder / name.with_name(name.name + ".tiff"), anomaly, "tiff16", top, recipe)

    return keep
