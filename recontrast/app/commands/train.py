"""``recontrast train``: its options, and what it says; the work is in `recontrast.app.train_job`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from recontrast.app.commands.evaluate import show_metrics
from recontrast.app.console import ProgressBar, exit_with_error, is_silent
from recontrast.app.options import Data, Device, parse_change, resolve_checkpoint


def train(
    context: typer.Context,
    data: Data,
    category: Annotated[
        str | None,
        typer.Option(
            help="Name of a category below DATA, or all: one detector for all of them. Default: the only one."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/CATEGORY.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="One of the paper's, or a YAML file; options below change it. Default: mvtec, with holdout."),
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="A timm model. In mvtec: wide_resnet50_2.tv_in1k.")] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Of the backbone: a .pth, .pt or .safetensors file, package, or random. Default: timm's hub."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps. In mvtec: 2000.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images a step. In mvtec: 16.")] = None,
    size: Annotated[int | None, typer.Option(help="Side to which images are resized, pixels. In mvtec: 256.")] = None,
    tile: Annotated[
        int | None, typer.Option(help="Side of tiles at the images' own scale, pixels, in place of --size.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and order. In mvtec: 111.")] = None,
    holdout: Annotated[
        float | None,
        typer.Option(help="Share of the good images kept back to calibrate on. Default: 0.1; in recipes: 0."),
    ] = None,
    encoder_bn: Annotated[
        str | None,
        typer.Option(help="BatchNorm of the trained encoder: train, eval or auto. In mvtec: auto (by category)."),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="float32 or bfloat16 (autocast). In mvtec: float32.")] = None,
    channels_last: Annotated[
        bool | None, typer.Option("--channels-last/--no-channels-last", help="Layout. Default: as is faster.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other field of the recipe; repeatable.")
    ] = None,
    device: Device = None,
    resume: Annotated[
        Path | None, typer.Option(help="Go on from this checkpoint, with its recipe, category and folder.")
    ] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for decoded images. Default: in memory.")] = None,
    teacher_cache: Annotated[float, typer.Option(help="GiB for features of the frozen encoder, on the device.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint of a former run.")] = False,
    evaluate: Annotated[bool, typer.Option(help="Evaluate at the end, where there are test images.")] = True,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log to OUT/tensorboard.")] = False,
) -> None:
    """Train a detector on good images, and evaluate it where there are test images."""
    from recontrast.app import train_job as application
    from recontrast.calibration.conformal import describe_promise
    from recontrast.runtime import distributed

    values: dict[str, Any] = {"backbone": backbone, "weights": weights, "steps": steps, "batch": batch, "size": size}
    values |= {"tile": tile, "seed": seed, "encoder_bn": encoder_bn, "precision": precision}
    values |= {"channels_last": channels_last, "holdout": holdout}
    given = {key: value for key, value in values.items() if value is not None} | dict(map(parse_change, changes or []))
    resume = None if resume is None else resolve_checkpoint(resume)
    job = application.prepare_job(data, recipe, given, category=category, out=out, resume=resume, overwrite=overwrite)
    folders = " ".join(map(str, data))
    if (held := job.describe_holdout()) is not None:
        typer.echo(held)
    _, where = context.with_resource(distributed.join_processes(device))
    try:
        with ProgressBar(f"train {job.category}") as shown:
            result = application.run_job(
                job, device=where, cache=cache, teacher_cache=teacher_cache,
                tensorboard=tensorboard and not is_silent(),
                on_step=lambda category, step, steps, note: shown(step, steps, note),
            )  # fmt: skip
    except KeyboardInterrupt:
        file = job.target
        what = f"go on with: recontrast train {folders} --resume {file}" if file.exists() else "no checkpoint yet"
        exit_with_error(f"interrupted; {what}", status=130)
    typer.echo(f"{job.recipe.steps} steps in {result.seconds:.1f} s: {job.target}")
    for line in () if result.calibration is None else describe_promise(result.calibration):
        typer.echo(line)
    if evaluate and any(sample.split == "test" for sample in job.samples):
        show_metrics(
            result.model, job.groups, job.recipe, job.out, result.calibration, batch=job.recipe.batch, cache_dir=cache
        )
