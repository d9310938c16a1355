"""``recontrast audit``: options and output; `recontrast.training.audit` ranks the images."""

import functools
from pathlib import Path
from typing import Annotated

import typer

from recontrast.app.console import print_data, print_image_errors, print_line
from recontrast.app.data_options import Good, load_data
from recontrast.app.options import AllGood, Data, Device, Overwrite, check_writable, expand_home, path_option
from recontrast.app.progress_bar import ProgressBar


def audit(  # 12 options and the output; `audit_images` and `audit_files` do the work
    data: Data = None,
    good: Good = None,
    category: Annotated[str | None, typer.Option(help="Name of one category. Default: all in DATA.")] = None,
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
    weights: Annotated[
        str | None,
        typer.Option(
            help="Backbone weights: a .pth, .pt or .safetensors file, package, or random. Default: timm's hub."
        ),
    ] = None,
    size: Annotated[int, typer.Option(help="Side of the resized images in pixels.", min=32)] = 256,
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
    from recontrast.runtime.device import resolve_device
    from recontrast.training.audit import audit_images

    if clean is not None and not 0 < clean < 1:
        raise ValueError(f"--clean: wanted a share between 0 and 1, got {clean:g}")
    check_writable(out)
    target = resolve_device(device)
    groups = load_data(data, good, None, category=category, all_good=all_good)
    check_replaceable(out, FILES if clean is None else [*FILES, CLEAN], overwrite=overwrite, inputs=data or good or ())
    network = PatchCore(backbone, weights=expand_home(weights))
    network.check_size(size)
    print_data(datasets.describe(groups))
    audited, errors = {}, []
    with lock_folder(out):
        with ProgressBar("audit") as progress:
            for name, samples in groups.items():
                show = functools.partial(progress, note=name)
                audited[name], failed = audit_images(samples, network, size=size, device=target, on_progress=show)
                errors += failed
        left_out = None if clean is None else choose_images(audited, clean)
        written = write_audit(out, audited, groups, left_out=left_out, images=images, overwrite=overwrite)
    for name, group in audited.items():
        standing = sum(image.stands_out for image in group)
        verb = "stands" if standing == 1 else "stand"
        print_line(f"{name}: {standing} of {len(group)} good images {verb} out; first {group[0].sample.path}")
    if left_out is not None:
        print_line(f"left out of {out / CLEAN}: {len(left_out)} images; train with it: recontrast train {out / CLEAN}")
    print_line(f"audit: {', '.join(map(str, written))}")
    print_image_errors(errors, "they are not in the table")
    if errors:
        raise typer.Exit(2)
