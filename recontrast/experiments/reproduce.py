"""Reproduction of the paper's tables: train and evaluate every entry, category and seed, and compare the results.

The folder of a table has one folder ``ENTRY/CATEGORY/seed-N`` for each run, with its recipe, log and results. A second
call continues an interrupted one: it skips runs with results, and resumes runs with a checkpoint.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recontrast.data import datasets
from recontrast.data.datasets import Sample
from recontrast.data.json_text import parse_json
from recontrast.data.locks import lock_folder
from recontrast.data.own_files import check_replaceable
from recontrast.data.regular_file import read_bytes
from recontrast.data.temporary import complete_commits, sweep
from recontrast.evaluation.evaluate import evaluate
from recontrast.evaluation.results import FILES as RESULT_FILES
from recontrast.evaluation.results import Result, Row, parse_row
from recontrast.experiments.comparison import FILES as COMPARISON_FILES
from recontrast.experiments.comparison import Comparison, Line
from recontrast.experiments.paper_tables import TABLES, Entry, Table
from recontrast.experiments.variants import add_architectures, count_shots, vary_table
from recontrast.models.weights import check_source
from recontrast.recipes import yaml_file
from recontrast.recipes.paper import RECIPES
from recontrast.recipes.recipe import Recipe, list_differences
from recontrast.recipes.validation import ARCHITECTURE_FIELDS, SHARED_FIELDS, is_own_name
from recontrast.runtime import distributed
from recontrast.runtime.distributed import World
from recontrast.training.run_files import CHECKPOINT, LOG
from recontrast.training.shots import select_shots
from recontrast.training.state import FREE_ON_RESUME
from recontrast.training.train import train

ALL = "all"  # category of a run that trains one detector for all categories
Groups = dict[str, list[Sample]]
OnStep = Callable[[str, int, int, str], None]  # activity, steps or images done, their total, status


@dataclass(frozen=True)
class ExperimentRun:
    """One training, and the entries that are evaluated with its model.

    Attributes:
        name: Name of the entry that the training belongs to.
        category: Name of the category, or `ALL`.
        groups: Samples by category.
        recipe: Recipe of the training.
        entries: Entries that are evaluated.
    """

    name: str
    category: str
    groups: Groups
    recipe: Recipe
    entries: tuple[Entry, ...]

    @property
    def names(self) -> list[str]:
        """Names of the training, whose folder holds the checkpoint, and of all entries."""
        return list(dict.fromkeys([self.name, *(entry.name for entry in self.entries)]))

    def folder(self, out: Path, entry: str) -> Path:
        """Return the folder of the results.

        Args:
            out: Folder of the table.
            entry: Name of the entry that was evaluated.

        Returns:
            Folder of this run and entry.
        """
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
    architectures: Sequence[str] = (),
    vary: Mapping[str, Sequence[Any]] | None = None,
    long_tail: float | None = None,
    device: str | None = None,
    cache_dir: str | Path | None = None,
    keep: bool = False,
    overwrite: bool = False,
    on_step: OnStep | None = None,
) -> Comparison:
    """Train and evaluate the missing runs of a table, and compare all results with the paper.

    Under torchrun, all processes share every run, and the first one writes the files.

    Args:
        name: Name of the table, a key of `recontrast.experiments.paper_tables.TABLES`.
        data: Root of the data set in MVTec AD layout, or the folder of one category.
        out: Folder of all runs of the table.
        seeds: Seeds of the runs; by default the seed of the recipe.
        categories: Names of the categories; by default all in ``data``.
        entries: Names of the entries; by default all.
        changes: Recipe fields to change in every run, such as ``backbone``, ``weights`` or ``steps``.
        architectures: Names "MODULE:NAME" of your own architectures, which are imported. Each makes an entry called
            ``MODULE.NAME``, with the recipe of the table and the settings of the architecture.
        vary: Values by recipe field. Every entry is run with every combination of them, as an entry of its own:
            ``{"shots": [1, 2, 4], "augment": ["none", "rotations"]}`` makes the tables of few-shot detection.
        long_tail: Number of good training images of the largest class over that of the smallest one; the images of
            each class are drawn by the seed, see `recontrast.training.shots.count_long_tail`. None uses all images.
        device: Device, see `recontrast.training.train.train`.
        cache_dir: Folder for decoded images, see `recontrast.training.train.train`.
        keep: Whether to keep the checkpoints of finished runs, of a gigabyte or more each.
        overwrite: Whether files in ``out`` and its folders that this package did not write may be replaced.
        on_step: Function called with the activity, the steps or images done, their total, and the status.

    Returns:
        The comparison. It is also written to ``out`` as JSON, CSV and Markdown.

    Raises:
        ValueError: If there is no such table, entry or category, a category has no test images, a change concerns a
            field that the table sets itself, or ``out`` holds runs of another recipe or files of others in the way.
    """
    if name not in TABLES:
        raise ValueError(f"reproduce: table: wanted one of {', '.join(TABLES)}, got {name!r}")
    table = vary_table(add_architectures(TABLES[name], architectures), entries, vary or {})
    out, changes = Path(out), dict(changes or {})
    given = [*changes, *(vary or ()), *(() if long_tail is None else ("shots",))]
    if clash := {name for name in given if given.count(name) > 1}:
        raise ValueError(f"reproduce: wanted one way to set {min(clash)}, got two")
    groups = datasets.load(data, list(categories) or None)
    for category, samples in groups.items():
        if not any(sample.split == "test" for sample in samples):
            raise ValueError(f"{data}: wanted test images of {category}, got none")
    if not table.categories and len(groups) > 1:
        raise ValueError(f"{data}: wanted one category for {name}, got {len(groups)}: {', '.join(groups)}")
    seeds = list(seeds) or [RECIPES[table.recipe].seed]
    if long_tail is not None:
        changes["shots"] = count_shots(groups, long_tail)
    rows: dict[str, dict[int, list[Row]]] = {entry.name: {} for entry in table.entries}
    runs = _plan_runs(table, list(rows), groups, seeds, changes)
    for run in runs:
        check_source(run.recipe.backbone, run.recipe.weights)
        select_shots([sample for group in run.groups.values() for sample in group], run.recipe.shots, run.recipe.seed)
    _check_files(runs, out, overwrite)
    with ExitStack() as stack:
        world, resolved_device = stack.enter_context(distributed.join_processes(device))
        if world.first:
            stack.enter_context(lock_folder(out))
            for folder in {run.folder(out, name) for run in runs for name in run.names}:
                sweep(folder)  # of a killed call; `lock_folder` does so for ``out``
        distributed.broadcast_from_first(world, None)  # the others wait before they read these folders
        for run in runs:
            results = _complete_run(run, out, world, resolved_device, cache_dir, keep, on_step or (lambda *_: None))
            for entry, entry_rows in results.items():
                rows[entry].setdefault(run.recipe.seed, []).extend(entry_rows)
        lines = [line for entry in rows for line in _compare_entry(table, table.entry(entry), rows[entry])]
        comparison = Comparison(name, table.title, lines, _write_notes(table, list(groups), seeds, changes))
        if world.first:
            comparison.write(out, overwrite=True)  # checked before
    return comparison


def _plan_runs(
    table: Table, entries: Sequence[str], groups: Groups, seeds: Sequence[int], changes: Mapping[str, Any]
) -> list[ExperimentRun]:
    """List all trainings, entry by entry, so that every recipe is checked before the first training starts."""
    runs = []
    by_training: dict[str, list[Entry]] = {}
    for entry in map(table.entry, entries):
        by_training.setdefault(entry.trained_as or entry.name, []).append(entry)
    for name, evaluated in by_training.items():
        training = dict(evaluated[0].changes)
        if clash := {"seed", *training, *(key for entry in evaluated for key in entry.evaluation)} & set(changes):
            raise ValueError(f"reproduce: wanted changes of fields that the table does not set, got {min(clash)}")
        recipe = _build_recipe(table, evaluated[0], changes)
        units = {ALL: groups} if table.unified else {category: {category: groups[category]} for category in groups}
        for seed in seeds:
            for category, unit in units.items():
                runs.append(ExperimentRun(name, category, unit, recipe.replace(seed=seed), tuple(evaluated)))
    return runs


def _build_recipe(table: Table, entry: Entry, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe of an entry. Changes of fields that another architecture lacks do not concern it."""
    base = RECIPES[entry.recipe or table.recipe]
    if is_own_name(entry.changes.get("architecture")):
        base = base.replace(**{**entry.settings, "architecture": entry.changes["architecture"]})
    elif not entry.recipe:
        return base.replace(**entry.changes, **changes)
    own = ARCHITECTURE_FIELDS[base.architecture]
    others = SHARED_FIELDS - set(own)
    adapted: dict[str, Any] = {}
    if base.crop is not None and "size" in changes:  # the crop belongs to the size of the recipe
        adapted["crop"] = None
    if "gaussian_features" in own and "backbone" in changes:  # as many as the paper draws of the smaller ResNet-18
        adapted["gaussian_features"] = 100
    concerned = {name: value for name, value in changes.items() if name not in others}
    return base.replace(**adapted | dict(entry.changes) | concerned)


