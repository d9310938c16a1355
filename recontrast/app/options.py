"""Options shared by several commands, and how their values are parsed."""

import ast
import math
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from recontrast.app.console import print_error

if TYPE_CHECKING:
    from recontrast.inference.options import InferenceOptions


NAMED_NONE = ("rule", "augment")  # recipe fields with a value that is called "none"


def parse_path(text: str | Path) -> Path:
    """Parse a path of the command line: ``~`` stands for the home folder, also in ``--out=~/runs``.

    Args:
        text: Argument, or the default of an option.

    Returns:
        The path.

    Raises:
        typer.BadParameter: If the text is empty or holds a null byte.
    """
    if not str(text):
        raise typer.BadParameter("wanted a path, got an empty text")
    if "\0" in str(text):
        raise typer.BadParameter(f"wanted a path, got a null byte in {text}")
    return Path(os.path.expanduser(text))


def expand_home(text: str | None) -> str | None:
    """Replace ``~`` at the start of a text that may be a path or a name; None stays None."""
    return None if text is None else os.path.expanduser(text)


def path_option(*names: str, help: str) -> Any:
    """Declare an option whose value is a path, see `parse_path`."""
    return typer.Option(*names, parser=parse_path, metavar="PATH", help=help)


def path_argument(metavar: str, help: str) -> Any:
    """Declare an argument whose value is a path, see `parse_path`."""
    return typer.Argument(parser=parse_path, metavar=metavar, help=help)


Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps. Default: the CUDA GPU, if there is one.")]
Batch = Annotated[int, typer.Option(help="Number of images per batch.")]
Data = Annotated[
    list[Path] | None,
    path_argument("DATA", "Data sets or categories in MVTec AD layout, or lists (.csv, .jsonl, .parquet)."),
]
TrainingData = Annotated[
    list[Path] | None,
    path_argument("DATA", "Data sets or categories in MVTec AD layout, folders of good images, or lists."),
]
TrainedCategory = Annotated[
    str | None,
    typer.Option(help="Name of a category in DATA, or all for one detector of all. Default: the only one."),
]
OneCategory = Annotated[str | None, typer.Option(help="Name of one category. Default: all in DATA.")]
AllGood = Annotated[
    bool,
    typer.Option("--all-good", help="All images in a plain folder are good, whatever the names of its subfolders."),
]
CheckpointFile = Annotated[
    Path, path_argument("CHECKPOINT", "checkpoint.pt, or the folder of the run that contains it.")
]
DetectorFile = Annotated[
    Path, path_argument("DETECTOR", "checkpoint.pt, the folder of its run, or an exported .onnx, .pt2, .xml.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files in the way that recontrast did not write.")]
Weights = Annotated[
    str | None,
    typer.Option(help="Backbone weights: a .pth, .pt or .safetensors file, package, or random. Default: timm's hub."),
]
OtherRoi = Annotated[
    Path | None,
    path_option(
        help="Another region of interest, as in train; the calibration does not hold for it. Default: as trained."
    ),
]
MapFormat = Annotated[
    str,
    typer.Option(
        help="Anomaly maps: tiff16 (uint16, scale in scores.json, for watch in maps/scale.json), tiff32 or npy "
        "(float32), or none."
    ),
]
MustDecide = Annotated[
    bool,
    typer.Option(
        "--decide",
        help="Fail if no decisions can be made. Without it, a detector that is not calibrated only gives scores.",
    ),
]
OtherRate = Annotated[float | None, typer.Option(help="Decide at this false-alarm rate instead of the calibrated one.")]
Views = Annotated[
    str | None,
    typer.Option(help="Features that make up the map: both, trained or frozen (0.7 of the time). Default: as trained."),
]
Precision = Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: as trained.")]


Imports = Annotated[
    list[str] | None,
    typer.Option("--import", metavar="MODULE", help="Module of your architectures, whose code runs; may be repeated."),
]


Threads = Annotated[
    int | None,
    typer.Option(
        help="Threads of the network on the CPU. Default: what is faster, measured again now and then; the last digits "
        "depend on it.",
    ),
]


