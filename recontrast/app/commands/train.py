"""``recontrast train``: options and output; `recontrast.app.prepare_training` and `run_training` do the work."""

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from recontrast.app.comma_separated import check_shots
from recontrast.app.command_group import USAGE_ERROR
from recontrast.app.commands.evaluate import show_metrics
from recontrast.app.console import exit_with_error, is_silent, print_data, print_line, print_promise
from recontrast.app.data_options import Bad, load_data
from recontrast.app.extend_job import check_extend_options, extend_run
from recontrast.app.option_groups import expand_options
from recontrast.app.options import (
    AllGood,
    Device,
    TrainedCategory,
    TrainingData,
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
    from recontrast.training.train import TrainResult


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
        check_extend_options(context)
        extend_run(
            extend, good or [], all_good=all_good, holdout=fields.holdout or 0.0, steps=fields.steps, device=device
        )
        return
    if not data and not good and not bad:
        raise USAGE_ERROR("Missing argument 'DATA'.", ctx=context)
    check_shots(data or (), fields.shots)
    from recontrast.app.prepare_training import find_views_from, prepare_job
    from recontrast.app.run_training import check_run_options
    from recontrast.data.own_files import check_replaceable
    from recontrast.evaluation.results import FILES as TABLES

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
    world_device = _join(context, job, device)
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


def _join(context: typer.Context, job: "TrainJob", device: str | None) -> "torch.device":
    """Lock the folder of a run and join the processes of torchrun until the command ends; return the device."""
    from recontrast.data.locks import lock_folder
    from recontrast.runtime import distributed

    if not is_silent():
        context.with_resource(lock_folder(job.out))  # also while the run is evaluated
    _, world_device = context.with_resource(distributed.join_processes(device))
    return world_device


def _run(
    job: "TrainJob", started: float, device: "torch.device", cache: Path | None, teacher_cache: float, tensorboard: bool
) -> "TrainResult":
    """Train with a progress bar."""
    from recontrast.app.run_training import run_job

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
    print_promise(result.calibration, result.recipe.noun)


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
