"""``recontrast audit``: options and output; `recontrast.training.audit` ranks the images."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recontrast.app.console import print_data, print_image_errors, print_line
from recontrast.app.data_options import load_data
from recontrast.app.options import (
    AllGood,
    Device,
    OneCategory,
    Overwrite,
    TrainingData,
    Weights,
    check_writable,
    expand_home,
    parse_window,
    path_option,
)
from recontrast.app.progress_bar import ProgressBar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from recontrast.data.dataset_sample import Sample
    from recontrast.models.patchcore import PatchCore
    from recontrast.recipes.recipe import Recipe
    from recontrast.training.audit import AuditedImage


def audit(  # 12 options
    data: TrainingData = None,
    category: OneCategory = None,
    all_good: AllGood = False,
    out: Annotated[Path, path_option(help="Folder of the table, the page and the list.")] = Path("audit"),
    clean: Annotated[
        float | None,
        typer.Option(
            help="Also write clean.csv, a list without this share of the training images, those that look least like "
            "the others: train takes it."
        ),
    ] = None,
    backbone: Annotated[str, typer.Option(help="Name of a timm model.")] = "resnet18.tv_in1k",
    weights: Weights = None,
    size: Annotated[int, typer.Option(help="Side of the resized images in pixels.", min=32)] = 256,
    window: Annotated[
        str | None,
        typer.Option(metavar="LOW HIGH", help="As in train, for images of more than 8 bits. Default: scale to 8 bits."),
    ] = None,
    images: Annotated[int, typer.Option(help="Images of each category on the page.", min=1)] = 60,
    device: Device = None,
    overwrite: Overwrite = False,
) -> None:
    """Rank good training images by how little they look like the others, to find defects among them."""
    from recontrast.app.audit_files import CLEAN, FILES, choose_images, write_audit
    from recontrast.data import datasets
    from recontrast.data.locks import lock_folder
    from recontrast.data.own_files import check_replaceable
    from recontrast.models.patchcore import PatchCore
    from recontrast.recipes.recipe import Recipe
    from recontrast.runtime.device import resolve_device
    from recontrast.training.audit import check_samples

    if not data:
        raise ValueError("DATA: wanted data sets, folders of good images or lists, got none")
    if clean is not None and not 0 < clean < 1:
        raise ValueError(f"--clean: wanted a share between 0 and 1, got {clean:g}")
    values: dict[str, Any] = {"window": None if window is None else parse_window(window)}
    recipe = Recipe(backbone=backbone, size=size, **values)
    check_writable(out)
    target = resolve_device(device)
    groups = load_data(data, None, None, category=category, all_good=all_good)
    check_replaceable(out, FILES if clean is None else [*FILES, CLEAN], overwrite=overwrite, inputs=data)
    for name, samples in groups.items():
        check_samples(name, samples)
    network = PatchCore(backbone, weights=expand_home(weights))
    network.check_size(size)
    print_data(datasets.describe(groups))
    with lock_folder(out):
        audited, errors, failed = _audit_categories(groups, network, recipe, target)
        if not audited:
            raise ValueError(failed[0])
        left_out = None if clean is None else choose_images(audited, clean)
        written = write_audit(
            out, audited, groups, errors=errors, left_out=left_out, images=images, overwrite=overwrite
        )  # fmt: skip
    _print_standing(audited)
    if left_out is not None:
        print_line(f"left out of {out / CLEAN}: {len(left_out)} images; train with it: recontrast train {out / CLEAN}")
    print_line(f"audit: {', '.join(map(str, written))}")
    print_image_errors([*failed, *errors.values()], f"see {written[0]}")
    if failed or errors:
        raise typer.Exit(2)


def _audit_categories(
    groups: "Mapping[str, list[Sample]]", network: "PatchCore", recipe: "Recipe", device: "torch.device"
) -> "tuple[dict[str, list[AuditedImage]], dict[Path, str], list[str]]":
    """Rank the images of each category with a progress bar.

    Returns:
        The images by category, the first those that look least like the others; one message for each file that cannot
        be read; and one for each category that cannot be ranked.
    """
    from recontrast.training.audit import audit_images, list_readable
    from recontrast.training.camera_bits import fix_bits, fix_window

    audited: dict[str, list[AuditedImage]] = {}
    errors: dict[Path, str] = {}
    failed: list[str] = []
    with ProgressBar("audit") as progress:
        for name, samples in groups.items():
            try:
                paths = list_readable(samples)
                reading = fix_bits(fix_window(recipe, paths), paths)
                audited[name], unread = audit_images(
                    samples, network, size=recipe.out[0], bits=reading.bits, window=reading.window, device=device,
                    on_progress=functools.partial(progress, note=name),
                )  # fmt: skip
                errors |= unread
            except (ValueError, OSError) as error:  # the other categories are ranked all the same
                failed.append(f"{name}: {error}")
    return audited, errors, failed


def _print_standing(audited: "Mapping[str, Sequence[AuditedImage]]") -> None:
    """Print how many images of each category stand out, and which one comes first."""
    for name, group in audited.items():
        standing = sum(image.stands_out for image in group)
        verb = "stands" if standing == 1 else "stand"
        print_line(f"{name}: {standing} of {len(group)} good images {verb} out; first {group[0].sample.path}")
