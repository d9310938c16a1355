"""Tables of the paper as experiments: a recipe, the changes of each entry, and the published numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recontrast.experiments import published_numbers as numbers
from recontrast.experiments.published_numbers import Numbers

RD4AD = {"train_encoder": False, "pairs": "self", "mining": False}  # one frozen encoder, three pairs, no heads
SINGLE_ENCODER = {"pairs": "self", "mining": False}  # one trained encoder, three pairs of its own features

# Table 6. Its columns are: global loss, trained encoder, stop-gradient, contrastive pairs, hard mining. A frozen
# encoder needs no stop-gradient, and its own features are the only target. The paper leaves two points open:
# - Whether the decoder of C and D has heads. Here it has none, like that of RD4AD, which Table A5 counts without heads.
# - How mining works in B+hm. Without heads, the features of a level also carry the gradient of the finer levels, and
#   the hook of the reference's loss would reduce that gradient too. Here mining weights only the gradient of the loss
#   at the level itself, as its formula says.
ABLATION: dict[str, dict[str, Any]] = {
    "A": {**RD4AD, "loss": "point"},  # RD4AD as in its paper
    "B": RD4AD,  # RD4AD as in its code, with the global loss
    "B+hm": {**RD4AD, "mining": True},
    "C": {**SINGLE_ENCODER, "stop_gradient": False},  # the encoder also gets the gradient of its features as targets
    "D": SINGLE_ENCODER,
    "C+cp": {"mining": False, "stop_gradient": False},  # ours without stop-gradient and mining
    "E-gl": {"mining": False, "loss": "point"},  # ours with the point loss
    "E": {"mining": False},  # ours without hard mining
    "ours": {},
}
BACKBONES = ("resnet18", "resnet50", "wide_resnet50_2")


@dataclass(frozen=True)
class Entry:
    """One entry of a table: a configuration and its published numbers.

    Attributes:
        name: Name of the entry and of its folder.
        numbers: Published numbers by category, and for the "mean".
        changes: Recipe fields that differ from the table's recipe in training.
        evaluation: Recipe fields that differ in evaluation only.
        trained_as: Name of the entry whose trained model is evaluated; empty if the entry has its own training.
        recipe: Name of the recipe of a rival; empty for the recipe of the table.
        metrics: Metrics to show beside those with published numbers, as fields of
            `recontrast.evaluation.results.Row`.
        settings: Recipe fields that differ from the table's recipe unless a call changes them.
    """

    name: str
    numbers: Mapping[str, Numbers]
    changes: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    trained_as: str = ""
    recipe: str = ""
    metrics: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """One table of the paper.

    Attributes:
        title: Title with the data set and the number of the table.
        recipe: Name of the recipe that its entries change.
        entries: Configurations that are trained and evaluated.
        categories: Categories that the published means are over; empty for a data set of one category.
        unified: Whether one detector is trained for all categories.
        note: Remark for the reader of the comparison.
    """

    title: str
    recipe: str
    entries: tuple[Entry, ...]
    categories: tuple[str, ...] = ()
    unified: bool = False
    note: str = ""

    def entry(self, name: str) -> Entry:
        """Return the entry called ``name``."""
        return next(entry for entry in self.entries if entry.name == name)


_MVTEC = tuple(name for name in numbers.MVTEC if name != "mean")
_VISA = tuple(name for name in numbers.VISA if name != "mean")


def _entries_with_mean(numbers: Mapping[str, Numbers], changes: Mapping[str, Mapping[str, Any]]) -> tuple[Entry, ...]:
    """Return one entry for each configuration in ``changes``; only its mean over categories is published."""
    return tuple(Entry(name.replace("/", "-"), {"mean": numbers[name]}, fields) for name, fields in changes.items())


def _entries_by_views(numbers: Mapping[str, Numbers]) -> tuple[Entry, ...]:
    """Return one entry for each choice of views; all evaluate the same trained model."""
    return tuple(Entry(v, {"mean": n}, evaluation={"views": v}, trained_as="both") for v, n in numbers.items())


def _single_entry(numbers: Numbers) -> tuple[Entry, ...]:
    """Return the only entry of a table, of which the mean over categories is published."""
    return (Entry("ours", {"mean": numbers}),)


def _rival_entry(method: str, data: str) -> Entry:
    """Return the entry of a rival on a data set, of which the mean over categories is published."""
    return Entry(method, {"mean": numbers.RIVALS[f"{method}/{data}"]}, recipe=f"{method}_{data}")


_RIVALS_NOTE = "patchcore, padim and uniad run with their own recipes, and their AUPRO is that of the whole data set"
_ALPHAS = {name: {"alpha_end": float(name)} for name in numbers.ALPHA}
_BACKBONES = {
    f"{name}/{method}": {"backbone": f"{name}.tv_in1k", **fields}
    for name in BACKBONES
    for method, fields in (("RD4AD", RD4AD), ("ours", {}))
}

TABLES: dict[str, Table] = {
    "mvtec": Table(
        "MVTec AD, one detector per category", "mvtec",
        (Entry("ours", numbers.MVTEC), _rival_entry("patchcore", "mvtec"), _rival_entry("padim", "mvtec")), _MVTEC,
        note=_RIVALS_NOTE,
    ),
    "visa": Table(
        "VisA, one detector per category", "visa",
        (Entry("ours", numbers.VISA), _rival_entry("patchcore", "visa")), _VISA, note=_RIVALS_NOTE,
    ),
    "aptos": Table("APTOS 2019 (Table 5)", "aptos", _single_entry(numbers.MEDICAL["aptos"])),
    "oct2017": Table("OCT2017 (Table 5)", "oct2017", _single_entry(numbers.MEDICAL["oct2017"])),
    "isic2018": Table("ISIC 2018 Task 3 (Table 5)", "isic2018", _single_entry(numbers.MEDICAL["isic2018"])),
    "mvtec_stable": Table(
        "MVTec AD, stable training (appendix E)", "mvtec_stable", _single_entry(numbers.STABLE["mvtec"]), _MVTEC
    ),
    "visa_stable": Table(
        "VisA, stable training (appendix E)", "visa_stable", _single_entry(numbers.STABLE["visa"]), _VISA
    ),
    "mvtec_unified": Table(
        "MVTec AD, one detector for all categories",
        "mvtec_unified",
        (*_single_entry(numbers.UNIFIED["mvtec"]), _rival_entry("uniad", "mvtec"),
         _rival_entry("dinomaly", "mvtec"), _rival_entry("inp_former", "mvtec")),
        _MVTEC,
        unified=True,
        note="the published numbers are Dinomaly's, ours for the public code; Table 4 of the paper gives I-AUROC 98.2, "
        "and 96.5 for UniAD",
    ),
    "visa_unified": Table(
        "VisA, one detector for all categories",
        "visa_unified",
        (*_single_entry(numbers.UNIFIED["visa"]), _rival_entry("uniad", "visa"),
         _rival_entry("dinomaly", "visa"), _rival_entry("inp_former", "visa")),
        _VISA,
        unified=True,
        note="the published numbers are Dinomaly's, ours for the public code; Table 4 of the paper gives I-AUROC 95.1, "
        "and 91.5 for UniAD",
    ),
    "ablation": Table(
        "Ablation on MVTec AD (Table 6)", "mvtec", _entries_with_mean(numbers.ABLATION, ABLATION), _MVTEC
    ),
    "ablation_aptos": Table(
        "Ablation on APTOS 2019 (Table 6)", "aptos", _entries_with_mean(numbers.ABLATION_APTOS, ABLATION)
    ),
    "alpha": Table("Alpha on MVTec AD (Table A4)", "mvtec", _entries_with_mean(numbers.ALPHA, _ALPHAS), _MVTEC),
    "maps": Table("Pairs of the anomaly map on MVTec AD (Table A6)", "mvtec", _entries_by_views(numbers.MAPS), _MVTEC),
    "maps_aptos": Table(
        "Pairs of the anomaly map on APTOS 2019 (Table A6)", "aptos", _entries_by_views(numbers.MAPS_APTOS)
    ),
    "backbones": Table(
        "Backbones on MVTec AD (Table A5)",
        "mvtec",
        _entries_with_mean(numbers.BACKBONES, _BACKBONES),
        _MVTEC,
        note="the published RD4AD was trained as in its own paper; here it is trained like our model (B of Table 6)",
    ),
}  # fmt: skip
