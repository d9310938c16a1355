"""The paper's tables, run again: one call goes through entries, categories and seeds, and the next one goes on.

Below the folder of a table stands ``ENTRY/CATEGORY/seed-N`` with recipe, log and results of one run. A run whose
results are there is passed over, one whose checkpoint is there is resumed.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recontrast.data import datasets
from recontrast.data.datasets import Sample
from recontrast.evaluation.evaluate import evaluate
from recontrast.evaluation.results import Result, Row
from recontrast.experiments.comparison import Comparison, Line
from recontrast.experiments.paper_tables import TABLES, Entry, Table
from recontrast.recipes import yaml_file
from recontrast.recipes.paper import RECIPES
from recontrast.recipes.recipe import Recipe, list_differences
from recontrast.runtime import distributed
from recontrast.runtime.distributed import World
from recontrast.training.state import FREE_ON_RESUME
from recontrast.training.train import train

ALL = "all"  # instead of a category, where one detector is for all of them
Groups = dict[str, list[Sample]]
OnStep = Callable[[str, int, int, str], None]  # what runs, steps or images done, of how many, how it goes


@dataclass(frozen=True)
class ExperimentRun:
    """One training, and the entries whose results come from it."""

    name: str  # of the entry that it belongs to
    category: str
    groups: Groups
    recipe: Recipe
    entries: tuple[Entry, ...]

    def folder(self, out: Path, entry: str) -> Path:
        """Where the results of ``entry`` stand."""
        return out / entry / self.category / f"seed-{self.recipe.seed}"


def reproduce(
    name: str,
    data: str | Path,
    out: str | Path,
    *,
    seeds: Sequence[int] = (),
    categories: Sequence[str] = (),
    entries: Sequence[str] = (),
    changes: Mapping[str, Any] | None = None,
    device: str | None = None,
    cache_dir: str | Path | None = None,
    keep: bool = False,
    on_step: OnStep | None = None,
) -> Comparison:
    """Make the runs of a table that are not there yet, and put ours beside the paper's.

    Under torchrun all processes make each run together, and the first one writes.

    Args:
        name: one of `recontrast.experiments.paper_tables.TABLES`.
        data: root of the data set in MVTec AD layout, or the folder of one category.
        out: folder of all runs of this table.
        seeds: by default the recipe's own.
        categories: by default all that ``data`` holds.
        entries: lines of the table; by default all.
        changes: recipe fields for every run, such as ``backbone``, ``weights`` or ``steps``.
        device: as in `train`.
        cache_dir: as in `train`.
        keep: leave the checkpoints of finished runs, a gigabyte and more each.
        on_step: called as runs go on.

    Returns:
        The comparison, also written to ``out`` as JSON, CSV and Markdown.

    Raises:
        ValueError: no such table, entry or category; data without test images; a folder with runs of another recipe.
    """
    if name not in TABLES:
        raise ValueError(f"reproduce: table: wanted one of {', '.join(TABLES)}, got {name!r}")
    table, out, changes = TABLES[name], Path(out), dict(changes or {})
    names = [entry.name for entry in table.entries]
    if unknown := [entry for entry in entries if entry not in names]:
        raise ValueError(f"reproduce: entry: wanted one of {', '.join(names)}, got {unknown[0]!r}")
    groups = datasets.load(data, list(categories) or None)
    for category, samples in groups.items():
        if not any(sample.split == "test" for sample in samples):
            raise ValueError(f"{data}: wanted test images of {category}, got none")
    if not table.categories and len(groups) > 1:
        raise ValueError(f"{data}: wanted one category for {name}, got {len(groups)}: {', '.join(groups)}")
    seeds = list(seeds) or [RECIPES[table.recipe].seed]
    rows: dict[str, dict[int, list[Row]]] = {entry: {} for entry in entries or names}
    runs = _runs(table, list(rows), groups, seeds, changes)
    with distributed.join_processes(device) as (place, where):
        for run in runs:
            results = _make(run, out, place, where, cache_dir, keep, on_step or (lambda *_: None))
            for entry, result in results.items():
                rows[entry].setdefault(run.recipe.seed, []).extend(result)
        lines = [line for entry in rows for line in _lines(table, table.entry(entry), rows[entry])]
        comparison = Comparison(name, table.title, lines, _notes(table, list(groups), seeds, changes))
        if place.first:
            comparison.write(out)
    return comparison


def _runs(
    table: Table, entries: Sequence[str], groups: Groups, seeds: Sequence[int], changes: Mapping[str, Any]
) -> list[ExperimentRun]:
    """All trainings, entry by entry; every recipe is checked before the first begins."""
    found = []
    by_training: dict[str, list[Entry]] = {}
    for entry in map(table.entry, entries):
        by_training.setdefault(entry.trained_as or entry.name, []).append(entry)
    for name, several in by_training.items():
        training = dict(several[0].changes)
        if clash := {"seed", *training, *(key for entry in several for key in entry.evaluation)} & set(changes):
            raise ValueError(f"reproduce: wanted changes of fields that the table leaves alone, got {min(clash)}")
        recipe = RECIPES[table.recipe].replace(**training, **changes)
        for seed in seeds:
            units = {ALL: groups} if table.unified else {category: {category: groups[category]} for category in groups}
            for category, some in units.items():
                found.append(ExperimentRun(name, category, some, recipe.replace(seed=seed), tuple(several)))
    return found


def _make(
    run: ExperimentRun,
    out: Path,
    place: World,
    device: torch.device,
    cache_dir: str | Path | None,
    keep: bool,
    on_step: OnStep,
) -> dict[str, list[Row]]:
    """Rows of each entry of a run, made or found; under torchrun all look before the first of them writes."""
    recipes = {entry.name: run.recipe.replace(**entry.evaluation) for entry in run.entries}
    found = {entry: _finished(run.folder(out, entry), recipe, run.groups) for entry, recipe in recipes.items()}
    rows = {entry: some for entry, some in found.items() if some is not None}
    if len(rows) == len(recipes):
        return rows
    here, title = run.folder(out, run.name), f"{run.name} {run.category} seed {run.recipe.seed}"
    target, total = here / "checkpoint.pt", run.recipe.steps
    samples = [sample for group in run.groups.values() for sample in group]
    trained = train(
        run.recipe, samples, category=run.category, out=here, device=device, cache_dir=cache_dir,
        resume=target if target.exists() else None,
        on_log=lambda step, loss, rate, _: on_step(f"train {title}", step, total, f"loss {loss:.4f}, {rate:.1f}/s"),
    )  # fmt: skip
    for entry, recipe in recipes.items():
        if entry not in rows:
            result = evaluate(
                trained.model, samples, recipe, cache_dir=cache_dir,
                on_progress=lambda category, done, count: on_step(f"evaluate {title}", done, count, category),
            )  # fmt: skip
            rows[entry] = result.rows
            if place.first:
                _write(run.folder(out, entry), recipe, result)
    if place.first and not keep:
        target.unlink(missing_ok=True)
    return rows


def _write(folder: Path, recipe: Recipe, result: Result) -> None:
    """Recipe first: results without one count as of another recipe."""
    yaml_file.write_recipe(folder / yaml_file.FILE_NAME, recipe)
    result.write(folder)


def _finished(folder: Path, recipe: Recipe, groups: Groups) -> list[Row] | None:
    """Rows of the results in ``folder``; None where there are none; refused where they are of something else."""
    path, written = folder / "results.json", folder / yaml_file.FILE_NAME
    if written.exists() and (differ := list_differences(yaml_file.read_recipe(written), recipe, ignore=FREE_ON_RESUME)):
        raise ValueError(
            f"{written}: wanted the recipe of this call, got another ({'; '.join(differ)}); name another --out"
        )
    if not path.exists():
        return None
    try:
        rows = [Row(**row) for row in json.loads(path.read_text())["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: wanted the results of a run, got something else") from error
    wanted = {name: sum(sample.split == "test" for sample in group) for name, group in groups.items()}
    if (got := {row.category: row.images for row in rows}) != wanted:
        raise ValueError(f"{path}: wanted results of the test images of this call {wanted}, got {got}")
    return rows


def _lines(table: Table, entry: Entry, by_seed: Mapping[int, Sequence[Row]]) -> Iterator[Line]:
    """Every category, then their mean, with every metric that the paper gives for the table."""
    metrics = list(dict.fromkeys(metric for numbers in entry.numbers.values() for metric in numbers))
    categories = list(dict.fromkeys(row.category for rows in by_seed.values() for row in rows))
    names = [*categories, "mean"]
    if len(categories) == 1:  # is its own mean
        names = categories if categories[0] in entry.numbers else ["mean"]
    for category in names:
        for metric in metrics:
            values = []
            for rows in by_seed.values():
                wanted = [getattr(row, metric) for row in rows if category in ("mean", row.category)]
                some = [value for value in wanted if value is not None]
                if 0 < len(some) == len(wanted):
                    values.append(math.fsum(some) / len(some))
            paper = _published(table, entry, category, categories).get(metric)
            ours = statistics.fmean(values) if values else None
            spread = statistics.stdev(values) if len(values) > 1 else None
            yield Line(entry.name, category, metric, len(values), ours, spread, paper)


def _published(table: Table, entry: Entry, category: str, categories: Sequence[str]) -> Mapping[str, float]:
    """What the paper gives for a category, or for the mean of just these."""
    if category != "mean":
        return entry.numbers.get(category, {})
    if not table.categories or set(categories) == set(table.categories):
        return entry.numbers["mean"]
    some = [entry.numbers.get(name) for name in categories]
    if None in some:
        return {}
    return {key: math.fsum(n[key] for n in some if n) / len(some) for key in entry.numbers["mean"]}


def _notes(table: Table, categories: Sequence[str], seeds: Sequence[int], changes: Mapping[str, Any]) -> list[str]:
    """What a reader must know to compare."""
    notes = [f"Recipe {table.recipe}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}."]
    if changes:
        changed = ", ".join(f"{key} {value}" for key, value in changes.items())
        notes.append(f"Not the paper's settings: {changed}.")
    if table.categories and set(categories) != set(table.categories):
        same = len(set(categories) & set(table.categories))
        notes.append(f"Of {len(categories)} categories, {same} are among the paper's {len(table.categories)}; "
                     "its mean is that of the same ones, where each is published.")  # fmt: skip
    return [*notes, *([f"{table.note[0].upper()}{table.note[1:]}."] if table.note else [])]