@dataclass(frozen=True)
class InferenceArguments:
    """Options of commands that score images."""

    views: Views = None
    precision: Precision = None
    layout: Annotated[str | None, typer.Option(help="channels_last or nchw. Default: as trained.")] = None
    no_fold: Annotated[
        bool, typer.Option("--no-fold", help="Do not fold BatchNorm into the convolutions (equal up to rounding).")
    ] = False
    compiled: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile: the first batch takes a minute or more.")
    ] = False
    batch: Batch = 16
    workers: Annotated[int | None, typer.Option(help="Threads that decode images. Default: by the number of CPUs.")] = (
        None
    )
    device: Device = None

    def build(self) -> "InferenceOptions":
        """Check the options, and return those that concern the network."""
        if self.batch < 1:
            raise ValueError(f"--batch: wanted at least 1 image, got {self.batch}")
        return build_inference_options(
            self.device, self.views, self.precision, self.layout, self.no_fold, self.compiled, self.workers
        )


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

    for name, value, choices in (
        ("views", views, ("both", "trained", "frozen")), ("precision", precision, ("float32", "bfloat16")),
        ("layout", layout, ("channels_last", "nchw")),
    ):  # fmt: skip
        if value not in (None, *choices):
            raise ValueError(f"--{name}: wanted {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}")
    if device not in (None, "cpu"):
        from recontrast.runtime.device import resolve_device

        resolve_device(device)  # raises an error if this machine does not have it
    if workers is not None and workers < 1:
        raise ValueError(f"--workers: wanted at least 1, got {workers}")
    if compiled or precision == "bfloat16":  # of a checkpoint, which needs PyTorch
        from recontrast.runtime.device import is_bfloat16_fast, resolve_device

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


def check_map_format(maps: str) -> None:
    """Raise ValueError if anomaly maps cannot be written in a format."""
    formats = ("tiff16", "tiff32", "npy", "none")
    if maps not in formats:
        raise ValueError(f"--maps: wanted one of {', '.join(formats)}, got {maps!r}")


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
    if value.lower() in constants and key not in NAMED_NONE:
        return key, constants[value.lower()]
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two for deeply nested brackets
        return key, os.path.expanduser(value) if key == "weights" else value


def parse_values(text: str) -> tuple[str, list[Any]]:
    """Parse ``key=value,value``; each value is parsed as in `parse_change`."""
    key, sign, values = text.partition("=")
    if not sign or not key or not parse_list(values):
        raise ValueError(f"--vary: wanted KEY=VALUE,VALUE, got {text!r}")
    return key, [parse_change(f"{key}={value}")[1] for value in parse_list(values)]


def parse_duration(option: str, value: str | float) -> float:
    """Return the seconds of a duration such as 90, "90s", "3m" or "1.5h"; the error message names ``option``."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    text = str(value).strip().lower()
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{option}: wanted a duration such as 90s, 3m or 1h, got {value!r}")
    return seconds


def parse_shots(text: str) -> int | dict[str, int]:
    """Parse the numbers of images of ``--shots``: "4", or "screw=4,tile=16" by class."""
    try:
        if "=" not in text:
            return int(text)
        pairs = [word.rpartition("=") for word in parse_list(text)]
        return {name.strip(): int(number) for name, _, number in pairs}
    except ValueError:
        raise ValueError(f"--shots: wanted a number such as 4, or screw=4,tile=16, got {text!r}") from None


def parse_window(text: str) -> str | list[float]:
    """Parse the window of ``--window``: "auto", or two numbers such as "0 4095" or "0,4095"."""
    if text.strip() == "auto":
        return "auto"
    try:
        low, high = (float(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise ValueError(f"--window: wanted auto or two numbers LOW HIGH, got {text!r}") from None
    if not low < high or not math.isfinite(high - low):
        raise ValueError(f"--window: wanted LOW < HIGH, got {low:g} {high:g}")
    return [low, high]


def parse_list(text: str | None) -> list[str]:
    """Split a comma-separated list."""
    return [word.strip() for word in text.split(",") if word.strip()] if text else []


def parse_numbers(option: str, text: str | None) -> list[int]:
    """Split a comma-separated list of integers; the error message names ``option``."""
    try:
        return [int(word) for word in parse_list(text)]
    except ValueError:
        raise ValueError(f"{option}: wanted comma-separated integers, got {text!r}") from None
