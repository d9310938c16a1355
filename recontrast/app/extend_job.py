"""Extension of a detector on the command line, ``recontrast train --extend``: its options and output."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from recontrast.app.console import exit_with_error, print_data, print_line, print_promise
from recontrast.app.options import check_writable, resolve_checkpoint
from recontrast.app.progress_bar import ProgressBar

if TYPE_CHECKING:
    from recontrast.training.extend import Extension

EXTEND_OPTIONS = ("extend", "good", "all_good", "holdout", "steps", "device", "imports", "threads")  # that go together


def check_extend_options(context: typer.Context) -> None:
    """Check that only options were given that go with ``--extend``.

    Args:
        context: Context of the command.

    Raises:
        ValueError: If another one was given, or no images.
    """
    options = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE" and name not in EXTEND_OPTIONS:
            allowed = ", ".join(options[other] for other in EXTEND_OPTIONS[1:])
            shown = "DATA" if name == "data" else options[name]
            raise ValueError(f"--extend: wanted only {allowed} with it, got {shown} too")
    if not context.params.get("good"):
        raise ValueError("--good: wanted good images to add, got none")


def extend_run(
    run: Path, good: list[Path], *, all_good: bool, holdout: float, steps: int | None, device: str | None
) -> None:
    """Add good images to a detector, and print what was added.

    Args:
        run: Run or checkpoint of the detector.
        good: Files, folders and lists of good images.
        all_good: Whether all images in folders are good.
        holdout: Share of the new images that is held out for a calibration.
        steps: Number of further steps; None: the default.
        device: PyTorch device; None for the default.

    Raises:
        ValueError: If the images or options do not fit the detector.
        OSError: If a file cannot be read or written.
    """
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
    _print_result(file, result)


def _print_result(file: Path, result: "Extension") -> None:
    """Print what was added and left out, and what became of the calibration."""
    noun = result.noun
    if result.left_out:
        names = ", ".join(map(str, result.left_out[:3])) + (", ..." if len(result.left_out) > 3 else "")
        reason = "copies" if result.steps or result.again else "trained on already"
        print_line(f"{len(result.left_out)} {noun}s are left out, because they are {reason}: {names}")
    if result.steps:
        added = f"{result.added} {noun}s"  # without fingerprints, new and former ones
        if result.total is not None:
            added = f"{result.added} new {noun}s and {result.again} of the run"
        print_line(f"{result.steps} further steps on {added} in {result.seconds:.1f} s: {file}")
        if result.forgotten:
            print_line(
                f"{result.forgotten} {noun}s of the run were not given: what they alone show may be forgotten; give "
                "them with --good as well"
            )
    else:
        in_all = "" if result.total is None else f", {result.total} in all"
        former = f" to {result.again} of the run" if result.again else ""
        print_line(f"{result.added} {noun}s added{former} in {result.seconds:.1f} s{in_all}: {file}")
    print_promise(result.calibration)
    if result.lost_calibration and result.calibration is None:
        print_line(
            "the calibration is removed, because it belongs to the detector before; to calibrate again, run recontrast "
            f"calibrate {file} --good DIR"
        )