def _check_files(runs: Sequence[ExperimentRun], out: Path, overwrite: bool) -> None:
    """Check that no file of others would be replaced, before the first training starts."""
    check_replaceable(out, COMPARISON_FILES, overwrite=overwrite)
    names = [CHECKPOINT, LOG, yaml_file.FILE_NAME, *RESULT_FILES]
    for run in runs:
        for name in run.names:
            check_replaceable(run.folder(out, name), names, overwrite=overwrite)


def _complete_run(
    run: ExperimentRun,
    out: Path,
    world: World,
    device: torch.device,
    cache_dir: str | Path | None,
    keep: bool,
    on_step: OnStep,
) -> dict[str, list[Row]]:
    """Return the rows of each entry of a run; train and evaluate if results are missing.

    Every process reads the existing results before the first one writes new ones.
    """
    recipes = {entry.name: run.recipe.replace(**entry.evaluation) for entry in run.entries}
    rows: dict[str, list[Row]] = {}
    for entry, recipe in recipes.items():
        if (finished := _read_rows(run.folder(out, entry), recipe, run.groups)) is not None:
            rows[entry] = finished
    if len(rows) == len(recipes):
        return rows
    folder, title = run.folder(out, run.name), f"{run.name} {run.category} seed {run.recipe.seed}"
    target, total = folder / CHECKPOINT, run.recipe.steps
    samples = [sample for group in run.groups.values() for sample in group]
    trained = train(
        run.recipe, samples, category=run.category, out=folder, device=device, cache_dir=cache_dir,
        resume=target if target.exists() else None,
        on_log=lambda step, loss, rate, _: on_step(
            f"train {title}", step, max(step, total),
            f"{rate:.1f}/s" if math.isnan(loss) else f"loss {loss:.4f}, {rate:.1f}/s"),
    )  # fmt: skip
    for entry, recipe in sorted(recipes.items(), key=lambda item: item[0] == run.name):  # beside the checkpoint: last
        if entry not in rows:
            result = evaluate(
                trained.model, samples, recipe.replace(bits=trained.recipe.bits, window=trained.recipe.window),
                cache_dir=cache_dir,
                on_progress=lambda category, done, count: on_step(f"evaluate {title}", done, count, category),
            )  # fmt: skip
            rows[entry] = result.rows
            if world.first:
                remove = [CHECKPOINT] if entry == run.name and not keep else []
                _write_results(run.folder(out, entry), recipe, result, remove)
    if world.first and not keep:
        target.unlink(missing_ok=True)
    return rows


