"""Variants of a table's entries: other values of recipe fields, such as numbers of shots, and long-tailed data sets."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from recontrast.architectures import ARCHITECTURES
from recontrast.data.datasets import Sample
from recontrast.experiments.paper_tables import Entry, Table
from recontrast.recipes.validation import is_own_name
from recontrast.registration import import_architecture
from recontrast.training.shots import count_long_tail


def vary_table(table: Table, names: Sequence[str], vary: Mapping[str, Sequence[Any]]) -> Table:
    """Replace entries of a table by one variant of each for every combination of values.

    The published numbers are not those of the variants, and are left out.

    Args:
        table: Table of the paper.
        names: Names of the entries to keep; empty keeps all.
        vary: Values by recipe field, such as ``{"shots": [1, 2, 4], "augment": ["none", "rotations"]}``; empty changes
            nothing.

    Returns:
        The table with these entries, named ``ENTRY-FIELD=VALUE-...``.

    Raises:
        ValueError: If an entry does not exist, a field has no value or the same value twice, or the table sets it
            itself.
    """
    known = [entry.name for entry in table.entries]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"reproduce: entry: wanted one of {', '.join(known)}, got {unknown[0]!r}")
    entries = [entry for entry in table.entries if not names or entry.name in names]
    for field, values in vary.items():
        if not values or len(set(map(str, values))) < len(values):
            raise ValueError(f"reproduce: {field}: wanted different values to vary, got {list(values)!r}")
        if field == "seed" or any(field in (*entry.changes, *entry.evaluation) for entry in entries):
            raise ValueError(f"reproduce: vary: wanted a field that the table does not set, got {field!r}")
    if not vary:
        return replace(table, entries=tuple(entries))
    combinations = [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
    return replace(table, entries=tuple(_make_variant(entry, combination) for entry in entries
                                        for combination in combinations))  # fmt: skip


def add_architectures(table: Table, names: Sequence[str]) -> Table:
    """Add an entry for each architecture of a user, which has no published numbers.

    Args:
        table: Table of the paper.
        names: Names such as "MODULE:NAME"; their modules are imported.

    Returns:
        The table with these entries, named ``MODULE.NAME``. Each has the recipe of the table with the settings of the
        architecture.

    Raises:
        ValueError: If a module cannot be imported, or a name is not that of an architecture in it.
    """
    first = table.entries[0].numbers.values()
    metrics = tuple(dict.fromkeys(metric for numbers in first for metric in numbers))
    added = []
    for name in dict.fromkeys(names):
        if not is_own_name(name):
            raise ValueError(f"--architecture: wanted one of your own as MODULE:NAME, got {name!r}")
        settings = ARCHITECTURES[import_architecture(name)].settings
        changes = {"architecture": name}
        added.append(Entry(name.replace(":", "."), {}, changes, metrics=metrics, settings=settings))
    return replace(table, entries=(*table.entries, *added))


def _make_variant(entry: Entry, changes: Mapping[str, Any]) -> Entry:
    """Return an entry with other values, and without published numbers."""
    suffix = "".join(f"-{field}={value}" for field, value in changes.items()).replace("/", "-")  # names a folder
    return replace(
        entry, name=entry.name + suffix, changes={**entry.changes, **changes}, numbers={},
        metrics=tuple(dict.fromkeys([*(m for numbers in entry.numbers.values() for m in numbers), *entry.metrics])),
        trained_as=entry.trained_as + suffix if entry.trained_as else "",
    )  # fmt: skip


def count_shots(groups: Mapping[str, Sequence[Sample]], imbalance: float) -> dict[str, int]:
    """Return the field ``shots`` that gives a data set a long tail, see `recontrast.training.shots.count_long_tail`.

    Args:
        groups: Samples by category.
        imbalance: Number of images of the largest class over that of the smallest.

    Returns:
        Number of good training images of each class.

    Raises:
        ValueError: If there are fewer than two classes, or the imbalance is below 1.
    """
    good = {name: sum(s.split == "train" and not s.label for s in group) for name, group in groups.items()}
    return count_long_tail(good, imbalance)
