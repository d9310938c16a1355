"""``recontrast train``: options and output; `recontrast.app.train_job` does the work."""

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from recontrast.app.command_group import USAGE_ERROR
from recontrast.app.commands.evaluate import show_metrics
from recontrast.app.console import exit_with_error, is_silent, print_data, print_line
from recontrast.app.data_options import Bad, load_data
from recontrast.app.options import (
    AllGood,
    Device,
    check_writable,
    expand_home,
    parse_change,
    parse_duration,
    parse_shots,
    parse_window,
    path_argument,
    path_option,
    resolve_checkpoint,
)
from recontrast.app.progress_bar import ProgressBar

EXTEND_OPTIONS = ("extend", "good", "all_good", "holdout", "device", "imports", "threads")  # that go together


def train(  # 36 options and the output; `train_job` does the work
    context: typer.Context,
    data: Annotated[
        list[Path] | None,
        path_argument("DATA", "Data sets or categories in MVTec AD layout, folders of good images, or lists."),
    ] = None,
    category: Annotated[
        str | None,
        typer.Option(help="Name of a category in DATA, or all for one detector of all. Default: the only one."),
    ] = None,
    all_good: AllGood = False,
    out: Annotated[Path | None, path_option(help="Folder of the run. Default: runs/CATEGORY.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A recipe of the paper or a YAML file; other options override it. Default: mvtec, with --holdout 0.1."
        ),
    ] = None,
    architecture: Annotated[
        str | None,
        typer.Option(
            help="recontrast, patchcore, padim, ensemble, uniad, dinomaly, inp_former, or your own as "
            "MODULE:NAME, which is imported. Default: as in the recipe; in mvtec: recontrast."
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(help="Name of a timm model. Default: as in the recipe; in mvtec: wide_resnet50_2.tv_in1k."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Backbone weights: a .pth, .pt or .safetensors file, package, or random. Default: timm's hub."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time for the training, such as 90s, 3m or 1h. What fits is chosen from the speed of this machine: "
            "an ensemble at the largest image size, or with --architecture or --recipe its number of steps."
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps. Default: as in the recipe; in mvtec: 2000.")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Images per step. Default: as in the recipe; in mvtec: 16.")] = None,
    size: Annotated[
        int | None, typer.Option(help="Side of the resized images in pixels. Default: as in the recipe; in mvtec: 256.")
    ] = None,
    tile: Annotated[
        int | None, typer.Option(help="Train on tiles of this side in pixels at full resolution, instead of --size.")
    ] = None,
    roi: Annotated[
        Path | None,
        path_option(
            help="Region of interest: a mask image (black: do not look), a JSON file of rectangles and polygons, or a "
            "folder with one of them for each image. Default: whole images."
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="LOW HIGH",
            help="Samples of images of more than 8 bits that become black and white, all levels between them kept, or "
            "auto for percentiles 0.1 and 99.9 of the good images. Default: scale to 8 bits.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed. Default: as in the recipe; in mvtec: 111.")] = None,
    shots: Annotated[
        str | None,
        typer.Option(
            help="Good images of each class to use, drawn with --seed: 4, or screw=4,tile=16. Default: all.",
        ),
    ] = None,
    augment: Annotated[
        str | None,
        typer.Option(help="Augmented copies of the good images: none, rotations, flips or inp_former. Default: none."),
    ] = None,
    sampling: Annotated[
        str | None,
        typer.Option(help="Draw images or classes equally often; for one detector of all classes. Default: images."),
    ] = None,
    holdout: Annotated[
        float | None,
        typer.Option(
            help="Share of the good images that are held out for calibration. "
            "Default: 0.1; with --recipe: as in the recipe (0 in those of the paper)."
        ),
    ] = None,
    encoder_bn: Annotated[
        str | None,
        typer.Option(
            help="BatchNorm of the trained encoder: train, eval or auto. "
            "Default: as in the recipe; in mvtec: auto, chosen by category."
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="float32 or bfloat16 (autocast). Default: as in the recipe; in mvtec: float32.")
    ] = None,
    channels_last: Annotated[
        bool | None, typer.Option("--channels-last/--no-channels-last", help="Memory layout. Default: the faster one.")
    ] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other recipe field; may be repeated.")
    ] = None,
    device: Device = None,
    resume: Annotated[
        Path | None, path_option(help="Run or checkpoint to continue, with its recipe, category and folder.")
    ] = None,
    cache: Annotated[Path | None, path_option(help="Folder for decoded images. Default: keep them in memory.")] = None,
    teacher_cache: Annotated[
        float, typer.Option(help="Cache for features of the frozen encoder, in GiB on the device.")
    ] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run, and files of others in the way.")
    ] = False,
    evaluate: Annotated[bool, typer.Option(help="Evaluate at the end, if there are test images.")] = True,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write a TensorBoard log to OUT/tensorboard.")
    ] = False,
    extend: Annotated[
        Path | None, path_option(help="Run of PatchCore to which the images of --good are added, instead of training.")
    ] = None,
    good: Annotated[
        list[Path] | None,
        path_option(
            help="Good images or folders of them, without any layout, instead of DATA; with --extend, those to add. "
            "May be repeated."
        ),
    ] = None,
    bad: Bad = None,
) -> None:
    """Train a detector on good images, and evaluate it if there are test images."""
    if extend is not None:
        _check_extend_options(context)
        _extend(extend, good or [], all_good=all_good, holdout=holdout or 0.0, device=device)
        return
    if not data and not good and not bad:
        raise USAGE_ERROR("Missing argument 'DATA'.", ctx=context)
    from recontrast.app import train_job as application
    from recontrast.calibration.conformal import describe_promise
    from recontrast.data import datasets
    from recontrast.data.fingerprint import read_fingerprints
    from recontrast.data.locks import lock_folder
    from recontrast.data.near_copies import read_sketches
    from recontrast.data.own_files import check_replaceable
    from recontrast.evaluation.results import FILES as TABLES
    from recontrast.runtime import distributed

    started = time.perf_counter()
    recipe, weights = expand_home(recipe), expand_home(weights)
    values: dict[str, Any] = {"architecture": architecture, "backbone": backbone, "weights": weights, "steps": steps}
    values |= {"batch": batch, "size": size}
    values |= {"tile": tile, "seed": seed, "encoder_bn": encoder_bn, "precision": precision}
    values |= {"channels_last": channels_last, "holdout": holdout, "augment": augment, "sampling": sampling}
    values |= {"shots": None if shots is None else parse_shots(shots)}
    values |= {"window": None if window is None else parse_window(window)}
    changed = {key: value for key, value in values.items() if value is not None} | dict(
        map(parse_change, changes or [])
    )
    application.check_run_options(device=device, cache=cache, teacher_cache=teacher_cache, tensorboard=tensorboard)
    resume = None if resume is None else resolve_checkpoint(resume)
    groups = load_data(data, good, bad, category=category, all_good=all_good) if good or bad else None
    job = application.prepare_job(
        data or [] if groups is None else groups, recipe, changed, category=category, out=out, resume=resume,
        overwrite=overwrite, all_good=all_good, roi=roi,
        budget=None if budget is None else parse_duration("--budget", budget), device=device,
    )  # fmt: skip
    check_replaceable(job.out, TABLES, overwrite=overwrite)
    print_data(datasets.describe(job.groups))
    for note in job.describe():
        if note is not None:
            print_line(note)
    if not is_silent():
        context.with_resource(lock_folder(job.out))  # also while the run is evaluated
    _, world_device = context.with_resource(distributed.join_processes(device))
    try:
        with ProgressBar(f"train {job.category}") as progress:
            result = application.run_job(
                job, device=world_device, cache=cache, teacher_cache=teacher_cache,
                tensorboard=tensorboard and not is_silent(),
                on_step=lambda category, step, steps, note: progress(
                    step, steps, note + job.describe_elapsed(time.perf_counter() - started)),
            )  # fmt: skip
    except KeyboardInterrupt:
        given = [*map(str, data or []), *(f"--good={path}" for path in good or []), *(f"--bad={p}" for p in bad or [])]
        resume_command = f"continue with: recontrast train {shlex.join([*given, '--resume', str(job.target)])}"
        next_step = resume_command if job.target.exists() else "no checkpoint yet"
        if not job.recipe.uses_steps:
            next_step = f"{job.recipe.architecture} is fitted in one pass, which begins anew"
        exit_with_error(f"interrupted; {next_step}", status=130)
    end = job.describe_end(result.seconds, result.state.step)
    print_line(end + job.describe_elapsed(time.perf_counter() - started))
    for line in () if result.calibration is None else describe_promise(result.calibration):
        print_line(line)
    if evaluate and any(sample.split == "test" for sample in job.samples):
        show_metrics(
            result.model,
            job.groups,
            result.recipe,
            job.out,
            result.calibration,
            trained=read_fingerprints(result.state.images),
            sketches=read_sketches(result.state.images),
            batch=result.recipe.batch,
            cache_dir=cache,
        )


