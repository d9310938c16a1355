"""Options that several commands have, and what the words of an option mean."""

import ast
from pathlib import Path
from typing import Annotated, Any

import typer

Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. Default: the GPU where there is one.")]
Batch = Annotated[int, typer.Option(help="Images at once.")]
CheckpointFile = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="checkpoint.pt, or the folder of the run that holds it.")
]


def checkpoint_file(path: Path) -> Path:
    """The checkpoint that a file or the folder of a run stands for."""
    return path / "checkpoint.pt" if path.is_dir() else path


def change(text: str) -> tuple[str, Any]:
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


def split(text: str | None) -> list[str]:
    """The words between commas."""
    return [word.strip() for word in text.split(",") if word.strip()] if text else []


def numbers(option: str, text: str | None) -> list[int]:
    """The whole numbers between commas; ``option`` is named where there are other things."""
    try:
        return [int(word) for word in split(text)]
    except ValueError:
        raise ValueError(f"{option}: wanted whole numbers and commas, got {text!r}") from None
