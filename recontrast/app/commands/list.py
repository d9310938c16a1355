"""``recontrast list``: write the images of a data set as a list."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recontrast.app.console import print_data, print_line
from recontrast.app.data_options import Bad, Good, load_data
from recontrast.app.options import AllGood, Overwrite, check_writable, path_argument, path_option

if TYPE_CHECKING:
    from recontrast.data.datasets import Sample


def list_images(
    data: Annotated[
        list[Path] | None,
        path_argument("DATA", "Data sets or categories in MVTec AD layout, folders of good images, or lists."),
    ] = None,
    out: Annotated[Path, path_option(help="The list: .csv, .jsonl or .parquet.")] = Path("list.csv"),
    category: Annotated[
        str | None, typer.Option(help="Name of one category. Default: all; with --good: the name of their category.")
    ] = None,
    good: Good = None,
    bad: Bad = None,
    all_good: AllGood = False,
    group: Annotated[
        str | None,
        typer.Option(
            help="Regular expression whose first group, in the path, is the group of an image: 'part(\\\\d+)_' for the "
            "part that it shows."
        ),
    ] = None,
    views_from: Annotated[
        str | None,
        typer.Option(
            help="Views of a part, as in train: they are kept in one split where images are divided by their names."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the images of a data set as a list, with their splits, labels and masks."""
    from recontrast.data import datasets
    from recontrast.data.image_lists import write_list
    from recontrast.data.list_files import check_name
    from recontrast.data.own_files import check_replaceable
    from recontrast.data.views import check_source

    check_name(out, "--out: ")
    check_writable(out.parent)
    check_replaceable(out.parent, [out.name], overwrite=overwrite, inputs=data or ())
    check_source(views_from, "--views-from")
    groups = load_data(data, good, bad, category=category, all_good=all_good, views_from=views_from)
    if group is not None:
        groups = {name: _set_groups(samples, group) for name, samples in groups.items()}
    print_data(datasets.describe(groups))
    write_list(out, groups)
    count = sum(map(len, groups.values()))
    print_line(f"list of {count} {'image' if count == 1 else 'images'}: {out}")


def _set_groups(samples: "list[Sample]", pattern: str) -> "list[Sample]":
    """Return the samples with the groups that a regular expression finds in their paths."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--group: wanted a regular expression, got {pattern!r} ({error})") from None
    if expression.groups < 1:
        raise ValueError(f"--group: wanted a regular expression with a group in parentheses, got {pattern!r}")
    matches = [expression.search(sample.path.as_posix()) for sample in samples]
    if not any(match and match[1] for match in matches):
        raise ValueError(f"--group: wanted an expression that fits a path, got {pattern!r}, which fits none")
    return [
        replace(sample, group=match[1]) if match and match[1] else sample
        for sample, match in zip(samples, matches, strict=True)
    ]
