"""The ``recontrast`` command. What is heavy is imported by the command that needs it, so that ``--help`` is quick."""

import ast
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recontrast.app.console import Commands, Steps, complain, stop, table
from recontrast.app.prepare import prepare

if TYPE_CHECKING:
    from recontrast.data.datasets import Sample
    from recontrast.engine.evaluate import Result
    from recontrast.engine.recipes import Recipe

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Visual anomaly detection by contrastive reconstruction: train on good images, find what is not like them.",
)

Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. Default: the GPU where there is one.")]
Batch = Annotated[int, typer.Option(help="Images at once.")]
CheckpointFile = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="checkpoint.pt, or the folder of the run that holds it.")
]
Data = Annotated[
    list[Path],
    typer.Argument(metavar="DATA", help="Data sets or categories in MVTec AD layout; to train, or folders of images."),
]
CATEGORY = "Name of a category below DATA, or all: one detector for all of them."


def main() -> None:
    """Run the command line."""
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
    data: Data,
    category: Annotated[str | None, typer.Option(help=CATEGORY + " Default: the only one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/CATEGORY.")] = None,
    recipe: Annotated[
        str, typer.Option(help="Where the settings come from; every option below changes one.")
    ] = "mvtec",
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
    seed: Annotated[int | None, typer.Option(help="Of weights and order. In mvtec: 111.")] = None,
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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint of a former run.")] = False,
    evaluate: Annotated[bool, typer.Option(help="Evaluate at the end, where there are test images.")] = True,
) -> None:
    """Train a detector on good images, and evaluate it where there are test images."""
    from recontrast.data import datasets
    from recontrast.engine import checkpoint, recipes
    from recontrast.engine import train as engine

    if resume is not None:
        resume = _file(resume)
        found = checkpoint.load(resume)
        base, category, out = found.recipe, category or found.category, out or resume.parent
    elif recipe not in recipes.RECIPES:
        raise ValueError(f"--recipe: wanted one of {', '.join(recipes.RECIPES)}, got {recipe!r}")
    else:
        base = recipes.RECIPES[recipe]
    values = {"backbone": backbone, "weights": weights, "steps": steps, "batch": batch, "size": size, "seed": seed}
    values |= {"encoder_bn": encoder_bn, "precision": precision, "channels_last": channels_last}
    chosen = base.replace(
        **{key: value for key, value in values.items() if value is not None}, **dict(map(_change, changes or []))
    )
    groups = datasets.load(data, None if category in (None, "all") else [category])
    folders = " ".join(map(str, data))
    if category is None and len(groups) > 1:
        raise ValueError(f"{folders} holds {len(groups)} categories: choose one with --category, or all of them with "
                         f"--category all ({', '.join(groups)})")  # fmt: skip
    category = category or next(iter(groups))
    out = out or Path("runs") / category
    target = out / "checkpoint.pt"
    if target.exists() and resume is None and not overwrite:
        raise ValueError(f"{target} is there already: go on with --resume {out}, or take --overwrite or another --out")
    samples = [sample for group in groups.values() for sample in group]
    try:
        with Steps(f"train {category}") as shown:
            result = engine.train(
                chosen, samples, category=category, out=out, device=device, resume=resume, cache_dir=cache,
                on_log=lambda step, loss, rate, alpha: shown(
                    step, chosen.steps, f"loss {loss:.4f}, {rate:.1f} images/s"),
            )  # fmt: skip
    except KeyboardInterrupt:
        where = f"go on with: recontrast train {folders} --resume {target}" if target.exists() else "no checkpoint yet"
        stop(f"interrupted; {where}", status=130)
    typer.echo(f"{chosen.steps} steps in {result.seconds:.1f} s: {target}")
    if evaluate and any(sample.split == "test" for sample in samples):
        _evaluate(result.model, groups, chosen, out, None, chosen.batch, cache)


@app.command()
def evaluate(
    checkpoint: CheckpointFile,
    data: Data,
    category: Annotated[str | None, typer.Option(help="Name of one category. Default: all below DATA.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results.json, .csv and .md. Default: none.")] = None,
    save_maps: Annotated[
        bool, typer.Option("--save-maps", help="Also write scores and 16-bit TIFF maps to OUT (a second pass).")
    ] = False,
    batch: Batch = 16,
    device: Device = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for decoded images. Default: decode anew.")] = None,
) -> None:
    """Measure a detector on test images: I-AUROC, P-AUROC, AP, F1 and AUPRO by category."""
    from recontrast.data import datasets
    from recontrast.engine import checkpoint as checkpoints

    if save_maps and out is None:
        raise ValueError("--save-maps: wanted a folder for them, --out DIR, got none")
    file = _file(checkpoint)
    groups = datasets.load(data, None if category in (None, "all") else [category])
    model, recipe, _ = checkpoints.load_model(file)
    _evaluate(model, groups, recipe, out, device, batch, cache)
    if save_maps and out is not None:
        tests = [sample.path for group in groups.values() for sample in group if sample.split == "test"]
        _predict(file, tests, out, maps="tiff16", overlays=False, threshold=None, device=device, batch=batch)


