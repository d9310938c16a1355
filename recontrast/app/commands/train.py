"""``recontrast train``: options and output; `recontrast.app.train_job` does the work."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from recontrast.app.command_group import USAGE_ERROR
from recontrast.app.commands.evaluate import show_metrics
from recontrast.app.console import exit_with_error, is_silent, print_data, print_line
from recontrast.app.data_options import Bad, load_data
from recontrast.app.option_groups import expand_options
from recontrast.app.options import (
    AllGood,
    Device,
    TrainedCategory,
    TrainingData,
    check_writable,
    expand_home,
    parse_duration,
    path_option,
    resolve_checkpoint,
)
from recontrast.app.progress_bar import ProgressBar
from recontrast.app.recipe_options import TrainRecipeOptions

if TYPE_CHECKING:
    import torch

    from recontrast.app.train_job import TrainJob
    from recontrast.calibration.conformal import Calibration
    from recontrast.training.train import TrainResult

EXTEND_OPTIONS = ("extend", "good", "all_good", "holdout", "steps", "device", "imports", "threads")  # that go together


@expand_options
def train(  # 36 options
    context: typer.Context,
    data: TrainingData = None,
    category: TrainedCategory = None,
    all_good: AllGood = False,
    out: Annotated[Path | None, path_option(help="Folder of the run. Default: runs/CATEGORY.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A recipe of the paper or a YAML file, whose values take the place of the defaults below. "
            "Default: mvtec, with --holdout 0.1."
        ),
    ] = None,
    *,
    fields: TrainRecipeOptions,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time for the training, such as 90s, 3m or 1h. What fits is chosen from the speed of this machine: "
            "an ensemble at the largest image size, or with --architecture or --recipe its number of steps."
        ),
    ] = None,
    roi: Annotated[
        Path | None,
        path_option(
            help="Region of interest: a mask image (black: do not look), a JSON file of rectangles and polygons, or a "
            "folder with one of them for each image. Default: whole images."
        ),
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
        Path | None,
        path_option(
            help="Run that goes on with the images of --good, instead of a new one: PatchCore and PaDiM gain them, the "
            "ensemble too if its former images are given as well, others make further --steps (default: a quarter of "
            "those of the run) on them."
        ),
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
        _extend(extend, good or [], all_good=all_good, holdout=fields.holdout or 0.0, steps=fields.steps, device=device)
        return
    if not data and not good and not bad:
        raise USAGE_ERROR("Missing argument 'DATA'.", ctx=context)
    from recontrast.app.train_job import check_run_options, find_views_from, prepare_job
    from recontrast.data.locks import lock_folder
    from recontrast.data.own_files import check_replaceable
    from recontrast.evaluation.results import FILES as TABLES
    from recontrast.runtime import distributed

    started = time.perf_counter()
    recipe, changes = expand_home(recipe), fields.list_changes()
    check_run_options(device=device, cache=cache, teacher_cache=teacher_cache, tensorboard=tensorboard)
    resume = None if resume is None else resolve_checkpoint(resume)
    groups = None
    if good or bad:
        views_from = find_views_from(recipe, changes, resume)
        groups = load_data(data, good, bad, category=category, all_good=all_good, views_from=views_from)
    job = prepare_job(
        data or [] if groups is None else groups, recipe, changes, category=category, out=out, resume=resume,
        overwrite=overwrite, all_good=all_good, roi=roi,
        budget=None if budget is None else parse_duration("--budget", budget), device=device,
    )  # fmt: skip
    check_replaceable(job.out, TABLES, overwrite=overwrite)
    _print_job(job)
    if not is_silent():
        context.with_resource(lock_folder(job.out))  # also while the run is evaluated
    _, world_device = context.with_resource(distributed.join_processes(device))
    try:
        result = _run(job, started, world_device, cache, teacher_cache, tensorboard and not is_silent())
    except KeyboardInterrupt:
        _exit_interrupted(job, data or [], good or [], bad or [])
    _print_end(job, result, started)
    if evaluate and any(sample.split == "test" for sample in job.samples):
        _evaluate(job, result, cache)


def _print_job(job: "TrainJob") -> None:
    """Print which images are trained on, and what was chosen."""
    from recontrast.data import datasets

    print_data(datasets.describe(job.groups))
    for note in job.describe():
        if note is not None:
            print_line(note)


def _run(
    job: "TrainJob", started: float, device: "torch.device", cache: Path | None, teacher_cache: float, tensorboard: bool
) -> "TrainResult":
    """Train with a progress bar."""
    from recontrast.app.train_job import run_job

    with ProgressBar(f"train {job.category}") as progress:
        return run_job(
            job, device=device, cache=cache, teacher_cache=teacher_cache, tensorboard=tensorboard,
            on_step=lambda category, step, steps, note: progress(
                step, steps, note + job.describe_elapsed(time.perf_counter() - started)),
        )  # fmt: skip


def _exit_interrupted(job: "TrainJob", data: list[Path], good: list[Path], bad: list[Path]) -> NoReturn:
    """Say how the run goes on, and exit."""
    given = [*map(str, data), *(f"--good={path}" for path in good), *(f"--bad={path}" for path in bad)]
    resume_command = f"continue with: recontrast train {shlex.join([*given, '--resume', str(job.target)])}"
    next_step = resume_command if job.target.exists() else "no checkpoint yet"
    if not job.recipe.uses_steps:
        next_step = f"{job.recipe.architecture} is fitted in one pass, which begins anew"
    exit_with_error(f"interrupted; {next_step}", status=130)


def _print_end(job: "TrainJob", result: "TrainResult", started: float) -> None:
    """Print how long the training took, and what its calibration promises."""
    end = job.describe_end(result.seconds, result.state.step)
    print_line(end + job.describe_elapsed(time.perf_counter() - started))
    _print_promise(result.calibration)


def _print_promise(calibration: "Calibration | None") -> None:
    """Print what a calibration promises, if there is one."""
    from recontrast.calibration.conformal import describe_promise

    for line in () if calibration is None else describe_promise(calibration):
        print_line(line)


def _evaluate(job: "TrainJob", result: "TrainResult", cache: Path | None) -> None:
    """Evaluate the trained detector, and print its metrics."""
    from recontrast.data.fingerprint import read_fingerprints
    from recontrast.data.near_copies import read_sketches

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


def _extend(
    run: Path, good: list[Path], *, all_good: bool, holdout: float, steps: int | None, device: str | None
) -> None:
    """Add good images to a fitted detector, and print what was added."""
    from recontrast import checkpoint as checkpoints
    from recontrast.data.class_folders import describe_files
    from recontrast.data.list_files import is_list
    from recontrast.data.unsplit import list_good_of_classes
    from recontrast.runtime.device import resolve_device
    from recontrast.training.extend import extend

    file = resolve_checkpoint(run)
    if file.is_file():  # a missing file has its own message
        check_writable(file.parent, "--extend")
    resolve_device(device)
    views_from = checkpoints.load(file, mapped=True).recipe.views_from if any(map(is_list, good)) else None
    samples = list_good_of_classes(good, all_good, views_from)
    print_data(describe_files("--good", [sample.path for sample in samples]))
    try:
        with ProgressBar("extend") as progress:
            result = extend(
                file, samples, holdout=holdout, steps=steps, device=device, on_step=progress, option="--good"
            )
    except KeyboardInterrupt:
        exit_with_error(f"interrupted; {file} is complete: extended, or as it was before", status=130)
    if result.left_out:
        names = ", ".join(map(str, result.left_out[:3])) + (", ..." if len(result.left_out) > 3 else "")
        reason = "copies" if result.steps or result.again else "trained on already"
        print_line(f"{len(result.left_out)} images are left out, because they are {reason}: {names}")
    if result.steps:
        images = f"{result.added} images"  # without fingerprints, new and former ones
        if result.total is not None:
            images = f"{result.added} new images and {result.again} of the run"
        print_line(f"{result.steps} further steps on {images} in {result.seconds:.1f} s: {file}")
        if result.forgotten:
            print_line(
                f"{result.forgotten} images of the run were not given: what they alone show may be forgotten; give "
                "them with --good as well"
            )
    else:
        in_all = "" if result.total is None else f", {result.total} in all"
        former = f" to {result.again} of the run" if result.again else ""
        print_line(f"{result.added} images added{former} in {result.seconds:.1f} s{in_all}: {file}")
    _print_promise(result.calibration)
    if result.lost_calibration and result.calibration is None:
        print_line(
            "the calibration is removed, because it belongs to the detector before; to calibrate again, run recontrast "
            f"calibrate {file} --good DIR"
        )
