"""``recontrast serve``: answer requests over HTTP; `recontrast.service` does the work."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recontrast.app.console import exit_with_error, print_error, print_line, print_warning
from recontrast.app.option_groups import expand_options
from recontrast.app.options import InferenceArguments, MustDecide, OtherRate, resolve_checkpoint
from recontrast.runtime.termination import handle_signals

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping, Sequence

    from recontrast.inference.protocol import Detector
    from recontrast.service.detectors import ServedDetector
    from recontrast.service.service import Service


@expand_options
def serve(  # 17 options
    detectors: Annotated[
        list[str],
        typer.Argument(metavar="DETECTOR", help="Run, checkpoint or exported file; several as NAME=DETECTOR."),
    ],
    *,
    host: Annotated[str, typer.Option(help="Interface to listen on. Other machines need one, and a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port; 0 chooses a free one.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="RECONTRAST_TOKEN", help="Token that requests must bring.")
    ] = None,
    false_alarm_rate: OtherRate = None,
    decide: MustDecide = False,
    batch: Annotated[int, typer.Option(help="Largest number of images in a batch.")] = 8,
    window: Annotated[float, typer.Option(help="Milliseconds that an image waits for others on their way.")] = 5.0,
    queue: Annotated[int, typer.Option(help="Largest number of images at a time; others are answered 429.")] = 64,
    max_bytes: Annotated[
        int, typer.Option(help="Largest request in bytes: an image file, or all views of a part.")
    ] = 32 * 2**20,
    max_pixels: Annotated[
        int, typer.Option(help="Largest image in pixels, or all views of a part together.")
    ] = 50_000_000,
    body_timeout: Annotated[float, typer.Option(help="Seconds within which a client must send its image.")] = 30.0,
    reload: Annotated[float, typer.Option(help="Seconds between looks for a changed file; 0 looks never.")] = 2.0,
    inference: InferenceArguments,
) -> None:
    """Answer HTTP requests with scores and decisions, and show a page in the browser."""
    _check_package()
    from recontrast.data.system import count_cpus
    from recontrast.inference.decisions import select_calibration
    from recontrast.inference.detector import open_detector
    from recontrast.service.access import check_token
    from recontrast.service.detectors import parse_names
    from recontrast.service.limits import Limits
    from recontrast.service.server import bind
    from recontrast.service.service import Service

    options = inference.build()
    names = {name: resolve_checkpoint(path) for name, path in parse_names(detectors).items()}
    check_token(token, host)
    _check_numbers(
        port, {"--window": window, "--reload": reload},
        {"--queue": queue, "--max-bytes": max_bytes, "--max-pixels": max_pixels, "--body-timeout": body_timeout},
    )  # fmt: skip
    limits = Limits(body_bytes=max_bytes, pixels=max_pixels, queue=queue, body_seconds=body_timeout)
    sockets = bind(host, port)

    def open_file(path: Path) -> "Detector":
        detector = open_detector(path, inference.device, inference=options)
        calibration = select_calibration(detector, false_alarm_rate, decide, path)
        if calibration is not None:
            detector.calibration = calibration
        return detector

    served = _open_detectors(names, open_file, sockets)
    service = Service(
        served, sockets, limits, token=token, batch=batch, window=window / 1000,
        workers=inference.workers or min(4, count_cpus()), reload_seconds=reload, on_event=print_error,
    )  # fmt: skip
    _print_served(served, host, service.port)
    run_until_stopped(service)


def _check_package() -> None:
    """Raise ImportError if the package that speaks HTTP is not installed."""
    try:
        import h11  # noqa: F401
    except ImportError as error:
        advice = "pip install 'recontrast[serve]'"
        raise ImportError(f"serve: wanted the package h11, got none installed: {advice}") from error


def _check_numbers(port: int, at_least_zero: "Mapping[str, float]", above_zero: "Mapping[str, float]") -> None:
    """Raise ValueError if the port, or a number by the name of its option, is out of range."""
    if not 0 <= port < 65536:
        raise ValueError(f"--port: wanted a number from 0 to 65535, got {port}")
    for option, value in at_least_zero.items():
        if not 0 <= value < 86400:
            raise ValueError(f"{option}: wanted a number from 0, got {value:g}")
    for option, value in above_zero.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{option}: wanted a number above 0, got {value:g}")


def _open_detectors(
    names: "Mapping[str, Path]", open_file: "Callable[[Path], Detector]", sockets: "Sequence[socket.socket]"
) -> "dict[str, ServedDetector]":
    """Open the detectors by name; close the sockets if one of them cannot be opened."""
    from recontrast.service.detectors import ServedDetector

    try:
        return {name: ServedDetector(name, path, open_file, print_error) for name, path in names.items()}
    except BaseException:
        for listener in sockets:
            listener.close()
        raise


def _print_served(served: "Mapping[str, ServedDetector]", host: str, port: int) -> None:
    """Print what runs where, and what its calibrations lack."""
    for name, detector in served.items():
        note = detector.current.detector.calibration_note
        if note is not None:
            print_warning(f"{name}: {note}")
    shown = f"[{host}]" if ":" in host else host
    print_line(f"serving {', '.join(served)} at http://{shown}:{port}/ (description: /docs); Ctrl-C stops")


def run_until_stopped(service: "Service") -> None:
    """Wait until a signal orders the service to stop and it has answered what it accepted; a second one ends at once.

    Args:
        service: Running service.
    """
    signals = 0

    def stop(number: int, frame: Any) -> None:
        nonlocal signals
        signals += 1
        service.stop()

    with handle_signals(stop):
        while not service.wait(0.5):
            if signals > 1:
                print_error("a second signal: stopped without answering what was accepted")
                os._exit(130)
    counts = service.application.counters
    if counts.accepted != counts.answered:
        exit_with_error(f"serve: wanted all accepted images answered, got {counts.answered} of {counts.accepted}", 1)
