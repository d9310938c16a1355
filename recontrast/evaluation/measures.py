"""Measures of benchmarks besides the usual metrics: of MVTec LOCO AD, MVTec AD 2 and Real-IAD.

They are chosen by the data set that ``recontrast prepare`` prepared, or by name.

- *MVTec LOCO AD* (Bergmann et al., IJCV 2022): AU-sPRO up to a false positive rate of 0.05 on maps at the size of the
  images, and I-AUROC, each for structural and for logical anomalies beside all good images, and their mean.
- *MVTec AD 2* (Heckler-Kram et al., 2025): AUPRO up to 0.05, and F1 of the pixels at a threshold.
- *Real-IAD* (Wang et al., CVPR 2024): image metrics of samples, whose score is the largest of their five views, and
  I-AUROC of each view.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional

from recontrast import metrics
from recontrast.data.dataset_sample import Sample
from recontrast.data.decode import decode
from recontrast.data.images import MAX_PIXELS, image_size
from recontrast.data.json_text import describe_json_error, parse_json
from recontrast.data.listing import list_images
from recontrast.data.mvtec_layout import DEFECTS, DEFECTS_CONFIG
from recontrast.data.prepare import MARKER_FILE
from recontrast.data.regular_file import read_bytes
from recontrast.recipes.recipe import Recipe

LIMIT = 0.05  # false positive rate at which the curves of LOCO and AD 2 end
MEASURES = ("auto", "none", "mvtec_loco", "mvtec_ad_2", "real_iad")
_VIEW = re.compile(r"([a-zA-Z]\w*_\d{4}_[A-Z][A-Z_]*)_(C\d)_")  # sample and view in a file name of Real-IAD


class Measures:
    """Measures of one category beyond the usual metrics; this class has none.

    Args:
        tests: Test images of the category, of all processes.

    Attributes:
        limits: Further false positive rates at which AUPRO is computed.
        takes_threshold: Whether SegF1 belongs to the benchmark.
        takes_maps: Whether `update` uses the maps.
        threshold: Map value at which SegF1 is computed; None for no SegF1.
        notes: Reasons why measures are missing.
    """

    limits: tuple[float, ...] = ()
    takes_threshold = False
    takes_maps = False

    def __init__(self, tests: Sequence[Sample]) -> None:
        self.tests = tests
        self.threshold: float | None = None
        self.notes: list[str] = []

    def update(self, position: int, anomaly: Tensor) -> None:
        """Add the map (H, W) of the image at a position in ``tests``."""

    def state(self) -> Any:
        """Return what this process accumulated."""

    def merge(self, states: Sequence[Any]) -> None:
        """Replace what was accumulated by that of all processes."""

    def release(self) -> None:
        """Release the memory of what was accumulated."""

    def compute(self, scores: Tensor, usable: Sequence[int]) -> dict[str, float]:
        """Compute the measures by their headings.

        Args:
            scores: Scores (N,) of all images, float32.
            usable: Positions of the images without an error.
        """
        return {}


class Ad2Measures(Measures):
    """Measures of MVTec AD 2, which follow from the histograms or the sort of the pixel metrics."""

    limits = (LIMIT,)
    takes_threshold = True


class LocoMeasures(Measures):
    """Measures of MVTec LOCO AD: curves of the images of each kind of anomaly and of the good ones.

    Args:
        tests: Test images of the category, of all processes.
        folder: Folder of the category, as ``recontrast prepare`` writes it.
        recipe: Recipe of the maps.

    Raises:
        ValueError: If the configuration of the defects is not of the form of the benchmark.
    """

    takes_maps = True

    def __init__(self, tests: Sequence[Sample], folder: Path, recipe: Recipe) -> None:
        super().__init__(tests)
        self.folder = folder
        self.kinds = list(dict.fromkeys(sample.defect for sample in tests if sample.label))
        self.overlaps: dict[str, metrics.SaturatedOverlap] = {}
        self.saturations: Mapping[int, tuple[float, bool]] = {}
        if not (folder / DEFECTS_CONFIG).is_file() or not (folder / DEFECTS).is_dir():
            self.notes.append(f"no AU-sPRO: {folder} has no {DEFECTS_CONFIG} and {DEFECTS}: prepare the data set again")
        elif recipe.crop is not None or recipe.roi is not None:
            self.notes.append("no AU-sPRO: maps show a part of the images")
        else:
            self.saturations = read_saturations(folder / DEFECTS_CONFIG)
            sizes = {id(sample): _count_pixels(sample) for sample in tests}
            for kind in self.kinds:
                pixels = sum(sizes[id(sample)] for sample in tests if not sample.label or sample.defect == kind)
                self.overlaps[kind] = metrics.SaturatedOverlap(pixels, LIMIT)

    def update(self, position: int, anomaly: Tensor) -> None:
        """Add the map (H, W) of an image, enlarged bilinearly to the size of the image.

        Raises:
            OSError: If a mask cannot be read.
            ValueError: If a mask is not one of the benchmark.
        """
        if not self.overlaps:
            return
        sample = self.tests[position]
        size = image_size(sample.path)
        resized = functional.interpolate(anomaly[None, None].float(), size, mode="bilinear", align_corners=False)
        scores = resized[0, 0].cpu().numpy()
        masks, areas = self._read_defects(sample, size) if sample.label else ([], [])
        for kind, overlap in self.overlaps.items():
            if not sample.label or sample.defect == kind:
                overlap.update(scores, np.array(masks), areas)

    def state(self) -> dict[str, metrics.SaturatedOverlap]:
        """Return the curves of this process."""
        return self.overlaps

    def merge(self, states: Sequence[dict[str, metrics.SaturatedOverlap]]) -> None:
        """Replace the curves by those of all processes."""
        first, *others = states
        for kind, overlap in first.items():
            for other in others:
                overlap.merge(other[kind])
        self.overlaps = first

    def release(self) -> None:
        """Release the scores that the curves hold."""
        self.overlaps = {}

    def compute(self, scores: Tensor, usable: Sequence[int]) -> dict[str, float]:
        """Compute the areas and I-AUROC of each kind, and their means; see `Measures.compute`."""
        values: dict[str, dict[str, float]] = {"I-AUROC": {}, f"AU-sPRO@{LIMIT:g}": {}}
        overlaps, area = self.overlaps, f"AU-sPRO@{LIMIT:g}"
        for kind in self.kinds:
            name = kind.removesuffix("_anomalies")
            chosen = [i for i in usable if not self.tests[i].label or self.tests[i].defect == kind]
            labels = np.array([self.tests[i].label for i in chosen])
            if 0 < labels.sum() < len(labels):
                values["I-AUROC"][name] = metrics.auroc(scores[chosen], labels)
            if kind in overlaps and overlaps[kind].scores and overlaps[kind].good.total:
                values[area][name] = overlaps[kind].compute()
        result = {}
        for heading, by_kind in values.items():
            if len(by_kind) == len(self.kinds) > 0:
                result[f"{heading} mean" if heading == "I-AUROC" else heading] = float(np.mean(list(by_kind.values())))
            result |= {f"{heading} {name}": value for name, value in by_kind.items()}
        return result

    def _read_defects(self, sample: Sample, size: tuple[int, int]) -> tuple[list[Any], list[float]]:
        """Return the masks of the defects of an image, each (H, W) bool, and their saturation areas."""
        folder = self.folder / DEFECTS / sample.defect / sample.path.stem
        masks, areas = [], []
        for path in list_images(folder):
            values = np.asarray(decode(path, MAX_PIXELS))
            levels = np.unique(values[values != 0]).tolist() if values.ndim == 2 else []
            if values.shape != size or len(levels) != 1 or levels[0] not in self.saturations:
                raise ValueError(
                    f"{path}: wanted a grey mask of {size[0]} x {size[1]} with 0 and one value of {DEFECTS_CONFIG}, "
                    f"got {' x '.join(map(str, values.shape))} with {levels}"
                )
            masks.append(values != 0)
            areas.append(metrics.saturation_area(int(masks[-1].sum()), *self.saturations[levels[0]]))
        return masks, areas


class RealIadMeasures(Measures):
    """Measures of Real-IAD: samples of several views, by the names of the files.

    Args:
        tests: Test images of the category, of all processes.
    """

    def __init__(self, tests: Sequence[Sample]) -> None:
        super().__init__(tests)
        names = [_VIEW.search(sample.path.name) for sample in tests]
        self.samples = [match[1] for match in names if match]
        self.views = [match[2] for match in names if match]
        if len(self.samples) < len(tests):
            other = next(s.path.name for s, match in zip(tests, names, strict=True) if not match)
            self.notes.append(f"no S-AUROC: the name {other} does not say sample and view, as in Real-IAD")

    def compute(self, scores: Tensor, usable: Sequence[int]) -> dict[str, float]:
        """Compute the image metrics of the samples, and I-AUROC of each view; see `Measures.compute`."""
        if self.notes:
            return {}
        labels = np.array([self.tests[i].label for i in usable])
        merged, positive = metrics.merge_views(scores[list(usable)], labels, [self.samples[i] for i in usable])
        result = {}
        if 0 < positive.sum() < len(positive):
            sample = metrics.image_metrics(merged, positive)
            result = {"S-AUROC": sample.auroc, "S-AP": sample.ap, "S-F1": sample.f1_max}
        for view in sorted(set(self.views)):
            chosen = [i for i in usable if self.views[i] == view]
            own = np.array([self.tests[i].label for i in chosen])
            if 0 < own.sum() < len(own):
                result[f"I-AUROC {view}"] = metrics.auroc(scores[chosen], own)
        return result


def build_measures(name: str, tests: Sequence[Sample], recipe: Recipe) -> Measures:
    """Build the measures of a category.

    Args:
        name: One of `MEASURES`; "auto" takes those of the prepared data set, or none.
        tests: Test images of the category.
        recipe: Recipe of the maps.

    Returns:
        The measures.

    Raises:
        ValueError: If the name is unknown, or the data set lacks what the measures need although they were named.
    """
    if name not in MEASURES:
        raise ValueError(f"measures: wanted one of {', '.join(MEASURES)}, got {name!r}")
    prepared, folder = find_prepared(tests[0])
    chosen = prepared if name == "auto" else name
    measures = Measures(tests)
    if chosen == "mvtec_ad_2":
        measures = Ad2Measures(tests)
    elif chosen == "mvtec_loco":
        measures = LocoMeasures(tests, folder, recipe)
    elif chosen == "real_iad":
        measures = RealIadMeasures(tests)
    if name != "auto" and measures.notes:
        raise ValueError(f"measures: wanted those of {name}, got {measures.notes[0]}")
    return measures


def find_prepared(sample: Sample) -> tuple[str, Path]:
    """Find the prepared data set of a sample.

    Args:
        sample: Test image, CATEGORY/test/DEFECT/NAME below the root.

    Returns:
        Name of the data set, empty if it was not prepared, and the folder of the category.
    """
    category = sample.path.parents[min(2, len(sample.path.parents) - 1)]
    try:
        return str(parse_json(read_bytes(category.parent / MARKER_FILE))["data"]), category
    except (OSError, ValueError, KeyError, TypeError):
        return "", category


def read_saturations(path: Path) -> dict[int, tuple[float, bool]]:
    """Read the saturation thresholds of the kinds of defects of a category of MVTec LOCO AD.

    Args:
        path: Its defects_config.json.

    Returns:
        Value in the masks -> threshold, and whether it is a share of the area of the defect.

    Raises:
        ValueError: If the file is not of this form.
    """
    try:
        return {
            int(kind["pixel_value"]): (float(kind["saturation_threshold"]), bool(kind["relative_saturation"]))
            for kind in parse_json(read_bytes(path))
        }
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: wanted a list of pixel_value, saturation_threshold and relative_saturation, got "
            f"{describe_json_error(error)}"
        ) from None


def _count_pixels(sample: Sample) -> int:
    try:
        height, width = image_size(sample.path)
    except (OSError, ValueError):  # it is left out, or raises when it is read
        return 0
    return height * width
