"""Data of a command: DATA, or ``--good`` and ``--bad`` in its place."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from recontrast.app.options import path_option

if TYPE_CHECKING:
    from recontrast.data.dataset_sample import Sample
    from recontrast.data.listing import PathLike
    from recontrast.inference.calibrate import TrainedDetector

Good = Annotated[
    list[Path] | None,
    path_option(help="Instead of DATA: files or folders of good images, without any layout; may be repeated."),
]
Bad = Annotated[
    list[Path] | None,
    path_option(help="With --good: files or folders of images with defects, to measure with; may be repeated."),
]


def load_data(
    data: "Sequence[PathLike] | None", good: "Sequence[PathLike] | None", bad: "Sequence[PathLike] | None", *,
    category: str | None = None, all_good: bool = False, incomplete: bool = False, for_test: bool = False,
    views_from: str | None = None, options: tuple[str, str, str] = ("DATA", "--good", "--bad"),
) -> "dict[str, list[Sample]]":  # fmt: skip
    """Read the samples of DATA, or those of folders of good and bad images.

    Args:
        data: Data sets, categories, folders or lists, see `recontrast.data.datasets.load`.
        good: Folders of good images, see `recontrast.data.unsplit.read_good_and_bad`.
        bad: Folders of images with defects.
        category: Name of one category of ``data``, or of the one that ``good`` and ``bad`` make; None or "all": all.
        all_good: Whether all images in folders of good images are good.
        incomplete: Whether images and masks may be missing.
        for_test: Whether images without a split are all test images.
        views_from: Where the views of a part are found: they are in one split, and some need no mask.
        options: Names of the three arguments, for error messages.

    Returns:
        Samples by category.

    Raises:
        ValueError: If both or neither are given, or the images are not clearly good or bad.
        OSError: If a folder or list cannot be read.
    """
    from recontrast.data import datasets
    from recontrast.data.unsplit import read_good_and_bad

    name = None if category in (None, "all") else category
    if data and (good or bad):
        raise ValueError(f"{options[1] if good else options[2]}: wanted either {options[0]} or this, got both")
    if bad and not good:
        raise ValueError(f"{options[2]}: wanted {options[1]} with it, got none")
    if good:
        return read_good_and_bad(
            good, bad or (), category=name, all_good=all_good, for_test=for_test, views_from=views_from
        )
    if not data:
        raise ValueError(f"{options[0]}: wanted data sets, folders or lists, or {options[1]} DIR, got none")
    groups = datasets.load(
        data, None if name is None else [name], all_good=all_good, incomplete=incomplete or views_from is not None,
        for_test=for_test, views_from=views_from,
    )  # fmt: skip
    if incomplete or views_from is None:
        return groups
    from recontrast.data.part_samples import check_part_files

    return {name: check_part_files(samples, views_from) for name, samples in groups.items()}


def load_training_data(
    data: "Sequence[Path] | Mapping[str, list[Sample]]",
    category: str | None,
    all_good: bool,
    *,
    views_from: str | None,
) -> "dict[str, list[Sample]]":
    """Read the samples of a run.

    Args:
        data: Data sets, categories, folders or lists, see `load_data`; or samples by category.
        category: Name of one category, "all", or None for the only one.
        all_good: Whether all images in folders of good images are good.
        views_from: Where the views of a part are found: they are in one split, and some need no mask. Images and masks
            may then be missing.

    Returns:
        Samples by category.

    Raises:
        ValueError: If there are several categories and none is chosen, or the data is invalid.
        OSError: If a folder or list cannot be read.
    """
    from recontrast.data import datasets

    if isinstance(data, Mapping):
        groups, where = dict(data), "data"
    else:
        names = None if category in (None, "all") else [category]
        has_views = views_from is not None
        groups = datasets.load(data, names, all_good=all_good, incomplete=has_views, views_from=views_from)
        where = " ".join(map(str, data))
    if category is None and len(groups) > 1:
        raise ValueError(f"{where} holds {len(groups)} categories: choose one with --category, or all of them with "
                         f"--category all ({', '.join(groups)})")  # fmt: skip
    return groups


def load_tests(
    get_detector: "Callable[[], TrainedDetector]", data: "Sequence[PathLike] | None", good: "Sequence[PathLike] | None",
    bad: "Sequence[PathLike] | None", *, category: str | None = None, incomplete: bool = True,
    options: tuple[str, str, str] = ("DATA", "--good", "--bad"),
) -> "dict[str, list[Sample]]":  # fmt: skip
    """Read the samples to measure a detector with.

    Images without a split are all test images. But if the detector was trained on some of them, they are divided as
    training divided them, and only its test images remain: the others are no measure.

    Args:
        get_detector: Function that returns the detector or its file, with recipe and description of its images.
        data: See `load_data`, as the other arguments.
        good: Folders of good images.
        bad: Folders of images with defects.
        category: Name of one category; None or "all": all.
        incomplete: Whether images and masks may be missing.
        options: Names of the three arguments, for error messages.

    Returns:
        Samples by category.
    """
    from recontrast.data.list_files import is_list
    from recontrast.data.listing import DataWarning

    groups = load_data(data, good, bad, category=category, incomplete=incomplete, for_test=True, options=options)
    if not good and not any(is_list(path) for path in data or ()):
        return groups
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # as before
        divided = load_data(
            data, good, bad, category=category, incomplete=incomplete, views_from=get_detector().recipe.views_from,
            options=options,
        )  # fmt: skip
    if divided == groups:
        return groups
    from recontrast.inference.calibrate import is_trained_on

    train = [sample.path for group in divided.values() for sample in group if sample.split == "train"]
    if not is_trained_on(train, get_detector()):
        return groups
    tests = sum(sample.split == "test" and not sample.label for group in divided.values() for sample in group)
    warnings.warn(
        "the detector was trained on some of these good images: it is measured with the "
        f"{tests} of {len(train) + tests} that training keeps for the test", DataWarning, stacklevel=2,
    )  # fmt: skip
    return divided