@app.command()
def predict(
    checkpoint: CheckpointFile,
    inputs: Annotated[
        list[Path], typer.Argument(metavar="INPUT", help="Images, or folders that are searched for images.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for scores.csv, scores.json, maps/, overlays/.")],
    maps: Annotated[
        str, typer.Option(help="tiff16 (uint16, scale in scores.json), tiff32 or npy (float32), or none.")
    ] = "none",
    overlays: Annotated[bool, typer.Option(help="Heat maps over the images, PNG, in their own size.")] = True,
    threshold: Annotated[float | None, typer.Option(help="Flag images whose score is at least this.")] = None,
    batch: Batch = 16,
    device: Device = None,
) -> None:
    """Score images; write scores, anomaly maps and heat-map overlays."""
    kinds = ("tiff16", "tiff32", "npy", "none")
    if maps not in kinds:
        raise ValueError(f"--maps: wanted one of {', '.join(kinds)}, got {maps!r}")
    _predict(_file(checkpoint), inputs, out, maps=maps, overlays=overlays, threshold=threshold, device=device,
             batch=batch)  # fmt: skip


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures, checkpoint, results and heat maps.")] = Path("demo"),
    steps: Annotated[int | None, typer.Option(help="Of training. Default: 300, 20 with --short.")] = None,
    short: Annotated[bool, typer.Option("--short", help="Under a minute: shows that it works, not how well.")] = False,
    seed: Annotated[int, typer.Option(help="Of pictures, weights and order.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also train with a frozen encoder, and try an untrained decoder.")
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
        _show(result, variant)
    typer.echo(f"trained in {found.seconds:.0f} s; heat maps: {', '.join(map(str, found.sheets))}")
    typer.echo(
        f"try: recontrast predict {found.checkpoint} {out / 'data' / 'brick' / 'test'} --out {out / 'predicted'}"
    )


app.command()(prepare)


@app.command()
def info() -> None:
    """Print versions, devices, and which kernels run and why."""
    from recontrast.app.about import about

    for name, value in about().items():
        typer.echo(f"{name:<18} {value}")


def _file(path: Path) -> Path:
    """The checkpoint that a file or the folder of a run stands for."""
    return path / "checkpoint.pt" if path.is_dir() else path


def _change(text: str) -> tuple[str, Any]:
    """``key=value`` as key and Python value: a number, true, false, none, a list, or else a text."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ValueError(f"--set: wanted KEY=VALUE, got {text!r}")
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return key, words[value.lower()]
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _evaluate(
    model: Any, groups: "dict[str, list[Sample]]", recipe: "Recipe", out: Path | None, device: str | None, batch: int,
    cache: Path | None,
) -> None:  # fmt: skip
    from recontrast.engine import evaluate as engine

    with Steps("evaluate") as shown:
        result = engine.evaluate(
            model, groups, recipe, device=device, batch=batch, cache_dir=cache,
            on_progress=lambda category, done, total: shown(done, total, category),
        )  # fmt: skip
    _show(result)
    if out is not None:
        typer.echo(f"results: {', '.join(map(str, result.write(out)))}")


def _predict(checkpoint: Path, inputs: list[Path], out: Path, **options: Any) -> None:
    from recontrast.app.predict import predict as run

    with Steps("predict") as shown:
        report = run(checkpoint, inputs, out, on_progress=shown, **options)
    flagged = sum(bool(found.flagged) for found in report.predictions)
    said = "" if options["threshold"] is None else f", {flagged} flagged at {options['threshold']:g}"
    typer.echo(f"{len(report.predictions)} images scored{said}: {out / 'scores.csv'}")
    for text in report.unread:
        complain(text)
    if report.unread:
        raise typer.Exit(2)


def _show(result: "Result", title: str = "") -> None:
    """Print the metrics of a result in percent."""
    from recontrast.engine.result import METRICS

    rows = [*result.rows, *([result.mean] if len(result.rows) > 1 else [])]
    names = [name for name in METRICS if any(getattr(row, name) is not None for row in rows)]
    cells = [
        [row.category, *("-" if (v := getattr(row, name)) is None else f"{100 * v:.2f}" for name in names)]
        for row in rows
    ]
    table(title, ["category", *(METRICS[name] for name in names)], cells)
    for row in rows:
        if row.note:
            typer.echo(f"{row.category}: {row.note}")