def _write_results(folder: Path, recipe: Recipe, result: Result, remove: Sequence[str]) -> None:
    """Write the recipe, then the results, so that there are never results without their recipe.

    Files to remove, such as the checkpoint, go at the same moment in which the results appear.
    """
    yaml_file.write_recipe(folder / yaml_file.FILE_NAME, recipe)
    result.write(folder, remove, overwrite=True)  # checked before the first training


def _read_rows(folder: Path, recipe: Recipe, groups: Groups) -> list[Row] | None:
    """Read the rows in ``folder``, None if there are none; raise an error if they are of another recipe or data set."""
    path, written = folder / "results.json", folder / yaml_file.FILE_NAME
    complete_commits(folder)
    if written.exists() and (differ := list_differences(yaml_file.read_recipe(written), recipe, ignore=FREE_ON_RESUME)):
        raise ValueError(
            f"{written}: wanted the recipe of this call, got another ({'; '.join(differ)}): choose another --out"
        )
    if not path.exists():
        return None
    try:
        rows = [parse_row(row) for row in parse_json(read_bytes(path, "the results of a run"))["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: wanted the results of a run, got something else") from error
    wanted = {name: sum(sample.split == "test" for sample in group) for name, group in groups.items()}
    if (got := {row.category: row.images for row in rows}) != wanted:
        raise ValueError(f"{path}: wanted results of the test images of this call {wanted}, got {got}")
    return rows


def _compare_entry(table: Table, entry: Entry, by_seed: Mapping[int, Sequence[Row]]) -> Iterator[Line]:
    """Compare every category, then the mean, by every metric that is published for the entry."""
    metrics = list(dict.fromkeys([*(m for numbers in entry.numbers.values() for m in numbers), *entry.metrics]))
    categories = list(dict.fromkeys(row.category for rows in by_seed.values() for row in rows))
    names = [*categories, "mean"]
    if len(categories) == 1:  # the category and the mean are the same
        names = categories if categories[0] in entry.numbers else ["mean"]
    for category in names:
        for metric in metrics:
            values = []
            for rows in by_seed.values():
                of_rows = [getattr(row, metric) for row in rows if category in ("mean", row.category)]
                defined = [value for value in of_rows if value is not None]
                if 0 < len(defined) == len(of_rows):
                    values.append(math.fsum(defined) / len(defined))
            paper = _find_published_numbers(table, entry, category, categories).get(metric)
            ours = statistics.fmean(values) if values else None
            spread = statistics.stdev(values) if len(values) > 1 else None
            yield Line(entry.name, category, metric, len(values), ours, spread, paper)


def _find_published_numbers(
    table: Table, entry: Entry, category: str, categories: Sequence[str]
) -> Mapping[str, float]:
    """Return the published numbers of a category, or their mean over exactly the given categories."""
    if category != "mean":
        return entry.numbers.get(category, {})
    if not table.categories or set(categories) == set(table.categories):
        return entry.numbers.get("mean", {})
    numbers = [entry.numbers.get(name) for name in categories]
    if None in numbers:
        return {}
    return {key: math.fsum(n[key] for n in numbers if n) / len(numbers) for key in entry.numbers["mean"]}


def _write_notes(
    table: Table, categories: Sequence[str], seeds: Sequence[int], changes: Mapping[str, Any]
) -> list[str]:
    """Write the sentences that a reader needs to compare the numbers."""
    notes = [f"Recipe {table.recipe}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}."]
    if changes:
        changed = ", ".join(f"{key} {value}" for key, value in changes.items())
        notes.append(f"Not the paper's settings: {changed}.")
    if not any(entry.numbers for entry in table.entries):  # nothing to compare with
        return notes
    if table.categories and set(categories) != set(table.categories):
        same = len(set(categories) & set(table.categories))
        notes.append(f"{same} of the {len(categories)} categories are among the paper's {len(table.categories)}; the "
                     "paper's mean is over the same categories, if the number of each is published.")  # fmt: skip
    return [*notes, *([f"{table.note[0].upper()}{table.note[1:]}."] if table.note else [])]
