"""Options that several commands have, and what the words of an option mean."""

import ast
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from recontrast.app.console import print_error

if TYPE_CHECKING:
    from recontrast.inference.options import InferenceOptions

Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. Default: the GPU where there is one.")]
Batch = Annotated[int, typer.Option(help="Images at once.")]
Data = Annotated[
    list[Path],
    typer.Argument(
        metavar="DATA", help="Data sets or categories in MVTec AD layout; train takes folders of good images too."
    ),
]
CheckpointFile = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="checkpoint.pt, or the folder of the run that holds it.")
]

DetectorFile = Annotated[
    Path,
    typer.Argument(metavar="DETECTOR", help="checkpoint.pt, the folder of its run, or an exported .onnx, .pt2, .xml."),
]
Views = Annotated[
    str | None,
    typer.Option(
        help="Maps of this target alone: trained or frozen, in 0.7 of the time; or both. Default: as trained."
    ),
]
Precision = Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: as trained.")]
NoFold = Annotated[
    bool, typer.Option("--no-fold", help="Leave BatchNorm out of the convolutions: equal but for rounding.")
]
Compile = Annotated[bool, typer.Option("--compile", help="Through torch.compile: a minute and more at the start.")]
Layout = Annotated[str | None, typer.Option(help="channels_last or nchw. Default: as trained.")]
Workers = Annotated[int | None, typer.Option(help="Threads that decode. Default: by the number of CPUs.")]


def build_inference_options(
    device: str | None,
    views: str | None = None,
    precision: str | None = None,
    layout: str | None = None,
    no_fold: bool = False,
    compiled: bool = False,
    workers: int | None = None,
) -> "InferenceOptions":
    """How the options say that a model is run; tells where bfloat16 does not pay."""
    from recontrast.inference.options import InferenceOptions
    from recontrast.runtime.device import is_bfloat16_fast, resolve_device

    for name, value, wanted in (
        ("views", views, ("both", "trained", "frozen")), ("precision", precision, ("float32", "bfloat16")),
        ("layout", layout, ("channels_last", "nchw")),
    ):  # fmt: skip
        if value not in (None, *wanted):
            raise ValueError(f"--{name}: wanted {', '.join(wanted[:-1])} or {wanted[-1]}, got {value!r}")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers: wanted at least 1, got {workers}")
    compiler = os.environ.get("CXX", "g++")
    if compiled and resolve_device(device).type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"--compile: wanted a C++ compiler for the CPU, got no {compiler} on the PATH (CXX names another)"
        )
    if precision == "bfloat16" and not is_bfloat16_fast(resolve_device(device)):
        print_error("this CPU has no kernels for bfloat16: it takes several times as long as float32")
    last = None if layout is None else layout == "channels_last"
    return InferenceOptions(cast("Any", views), cast("Any", precision), last, False if no_fold else None, compiled)


def resolve_checkpoint(path: Path) -> Path:
    """The checkpoint that a file or the folder of a run stands for."""
    return path / "checkpoint.pt" if path.is_dir() else path


def check_writable(folder: Path, option: str = "--out") -> None:
    """Refuse a folder in which nothing can be written, or that cannot be made, before there is any work to lose.

    Args:
        folder: as it was named; where it is not there yet, the nearest one above it counts. Nothing is made.
        option: what named it.

    Raises:
        ValueError: the sentence, with the system's reason.
    """
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        reason = "not a folder" if place == Path(os.path.abspath(folder)) else f"{place} is not a folder"
    else:
        try:
            with tempfile.TemporaryFile(dir=place):  # permission bits alone say little: of root, of a read-only disk
                return
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
    raise ValueError(f"{option}: wanted a folder that can be written, got {folder} ({reason})")


def parse_change(text: str) -> tuple[str, Any]:
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


def parse_list(text: str | None) -> list[str]:
    """The words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()] if text else []


def parse_numbers(option: str, text: str | None) -> list[int]:
    """The whole numbers between commas; ``option`` is named where there are other things."""
    try:
        return [int(word) for word in parse_list(text)]
    except ValueError:
        raise ValueError(f"{option}: wanted whole numbers and commas, got {text!r}") from None
