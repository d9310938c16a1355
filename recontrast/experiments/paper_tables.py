"""The paper's tables as runs to make: recipes, what each line changes, and the numbers to compare with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recontrast.experiments import published_numbers as numbers
from recontrast.experiments.published_numbers import Numbers

RD4AD = {"train_encoder": False, "pairs": "self", "mining": False}  # one frozen encoder, three pairs, no heads
ALONE = {"pairs": "self", "mining": False}  # one encoder, trained, three pairs of its own features

# Table 6 by its columns: global loss, trained encoder, stop-gradient, contrastive pairs, hard mining. A frozen target
# has no gradient to stop, and where the encoder is frozen it has only itself to rebuild. The paper does not say whether
# the decoder of C and D has heads; here it has none, as RD4AD's, which Table A5 counts without. Nor does it say what
# mining means in B+hm, where without heads a level's features also carry the gradient of the finer ones, and the hook
# of the reference's loss would drop from that too; here mining weights the gradient of the loss, as its formula has it.
ABLATION: dict[str, dict[str, Any]] = {
    "A": {**RD4AD, "loss": "point"},  # RD4AD as its paper has it
    "B": RD4AD,  # RD4AD as its code has it: the global loss
    "B+hm": {**RD4AD, "mining": True},
    "C": {**ALONE, "stop_gradient": False},  # the encoder is trained from both ends
    "D": ALONE,
    "C+cp": {"mining": False, "stop_gradient": False},  # ours, no stop-gradient and no mining
    "E-gl": {"mining": False, "loss": "point"},  # ours with the point loss
    "E": {"mining": False},  # ours, no hard mining
    "ours": {},
}
BACKBONES = ("resnet18", "resnet50", "wide_resnet50_2")


@dataclass(frozen=True)
class Entry:
    """One line of a table."""

    name: str  # of its folder
    numbers: Mapping[str, Numbers]  # by category, and "mean"
    changes: Mapping[str, Any] = field(default_factory=dict)  # recipe fields of the training
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # recipe fields of the evaluation alone
    trained_as: str = ""  # the entry whose training it shares; its own by default


@dataclass(frozen=True)
class Table:
    """What is run and what it is compared with."""

    title: str
    recipe: str
    entries: tuple[Entry, ...]
    categories: tuple[str, ...] = ()  # that the published means are over; none: whatever the one category is named
    unified: bool = False  # one detector for all categories
    note: str = ""

    def entry(self, name: str) -> Entry:
        """The entry of that name."""
        return next(entry for entry in self.entries if entry.name == name)


_MVTEC = tuple(name for name in numbers.MVTEC if name != "mean")
_VISA = tuple(name for name in numbers.VISA if name != "mean")


def _means(numbers: Mapping[str, Numbers], changes: Mapping[str, Mapping[str, Any]]) -> tuple[Entry, ...]:
    """An entry for each line of ``numbers``, of which the mean alone is published."""
    return tuple(Entry(name.replace("/", "-"), {"mean": numbers[name]}, more) for name, more in changes.items())


def _maps(numbers: Mapping[str, Numbers]) -> tuple[Entry, ...]:
    """One training, evaluated with each group of pairs."""
    return tuple(Entry(v, {"mean": n}, evaluation={"views": v}, trained_as="both") for v, n in numbers.items())


def _one(numbers: Numbers) -> tuple[Entry, ...]:
    return (Entry("ours", {"mean": numbers}),)


_ALPHAS = {name: {"alpha_end": float(name)} for name in numbers.ALPHA}
_BACKBONES = {
    f"{name}/{kind}": {"backbone": f"{name}.tv_in1k", **more}
    for name in BACKBONES
    for kind, more in (("RD4AD", RD4AD), ("ours", {}))
}

TABLES: dict[str, Table] = {
    "mvtec": Table("MVTec AD, one detector a category", "mvtec", (Entry("ours", numbers.MVTEC),), _MVTEC),
    "visa": Table("VisA, one detector a category", "visa", (Entry("ours", numbers.VISA),), _VISA),
    "aptos": Table("APTOS 2019 (Table 5)", "aptos", _one(numbers.MEDICAL["aptos"])),
    "oct2017": Table("OCT2017 (Table 5)", "oct2017", _one(numbers.MEDICAL["oct2017"])),
    "isic2018": Table("ISIC 2018 Task 3 (Table 5)", "isic2018", _one(numbers.MEDICAL["isic2018"])),
    "mvtec_stable": Table(
        "MVTec AD, stable training (appendix E)", "mvtec_stable", _one(numbers.STABLE["mvtec"]), _MVTEC
    ),
    "visa_stable": Table("VisA, stable training (appendix E)", "visa_stable", _one(numbers.STABLE["visa"]), _VISA),
    "mvtec_unified": Table(
        "MVTec AD, one detector for all", "mvtec_unified", _one(numbers.UNIFIED["mvtec"]), _MVTEC, unified=True,
        note="published by Dinomaly, for the code as it is; the paper's Table 4 has I-AUROC 98.2",
    ),
    "visa_unified": Table(
        "VisA, one detector for all", "visa_unified", _one(numbers.UNIFIED["visa"]), _VISA, unified=True,
        note="published by Dinomaly, for the code as it is; the paper's Table 4 has I-AUROC 95.1",
    ),
    "ablation": Table("Ablation on MVTec AD (Table 6)", "mvtec", _means(numbers.ABLATION, ABLATION), _MVTEC),
    "ablation_aptos": Table("Ablation on APTOS 2019 (Table 6)", "aptos", _means(numbers.ABLATION_APTOS, ABLATION)),
    "alpha": Table("Alpha on MVTec AD (Table A4)", "mvtec", _means(numbers.ALPHA, _ALPHAS), _MVTEC),
    "maps": Table("Pairs of the anomaly map on MVTec AD (Table A6)", "mvtec", _maps(numbers.MAPS), _MVTEC),
    "maps_aptos": Table("Pairs of the anomaly map on APTOS 2019 (Table A6)", "aptos", _maps(numbers.MAPS_APTOS)),
    "backbones": Table(
        "Backbones on MVTec AD (Table A5)", "mvtec", _means(numbers.BACKBONES, _BACKBONES), _MVTEC,
        note="RD4AD was published as its own paper trained it; here it is trained as ours is (B of Table 6)",
    ),
}  # fmt: skip
