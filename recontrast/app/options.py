"""Options shared by several commands, and how their values are parsed."""

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

Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. Default: the GPU, if there is one.")]
Batch = Annotated[int, typer.Option(help="Number of images per batch.")]
Data = Annotated[
    list[Path],
    typer.Argument(
        metavar="DATA", help="Data sets or categories in MVTec AD layout; train also takes folders of good images."
    ),
]
CheckpointFile = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="checkpoint.pt, or the folder of the run that contains it.")
]

DetectorFile = Annotated[
    Path,
    typer.Argument(metavar="DETECTOR", help="checkpoint.pt, the folder of its run, or an exported .onnx, .pt2, .xml."),
]
Views = Annotated[
    str | None,
    typer.Option(help="Features that make up the map: both, trained or frozen (0.7 of the time). Default: as trained."),
]
Precision = Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: as trained.")]
NoFold = Annotated[
    bool, typer.Option("--no-fold", help="Do not fold BatchNorm into the convolutions (equal up to rounding).")
]
Compile = Annotated[bool, typer.Option("--compile", help="Use torch.compile: the first batch takes a minute or more.")]
Layout = Annotated[str | None, typer.Option(help="channels_last or nchw. Default: as trained.")]
Workers = Annotated[int | None, typer.Option(help="Threads that decode images. Default: by the number of CPUs.")]


def build_inference_options(
    device: str | None,
    views: str | None = None,
    precision: str | None = None,
    layout: str | None = None,
    no_fold: bool = False,
    compiled: bool = False,
    workers: int | None = None,
) -> "InferenceOptions":
    """Build the inference options of a command line; warn if bfloat16 is slow on the device."""
    from recontrast.inference.options import InferenceOptions
    from recontrast.runtime.device import is_bfloat16_fast, resolve_device

    for name, value, choices in (
        ("views", views, ("both", "trained", "frozen")), ("precision", precision, ("float32", "bfloat16")),
        ("layout", layout, ("channels_last", "nchw")),
    ):  # fmt: skip
        if value not in (None, *choices):
            raise ValueError(f"--{name}: wanted {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers: wanted at least 1, got {workers}")
    compiler = os.environ.get("CXX", "g++")
    if compiled and resolve_device(device).type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"--compile: wanted a C++ compiler for the CPU, got no {compiler} on the PATH (CXX names another)"
        )
    if precision == "bfloat16" and not is_bfloat16_fast(resolve_device(device)):
        print_error("this CPU has no kernels for bfloat16: it takes several times as long as float32")
    channels_last = None if layout is None else layout == "channels_last"
    return InferenceOptions(
        cast("Any", views), cast("Any", precision), channels_last, False if no_fold else None, compiled
    )


def resolve_checkpoint(path: Path) -> Path:
    """Return the path of the checkpoint: ``path`` itself, or checkpoint.pt in the folder of a run."""
    return path / "checkpoint.pt" if path.is_dir() else path


def check_writable(folder: Path, option: str = "--out") -> None:
    """Check that files can be written to a folder, before any work that would be lost.

    Args:
        folder: Path of the folder. If it does not exist, its nearest existing parent is checked. Nothing is created.
        option: Name of the option for the error message.

    Raises:
        ValueError: If the folder cannot be written or created.
    """
    existing = Path(os.path.abspath(folder))
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        reason = "not a folder" if existing == Path(os.path.abspath(folder)) else f"{existing} is not a folder"
    else:
        try:
            with tempfile.TemporaryFile(dir=existing):  # permission bits say nothing for root or a read-only disk
                return
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
    raise ValueError(f"{option}: wanted a folder that can be written, got {folder} ({reason})")


def parse_change(text: str) -> tuple[str, Any]:
    """Parse ``key=value``: the value becomes a number, a bool, None or a list, else it stays a string."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise ValueError(f"--set: wanted KEY=VALUE, got {text!r}")
    constants = {"true": True, "false": False, "none": None}
    if value.lower() in constants:
        return key, constants[value.lower()]
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def parse_list(text: str | None) -> list[str]:
    """Split a comma-separated list."""
    return [word.strip() for word in text.split(",") if word.strip()] if text else []


def parse_numbers(option: str, text: str | None) -> list[int]:
    """Split a comma-separated list of integers; the error message names ``option``."""
    try:
        return [int(word) for word in parse_list(text)]
    except ValueError:
        raise ValueError(f"{option}: wanted comma-separated integers, got {text!r}") from None
