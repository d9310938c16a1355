"""The ``recontrast`` command. What is heavy is imported by the command that needs it, so that ``--help`` is quick."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recontrast.app.calibrate import calibrate
from recontrast.app.console import Commands, Steps, complain, show, silent, stop, table
from recontrast.app.export import export
from recontrast.app.options import (
    Batch,
    CheckpointFile,
    Compile,
    Device,
    Layout,
    NoFold,
    Precision,
    Views,
    Workers,
    change,
    checkpoint_file,
    inference,
    numbers,
    split,
)
from recontrast.app.predict_command import predict
from recontrast.app.prepare import prepare
from recontrast.app.report.command import report

if TYPE_CHECKING:
    from recontrast.data.datasets import Sample
    from recontrast.engine.calibrate import Calibration
    from recontrast.engine.recipes import Recipe

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Visual anomaly detection by contrastive reconstruction: train on good images, find what is not like them.",
)

Data = Annotated[
    list[Path],
    typer.Argument(metavar="DATA", help="Data sets or categories in MVTec AD layout; to train, or folders of images."),
]
CATEGORY = "Name of a category below DATA, or all: one detector for all of them."


def main() -> None:
    """Run the command line."""
    if silent():
        sys.stdout = open(os.devnull, "w")
    app(prog_name="recontrast")


def _version(wanted: bool) -> None:
    if wanted:
        import recontrast

        typer.echo(f"recontrast {recontrast.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def train(
    context: typer.Context,
    data: Data,
    category: Annotated[str | None, typer.Option(help=CATEGORY + " Default: the only one.")] = None,
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
    from recontrast.app import train as application
    from recontrast.engine import distributed
    from recontrast.engine.calibrate import statement

    values: dict[str, Any] = {"backbone": backbone, "weights": weights, "steps": steps, "batch": batch, "size": size}
    values |= {"tile": tile, "seed": seed, "encoder_bn": encoder_bn, "precision": precision}
    values |= {"channels_last": channels_last, "holdout": holdout}
    given = {key: value for key, value in values.items() if value is not None} | dict(map(change, changes or []))
    resume = None if resume is None else checkpoint_file(resume)
    job = application.prepare(data, recipe, given, category=category, out=out, resume=resume, overwrite=overwrite)
    folders = " ".join(map(str, data))
    if (held := job.held_out()) is not None:
        typer.echo(held)
    _, where = context.with_resource(distributed.world(device))
    try:
        with Steps(f"train {job.category}") as shown:
            result = application.run(
                job, device=where, cache=cache, teacher_cache=teacher_cache, tensorboard=tensorboard and not silent(),
                on_step=lambda category, step, steps, note: shown(step, steps, note),
            )  # fmt: skip
    except KeyboardInterrupt:
        file = job.target
        what = f"go on with: recontrast train {folders} --resume {file}" if file.exists() else "no checkpoint yet"
        stop(f"interrupted; {what}", status=130)
    typer.echo(f"{job.recipe.steps} steps in {result.seconds:.1f} s: {job.target}")
    for line in () if result.calibration is None else statement(result.calibration):
        typer.echo(line)
    if evaluate and any(sample.split == "test" for sample in job.samples):
        _evaluate(
            result.model, job.groups, job.recipe, job.out, result.calibration, batch=job.recipe.batch, cache_dir=cache
        )


@app.command()
def reproduce(
    name: Annotated[
        str, typer.Argument(metavar="TABLE", help="mvtec, visa, aptos, mvtec_unified, ablation, maps ... (see README).")
    ],
    data: Annotated[Path, typer.Option(help="Data set in MVTec AD layout, or the folder of one category.")],
    out: Annotated[Path | None, typer.Option(help="Folder of its runs. Default: runs/TABLE.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Such as 1,11,111. Default: the recipe's.")] = None,
    categories: Annotated[str | None, typer.Option(help="Such as screw,grid. Default: all below DATA.")] = None,
    entries: Annotated[str | None, typer.Option(help="Lines of the table, such as A,E,ours. Default: all.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any field of the recipe; repeatable.")
    ] = None,
    device: Device = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for decoded images. Default: decode for each run.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the checkpoints of finished runs.")] = False,
) -> None:
    """Run a table of the paper again, and print ours beside its numbers; a second call goes on."""
    from recontrast.engine.reproduce import reproduce as run

    out = out or Path("runs") / name
    try:
        with Steps("") as shown:
            found = run(
                name, data, out, seeds=numbers("--seeds", seeds),
                categories=split(categories), entries=split(entries), changes=dict(map(change, changes or [])),
                device=device, cache_dir=cache, keep=keep,
                on_step=lambda what, done, total, note: shown(done, total, f"{what}: {note}"),
            )  # fmt: skip
    except KeyboardInterrupt:
        stop(f"interrupted; the same command goes on with what is in {out}", status=130)
    head, cells = found.cells()
    table(found.title, head, cells)
    for note in found.notes:
        typer.echo(note)
    typer.echo(f"comparison: {out / 'comparison.md'}, .csv, .json")


@app.command()
def evaluate(
    context: typer.Context,
    checkpoint: CheckpointFile,
    data: Data,
    category: Annotated[str | None, typer.Option(help="Name of one category. Default: all below DATA.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results.json, .csv and .md. Default: none.")] = None,
    save_maps: Annotated[
        bool, typer.Option("--save-maps", help="Also write 16-bit TIFF maps to OUT/maps; results.md has their scale.")
    ] = False,
    streaming: Annotated[
        bool,
        typer.Option("--streaming", help="Metrics of pixels from histograms: constant memory, with a proven bound."),
    ] = False,
    views: Views = None,
    precision: Precision = None,
    layout: Layout = None,
    no_fold: NoFold = False,
    compiled: Compile = False,
    batch: Batch = 16,
    workers: Workers = None,
    device: Device = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for decoded images. Default: decode anew.")] = None,
) -> None:
    """Measure a detector on test images: I-AUROC, P-AUROC, AP, F1 and AUPRO by category."""
    from recontrast.data import datasets
    from recontrast.engine import checkpoint as checkpoints
    from recontrast.engine import distributed

    if save_maps and out is None:
        raise ValueError("--save-maps: wanted a folder for them, --out DIR, got none")
    how = inference(device, views, precision, layout, no_fold, compiled, workers)
    file = checkpoint_file(checkpoint)
    _, where = context.with_resource(distributed.world(device))
    groups = datasets.load(data, None if category in (None, "all") else [category])
    model, recipe, about = checkpoints.load_model(file, where)
    _evaluate(
        model, groups, recipe, out, about.calibration if how.scores_alike(recipe) else None,
        inference=how, workers=workers, device=where, batch=batch, cache_dir=cache, streaming=streaming,
        save_maps=save_maps,
    )  # fmt: skip


app.command()(calibrate)
app.command()(predict)
app.command()(export)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures, checkpoint, results and heat maps.")] = Path("demo"),
    steps: Annotated[int | None, typer.Option(help="Of training. Default: 150, 20 with --short.")] = None,
    short: Annotated[bool, typer.Option("--short", help="Under a minute: shows that it works, not how well.")] = False,
    seed: Annotated[int, typer.Option(help="Of pictures, weights and order.")] = 0,
    compare: Annotated[
        bool,
        typer.Option(
            "--compare",
            help="Also without the trained encoder, in the map and in training, and with an untrained decoder.",
        ),
    ] = False,
    device: Device = None,
) -> None:
    """Train one detector for three photographed surfaces with drawn defects: minutes on a CPU, nothing to download."""
    from recontrast.app import demo as demonstration

    with Steps("train") as shown:
        found = demonstration.run(
            out, steps=steps, seed=seed, short=short, compare=compare, device=device,
            on_step=lambda variant, step, steps, loss, rate: shown(
                step, steps, f"{variant}: loss {loss:.4f}, {rate:.1f} images/s"),
        )  # fmt: skip
    for variant, result in found.results.items():
        show(result, variant)
    typer.echo(f"trained in {found.seconds:.0f} s; heat maps: {', '.join(map(str, found.sheets))}")
    typer.echo(
        f"try: recontrast predict {found.checkpoint} {out / 'data' / 'brick' / 'test'} --out {out / 'predicted'}"
    )


app.command()(prepare)
app.command()(report)


@app.command()
def info() -> None:
    """Print versions, devices, and which kernels run and why."""
    from recontrast.app.about import about

    for name, value in about().items():
        typer.echo(f"{name:<18} {value}")


def _evaluate(
    model: Any, groups: "dict[str, list[Sample]]", recipe: "Recipe", out: Path | None,
    calibration: "Calibration | None", **options: Any
) -> None:  # fmt: skip
    from recontrast.app.evaluation import measure

    with Steps("evaluate") as shown:
        result, made, written = measure(
            model, groups, recipe, out, calibration=calibration,
            on_progress=lambda category, done, total: shown(done, total, category), **options,
        )  # fmt: skip
    show(result)
    if made is not None:
        typer.echo(made.sentence())
        for warning in made.warnings():
            complain(f"warning: {warning}")
    if written:
        typer.echo(f"results: {', '.join(map(str, written))}")
