"""``recontrast watch``: options and output; `recontrast.app.prediction.watch` does the work."""

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recontrast.app.console import exit_with_error, print_error, print_line, print_warning
from recontrast.app.option_groups import expand_options
from recontrast.app.options import (
    DetectorFile,
    InferenceArguments,
    MapFormat,
    MustDecide,
    OtherRate,
    Overwrite,
    check_map_format,
    check_writable,
    path_argument,
    path_option,
    resolve_checkpoint,
)
from recontrast.runtime.termination import handle_signals

if TYPE_CHECKING:
    from recontrast.app.prediction.output_files import Prediction


@expand_options
def watch(
    folder: Annotated[Path, path_argument("DIR", "Folder to watch, with its subfolders.")],
    checkpoint: DetectorFile,
    *,
    out: Annotated[Path, path_option(help="Folder for scores.csv, regions.csv, maps/, overlays/ and watch.jsonl.")],
    maps: MapFormat = "none",
    overlays: Annotated[bool, typer.Option("--overlays", help="Write heat maps laid over the images (PNG).")] = False,
    decide: MustDecide = False,
    false_alarm_rate: OtherRate = None,
    settle: Annotated[float, typer.Option(help="Seconds without a change after which a file is complete.")] = 1.0,
    poll: Annotated[float, typer.Option(help="Seconds between two looks at the folder.")] = 0.5,
    batch: Annotated[int, typer.Option(help="Largest number of images in a batch.")] = 8,
    inference: InferenceArguments,
    overwrite: Overwrite = False,
) -> None:
    """Score each image that appears in a folder once, and append its row to scores.csv; Ctrl-C ends it."""
    check_map_format(maps)
    for option, value in (("--settle", settle), ("--poll", poll)):
        if not 0 < value < 86400:
            raise ValueError(f"{option}: wanted a number of seconds above 0, got {value:g}")
    check_writable(out)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: wanted a folder to watch, got no such folder (watch DIR DETECTOR)")
    options = inference.build()
    from recontrast.app.prediction.watch import WatchOptions
    from recontrast.app.prediction.watch import watch as run
    from recontrast.inference.decisions import select_calibration
    from recontrast.inference.detector import open_detector
    from recontrast.recipes.recipe import refuse_views

    file = resolve_checkpoint(checkpoint)
    detector = open_detector(file, inference.device, inference=options)
    refuse_views(detector.recipe, f"{file}", "to watch a folder with")
    calibration = select_calibration(detector, false_alarm_rate, decide, file)
    if detector.calibration_note is not None:
        print_warning(detector.calibration_note)
    stop = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            exit_with_error("a second signal: stopped at once; the same command goes on", status=130)
        stop.set()

    with handle_signals(handle):
        print_line(f"watching {folder}: results in {out / 'scores.csv'}; Ctrl-C stops")
        done = run(
            folder, file, detector, calibration, out,
            WatchOptions(maps, overlays, settle, poll, batch, inference.workers), is_stopped=stop.is_set,
            on_image=_print_prediction, overwrite=overwrite,
        )  # fmt: skip
    print_line(f"stopped: {done} images scored; the same command goes on")


def _print_prediction(prediction: "Prediction") -> None:
    """Print one line for an image: path, score and decision, or why there is none."""
    if prediction.error is not None:
        print_error(prediction.error)
        return
    decided = "" if prediction.decision is None else f" {prediction.decision.label}"
    print_line(f"{prediction.path}: {prediction.score:.6g}{decided}")