def _check_extend_options(context: typer.Context) -> None:
    """Raise ValueError if an option was given that does not go with ``--extend``."""
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in EXTEND_OPTIONS:
            allowed = ", ".join(options[other] for other in EXTEND_OPTIONS[1:])
            shown = "DATA" if name == "data" else options[name]
            raise ValueError(f"--extend: wanted only {allowed} with it, got {shown} too")
    if not context.params.get("good"):
        raise ValueError("--good: wanted good images to add, got none")


def _extend(run: Path, good: list[Path], *, all_good: bool, holdout: float, device: str | None) -> None:
    """Add good images to a fitted detector, and print what was added."""
    from recontrast.calibration.conformal import describe_promise
    from recontrast.data.class_folders import describe_files, list_good_samples
    from recontrast.runtime.device import resolve_device
    from recontrast.training.extend import extend

    file = resolve_checkpoint(run)
    if file.is_file():  # a missing file has its own message
        check_writable(file.parent, "--extend")
    resolve_device(device)
    samples = list_good_samples(good, all_good)
    print_data(describe_files("--good", [sample.path for sample in samples]))
    try:
        with ProgressBar("extend") as progress:
            result = extend(file, samples, holdout=holdout, device=device, on_step=progress, option="--good")
    except KeyboardInterrupt:
        exit_with_error(f"interrupted; {file} is complete: extended, or as it was before", status=130)
    if result.left_out:
        names = ", ".join(map(str, result.left_out[:3])) + (", ..." if len(result.left_out) > 3 else "")
        print_line(f"{len(result.left_out)} images are left out, because they are trained on already: {names}")
    print_line(f"{result.added} images added in {result.seconds:.1f} s, {result.total} in all: {file}")
    for line in () if result.calibration is None else describe_promise(result.calibration):
        print_line(line)
    if result.lost_calibration and result.calibration is None:
        print_line(
            "the calibration is removed, because it belongs to the detector before; to calibrate again, run recontrast "
            f"calibrate {file} --good DIR"
        )
