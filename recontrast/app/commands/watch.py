"""``recontrast watch``: options and output; `recontrast.app.prediction.watch` does the work."""

import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recontrast.app.console import exit_with_error, print_error, print_line
from recontrast.app.options import (
    DetectorFile,
    InferenceArguments,
    Overwrite,
    add_inference_arguments,
    check_writable,
    path_argument,
    path_option,
    resolve_checkpoint,
)

if TYPE_CHECKING:
    from recontrast.app.prediction.output_files import Prediction


@add_inference_arguments
def watch(
    folder: Annotated[Path, path_argument("DIR", "Folder to watch, with its subfolders.")],
    checkpoint: DetectorFile,
    *,
    out: Annotated[Path, path_option(help="Folder for scores.csv, regions.csv, maps/, overlays/ and watch.jsonl.")],
    maps: Annotated[str, typer.Option(help="tiff16, tiff32, npy or none, as predict writes them.")] = "none",
    overlays: Annotated[bool, typer.Option("--overlays", help="Write heat maps laid over the images (PNG).")] = False,
    decide: Annotated[bool, typer.Option("--decide", help="Fail if no decisions can be made.")] = False,
    false_alarm_rate: Annotated[
        float | None, typer.Option(help="Decide at this rate instead of the calibrated one.")
    ] = None,
    settle: Annotated[float, typer.Option(help="Seconds without a change after which a file is complete.")] = 1.0,
    poll: Annotated[float, typer.Option(help="Seconds between two looks at the folder.")] = 0.5,
    batch: Annotated[int, typer.Option(help="Largest number of images in a batch.")] = 8,
    inference: InferenceArguments,
    overwrite: Overwrite = False,
) -> None:
    """Score each image that appears in a folder once, and append its row to scores.csv; Ctrl-C ends it."""
    kinds = ("tiff16", "tiff32", "npy", "none")
    if maps not in kinds:
        raise ValueError(f"--maps: wanted one of {', '.join(kinds)}, got {maps!r}")
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

    file = resolve_checkpoint(checkpoint)
    detector = open_detector(file, inference.device, inference=options)
    calibration = select_calibration(detector, false_alarm_rate, decide, file)
    if detector.calibration_note is not None:
        print_error(f"warning: {detector.calibration_note}")
    stop = threading.Event()
    former = _stop_on_signals(stop)
    print_line(f"watching {folder}: results in {out / 'scores.csv'}; Ctrl-C stops")
    try:
        done = run(
            folder, file, detector, calibration, out,
            WatchOptions(maps, overlays, settle, poll, batch, inference.workers), is_stopped=stop.is_set,
            on_image=_print_prediction, overwrite=overwrite,
        )  # fmt: skip
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    print_line(f"stopped: {done} images scored; the same command goes on")


def _stop_on_signals(stop: threading.Event) -> dict[Any, Any]:
    """Let Ctrl-C, SIGTERM and SIGHUP set ``stop``, the second time at once; return the former handlers."""

    def handle(number: int, frame: Any) -> None:
        if stop.is_set():
            exit_with_error("a second signal: stopped at once; the same command goes on", status=130)
        stop.set()

    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return {n: signal.signal(n, handle) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}


def _print_prediction(prediction: "Prediction") -> None:
    """Print one line for an image: path, score and decision, or why there is none."""
    if prediction.error is not None:
        print_error(prediction.error)
        return
    decided = "" if prediction.decision is None else f" {prediction.decision.label}"
    print_line(f"{prediction.path}: {prediction.score:.6g}{decided}")
