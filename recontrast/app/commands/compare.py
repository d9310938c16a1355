"""``recontrast compare``: options and output; `recontrast.app.compare` does the work."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from recontrast.app.comma_separated import check_data, check_shots
from recontrast.app.console import exit_with_error, print_data, print_error, print_image_errors, print_line
from recontrast.app.data_options import Bad, Good, load_data
from recontrast.app.option_groups import expand_options
from recontrast.app.options import (
    Data,
    Device,
    TrainedCategory,
    check_writable,
    parse_duration,
    parse_list,
    path_option,
)
from recontrast.app.progress_bar import ProgressBar
from recontrast.app.recipe_options import CompareRecipeOptions
from recontrast.app.tables import print_table

if TYPE_CHECKING:
    from recontrast.app.compare.record import MethodResult
    from recontrast.app.compare.run import Comparison
    from recontrast.app.compare.tables import Summary


@expand_options
def compare(  # 16 options
    data: Data = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, such as patchcore,padim, or your own as MODULE:NAME. "
            "Default: those, ensemble, recontrast, rd4ad and uniad. Also: dinomaly and inp_former."
        ),
    ] = None,
    category: TrainedCategory = None,
    images: Annotated[
        list[Path] | None, path_option("--images", help="Images without labels to compare on; may be repeated.")
    ] = None,
    out: Annotated[
        Path | None, path_option(help="Folder of the comparison and its runs. Default: runs/compare-CATEGORY.")
    ] = None,
    *,
    fields: CompareRecipeOptions,
    budget: Annotated[
        str | None,
        typer.Option(help="Time for the training of each method, such as 90s, 3m or 1h; see train --budget."),
    ] = None,
    roi: Annotated[
        Path | None,
        path_option(
            help="Region of interest of all images and methods: a mask image (black: do not look) or a JSON file of "
            "rectangles and polygons. Default: whole images."
        ),
    ] = None,
    good: Good = None,
    bad: Bad = None,
    device: Device = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace runs with other settings, and files of others in the way.")
    ] = False,
) -> None:
    """Train several methods on the same images, compare them in one table and one page, and recommend one."""
    from recontrast.app.compare.methods import is_method, select_methods
    from recontrast.app.compare.run import prepare_comparison
    from recontrast.app.compare.tables import FILES
    from recontrast.app.compare.write import write_comparison
    from recontrast.app.prepare_training import find_views_from
    from recontrast.data.locks import lock_folder
    from recontrast.data.own_files import check_replaceable

    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(f"compare: wanted one process, got {world} of torchrun")
    if methods is not None and not parse_list(methods):
        raise ValueError(f"--methods: wanted names such as patchcore,padim, got {methods!r}")
    check_data(data or (), "--methods", methods, "names", is_method)
    check_shots(data or (), fields.shots)
    changes = fields.list_changes()
    groups = load_data(data, good, bad, category=category, views_from=find_views_from(None, changes, None))
    comparison = prepare_comparison(
        groups, select_methods(parse_list(methods)), changes, category=category, out=out, images=images or [],
        device=device, overwrite=overwrite, budget=None if budget is None else parse_duration("--budget", budget),
        roi=roi,
    )  # fmt: skip
    check_writable(comparison.out)
    check_replaceable(comparison.out, FILES, overwrite=overwrite)
    _print_images(comparison)
    with lock_folder(comparison.out):  # until the tables are written
        results = _run(comparison)
        failed = [result for result in results if result.error is not None]
        for result in failed:
            print_error(f"{result.name}: {result.error}")
        if len(failed) == len(results):
            raise typer.Exit(2)
        summary = write_comparison(comparison, results)
    _print_summary(comparison, summary)
    errors = list(dict.fromkeys(error for result in results for error in result.image_errors))
    print_image_errors(errors, f"see the scores.csv of each method in {comparison.out}")
    if failed or errors:
        raise typer.Exit(2)


def _print_images(comparison: "Comparison") -> None:
    """Print which images are compared on, in which region, and which were drawn to train on."""
    from recontrast.data import datasets

    print_data(datasets.describe(comparison.groups))
    first = next((run.job for run in comparison.runs if run.job is not None), None)
    for note in () if first is None else (first.describe_roi(), first.describe_shots()):
        if note is not None:
            print_line(note)


def _run(comparison: "Comparison") -> "list[MethodResult]":
    """Train and measure each method with a progress bar; Ctrl-C writes the tables of those that are complete."""
    from recontrast.app.compare.run import run_comparison

    results: list[MethodResult] = []
    try:
        with ProgressBar("compare") as progress:
            run_comparison(
                comparison, lambda activity, done, total, note: progress(done, total, f"{activity}: {note}"), results
            )
    except KeyboardInterrupt:
        _exit_interrupted(comparison, results)
    return results


def _print_summary(comparison: "Comparison", summary: "Summary") -> None:
    """Print the table, the recommendation, and where the page is."""
    print_table("", *summary.cells())
    print_line(f"recommended: {summary.recommendation.sentence}" if summary.recommendation else "no recommendation")
    print_line(f"comparison: {comparison.out / 'compare.html'}, .md, .csv, .json")


def _exit_interrupted(comparison: "Comparison", results: "list[MethodResult]") -> NoReturn:
    """Say which methods are complete, and write the tables of those."""
    from recontrast.app.compare.write import write_comparison

    names = [result.name for result in results if result.error is None]
    written = "no method is complete"
    if names:
        write_comparison(comparison, results)
        written = f"{', '.join(names)} complete and compared in {comparison.out / 'compare.html'}"
    exit_with_error(f"interrupted: {written}; the same command continues with the others", status=130)
