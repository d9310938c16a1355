"""``recontrast compare``: options and output; `recontrast.app.compare` does the work."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from recontrast.app.console import exit_with_error, print_data, print_error, print_image_errors, print_line
from recontrast.app.data_options import Bad, Good, load_data
from recontrast.app.options import (
    Data,
    Device,
    check_writable,
    expand_home,
    parse_duration,
    parse_list,
    parse_shots,
    path_option,
)
from recontrast.app.progress_bar import ProgressBar
from recontrast.app.tables import print_table


def compare(  # 16 options and the output; the package `compare` does the work
    data: Data = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Methods, such as patchcore,padim, or your own as MODULE:NAME. "
            "Default: those, ensemble, recontrast, rd4ad and uniad. Also: dinomaly and inp_former."
        ),
    ] = None,
    category: Annotated[
        str | None,
        typer.Option(help="Name of a category in DATA, or all for one detector of all. Default: the only one."),
    ] = None,
    images: Annotated[
        list[Path] | None, path_option("--images", help="Images without labels to compare on; may be repeated.")
    ] = None,
    out: Annotated[
        Path | None, path_option(help="Folder of the comparison and its runs. Default: runs/compare-CATEGORY.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Name of a timm model. Default: wide_resnet50_2.tv_in1k.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Backbone weights: a .pth, .pt or .safetensors file, package, or random. Default: timm's hub."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="Time for the training of each method, such as 90s, 3m or 1h; see train --budget."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the methods that are trained by steps. Default: 2000.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step. Default: 16.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the resized images in pixels. Default: 256.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed. Default: 111.")] = None,
    shots: Annotated[
        str | None,
        typer.Option(
            help="Good images of each class to train on, drawn with --seed: 4, or screw=4,tile=16. Default: all."
        ),
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(help="Augmented copies of the good images: none, rotations, flips or inp_former. Default: none."),
    ] = None,
    holdout: Annotated[
        float | None,
        typer.Option(help="Share of the good images that are held out. Default: 0.1; without labelled images 0.2."),
    ] = None,
    good: Good = None,
    bad: Bad = None,
    device: Device = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace runs with other settings, and files of others in the way.")
    ] = False,
) -> None:
    """Train several methods on the same images, compare them in one table and one page, and recommend one."""
    from recontrast.app.compare.methods import select_methods
    from recontrast.app.compare.run import prepare_comparison, run_comparison
    from recontrast.app.compare.tables import FILES
    from recontrast.app.compare.write import write_comparison
    from recontrast.data import datasets
    from recontrast.data.locks import lock_folder
    from recontrast.data.own_files import check_replaceable

    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(f"compare: wanted one process, got {world} of torchrun")
    if methods is not None and not parse_list(methods):
        raise ValueError(f"--methods: wanted names such as patchcore,padim, got {methods!r}")
    values = {
        "backbone": backbone, "weights": expand_home(weights), "steps": steps, "batch": batch, "size": size,
        "seed": seed, "shots": None if shots is None else parse_shots(shots), "augment": augment, "holdout": holdout,
    }  # fmt: skip
    groups = load_data(data, good, bad, category=category)
    comparison = prepare_comparison(
        groups, select_methods(parse_list(methods)), {key: value for key, value in values.items() if value is not None},
        category=category, out=out, images=images or [], device=device, overwrite=overwrite,
        budget=None if budget is None else parse_duration("--budget", budget),
    )  # fmt: skip
    check_writable(comparison.out)
    check_replaceable(comparison.out, FILES, overwrite=overwrite)
    print_data(datasets.describe(comparison.groups))
    if drawn := next((run.job.describe_shots() for run in comparison.runs if run.job is not None), None):
        print_line(drawn)
    results: list[Any] = []
    with lock_folder(comparison.out):  # until the tables are written
        try:
            with ProgressBar("compare") as progress:
                run_comparison(
                    comparison,
                    lambda activity, done, total, note: progress(done, total, f"{activity}: {note}"),
                    results,
                )
        except KeyboardInterrupt:
            _exit_interrupted(comparison, results)
        failed = [result for result in results if result.error is not None]
        for result in failed:
            print_error(f"{result.name}: {result.error}")
        if len(failed) == len(results):
            raise typer.Exit(2)
        summary = write_comparison(comparison, results)
    print_table("", *summary.cells())
    print_line(f"recommended: {summary.recommendation.sentence}" if summary.recommendation else "no recommendation")
    print_line(f"comparison: {comparison.out / 'compare.html'}, .md, .csv, .json")
    errors = list(dict.fromkeys(error for result in results for error in result.image_errors))
    print_image_errors(errors, f"see the scores.csv of each method in {comparison.out}")
    if failed or errors:
        raise typer.Exit(2)


def _exit_interrupted(comparison: Any, results: list[Any]) -> None:
    """Say which methods are complete, and write the tables of those."""
    from recontrast.app.compare.write import write_comparison

    names = [result.name for result in results if result.error is None]
    written = "no method is complete"
    if names:
        write_comparison(comparison, results)
        written = f"{', '.join(names)} complete and compared in {comparison.out / 'compare.html'}"
    exit_with_error(f"interrupted: {written}; the same command continues with the others", status=130)
